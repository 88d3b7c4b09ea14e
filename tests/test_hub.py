"""Models of the hub: downloaded once, from one that stands in for it, and what can fail."""

import json
import os
import socket

import pytest
from hub import Hub, Repository, start_client

from speechrnt.hub import HUB_MODELS
from speechrnt.models import load_model

# Loads a model and transcribes with it, or says what went wrong.
TRANSCRIBE = """
import json
import speechrnt
name, options, audio = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
try:
    model = speechrnt.WhisperModel(name, **options)
except speechrnt.SpeechRNTError as error:
    print(json.dumps([type(error).__name__, str(error)]))
else:
    segments, _ = model.transcribe(audio)
    print(json.dumps(["text", "".join(segment.text for segment in segments)]))
"""

TEXT = ["text", " Two five one."]

DOWNLOAD = """
import json
import speechrnt
print(json.dumps(speechrnt.download_model(sys.argv[1], **json.loads(sys.argv[2]))))
"""


def answer(client):
    """Return what a client printed."""
    output, errors = client.communicate(timeout=300)
    assert client.returncode == 0, errors
    return json.loads(output)


@pytest.fixture
def transcribe(tmp_path, samples):
    """A function that starts a client which transcribes with a model of the hub at an address."""

    def start(url, name, home=tmp_path / "home", options=(), **variables):
        arguments = [name, json.dumps(dict(options)), samples / "s01_en.wav"]
        return start_client(TRANSCRIBE, *arguments, url=url, home=home, **variables)

    return start


@pytest.fixture
def closed_port():
    """An address where nobody answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize(
    ("name", "repository"),
    [("tiny", "Systran/faster-whisper-tiny"), ("owner/my-pico", "owner/my-pico")],
)
def test_a_model_of_the_hub_is_downloaded_once(name, repository, contents, transcribe, closed_port):
    others = {"README.md": b"hello", "pytorch_model.bin": b"x" * 10_000_000, "old/model.bin": b"y"}
    with Hub({repository: Repository({"main": {**contents, **others}})}) as hub:
        assert answer(transcribe(hub.url, name)) == TEXT
        first = hub.fetched()
        assert answer(transcribe(hub.url, name)) == TEXT
        assert hub.fetched() == first
    wanted = {"config.json", "model.bin", "preprocessor_config.json", "speechrnt.json"}
    assert sorted(first) == sorted(wanted | {"tokenizer.json", "vocabulary.json"})

    # Without the hub, the cache is enough.
    assert answer(transcribe(closed_port, name)) == TEXT
    assert answer(transcribe(closed_port, name, HF_HUB_OFFLINE="1")) == TEXT
    only_local = {"local_files_only": True}
    assert answer(transcribe(closed_port, name, options=only_local)) == TEXT


def test_local_files_only_asks_the_hub_nothing(contents, copy, transcribe):
    (copy / "tokenizer.json").unlink()
    names = {"owner/model": "ModelNotFoundError", str(copy): "ModelLoadError"}
    repositories = {
        "owner/model": Repository({"main": contents}),
        "openai/whisper-tiny": Repository({"main": contents}),
    }
    with Hub(repositories) as hub:
        for name, error in names.items():
            kind, message = answer(transcribe(hub.url, name, options={"local_files_only": True}))
            assert kind == error
            assert "not in the cache" in message
            assert hub.requests == []


def without(contents, name):
    return {key: content for key, content in contents.items() if key != name}


def test_a_model_without_tokenizer_gets_openais(contents, transcribe, tmp_path):
    repositories = {
        "owner/no-tokenizer": Repository({"main": without(contents, "tokenizer.json")}),
        "openai/whisper-tiny": Repository({"main": contents}),
    }
    root = tmp_path / "root"
    with Hub(repositories) as hub:
        options = {"download_root": str(root)}
        assert answer(transcribe(hub.url, "owner/no-tokenizer", options=options)) == TEXT
        assert hub.fetched().count("tokenizer.json") == 1
        asked = len(hub.requests)
        options["local_files_only"] = True
        assert answer(transcribe(hub.url, "owner/no-tokenizer", options=options)) == TEXT
        assert len(hub.requests) == asked
    assert sorted(path.name for path in root.glob("models--*")) == [
        "models--openai--whisper-tiny",
        "models--owner--no-tokenizer",
    ]


def test_a_revision_is_a_branch_a_tag_or_a_commit(contents, transcribe):
    broken = {**contents, "speechrnt.json": b"oops"}
    repository = Repository({"main": broken, "v1": contents})
    with Hub({"owner/model": repository}) as hub:
        for revision in ("v1", repository.commit("v1")):
            options = {"revision": revision}
            assert answer(transcribe(hub.url, "owner/model", options=options)) == TEXT
        kind, message = answer(transcribe(hub.url, "owner/model"))
        assert kind == "ModelLoadError"
        assert message.startswith("owner/model: speechrnt.json: is not valid JSON")
        kind, message = answer(transcribe(hub.url, "owner/model", options={"revision": "v2"}))
    assert kind == "ModelNotFoundError"
    assert message == "owner/model: owner/model has no such revision on the hub"


def test_a_model_can_be_downloaded_into_a_directory(contents, tmp_path):
    out = tmp_path / "out"
    options = json.dumps({"output_dir": str(out)})
    with Hub({HUB_MODELS["base.en"]: Repository({"main": contents})}) as hub:
        client = start_client(DOWNLOAD, "base.en", options, url=hub.url, home=tmp_path / "home")
        assert answer(client) == str(out)
    assert {path.name for path in out.iterdir() if path.is_file()} == set(contents) - {"CARD.md"}
    assert load_model(out, "cpu").is_multilingual


@pytest.mark.parametrize("token", [None, "wrong", "secret"])
def test_a_private_model_needs_its_token(contents, transcribe, token):
    with Hub({"owner/model": Repository({"main": contents}, token="secret")}) as hub:
        options = {"use_auth_token": token}
        outcome = answer(transcribe(hub.url, "owner/model", options=options))
    if token == "secret":
        assert outcome == TEXT
    else:
        assert outcome == ["ModelNotFoundError", no_such_model("owner/model")]


def no_such_model(name):
    return (
        f"{name}: no such directory, and the hub has no public model '{name}'; check the "
        "spelling, or pass use_auth_token for a private one"
    )


def test_a_model_with_conditions_is_said_to_have_them(contents, transcribe):
    repository = Repository({"main": contents}, token="secret", gated=True)
    with Hub({"owner/model": repository}) as hub:
        kind, message = answer(transcribe(hub.url, "owner/model"))
    assert kind == "ModelNotFoundError"
    assert message.startswith("owner/model: the hub gives 'owner/model' only to users who have")
    assert "use_auth_token" in message


def test_a_repository_that_does_not_exist_is_not_found(transcribe):
    with Hub({}) as hub:
        outcome = answer(transcribe(hub.url, "owner/misspelt"))
    assert outcome == ["ModelNotFoundError", no_such_model("owner/misspelt")]


def test_a_repository_that_holds_no_converted_model_is_a_load_error(contents, transcribe):
    original = {"config.json": b"{}", "pytorch_model.bin": b"x", "tokenizer.json": b"{}"}
    with Hub({"openai/whisper-base": Repository({"main": original})}) as hub:
        kind, message = answer(transcribe(hub.url, "openai/whisper-base"))
    assert kind == "ModelLoadError"
    assert "model.bin, vocabulary.* missing; " in message


def test_without_hub_and_cache_it_says_how_to_get_the_model(transcribe, closed_port):
    kind, message = answer(transcribe(closed_port, "small"))
    assert kind == "ModelNotFoundError"
    assert message.startswith("small: not in the cache, and cannot be fetched from the hub (")
    assert "`hf download Systran/faster-whisper-small --local-dir DIR`" in message


def test_a_download_that_loses_its_connection_can_be_made_again(contents, transcribe):
    with Hub({"owner/model": Repository({"main": contents})}, cut={"model.bin": 1}) as hub:
        # Newer versions of huggingface_hub go on by themselves.
        first = answer(transcribe(hub.url, "owner/model"))
        assert first == TEXT or first[0] == "ModelNotFoundError"
        assert answer(transcribe(hub.url, "owner/model")) == TEXT
        assert hub.fetched().count("model.bin") == 2


def test_a_killed_download_can_be_made_again(contents, transcribe, closed_port):
    repositories = {"owner/model": Repository({"main": contents})}
    with Hub(repositories, stall={"model.bin"}) as hub:
        client = transcribe(hub.url, "owner/model")
        assert hub.stalled.wait(100)
        client.kill()
        client.communicate()
    # Older versions of huggingface_hub take what there is for the whole.
    kind, message = answer(transcribe(closed_port, "owner/model"))
    assert kind in ("ModelNotFoundError", "ModelLoadError")
    assert "hf download owner/model" in message or "if its download was interrupted" in message
    with Hub(repositories) as hub:
        assert answer(transcribe(hub.url, "owner/model")) == TEXT
        assert "model.bin" in hub.fetched()


def test_a_cache_that_cannot_be_written_is_said(contents, transcribe, tmp_path):
    (tmp_path / "file").touch()
    options = {"download_root": os.fspath(tmp_path / "file" / "root")}
    with Hub({"owner/model": Repository({"main": contents})}) as hub:
        kind, message = answer(transcribe(hub.url, "owner/model", options=options))
    assert kind == "ModelNotFoundError"
    assert "Not a directory" in message
