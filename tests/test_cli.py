"""The command, called in this process, as a process, and on a terminal."""

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import ctranslate2
import pytest
from hub import Hub, Repository, start_client

import speechrnt
from speechrnt.cli import main
from speechrnt.errors import GpuUnavailable
from speechrnt.hub import EMBEDDED_MODELS, available_models

PYTHONS_VARIABLES = ("PYTHONIOENCODING", "PYTHONUNBUFFERED", "PYTHONUTF8")

COMMAND = [sys.executable, "-W", "error", "-m", "speechrnt"]
# Python's own variables change what is tested here; more threads would wait for each other.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in PYTHONS_VARIABLES},
    "OMP_NUM_THREADS": "1",
}

# Of the terminal: so many that no line is broken.
COLUMNS = 400

SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt"}


@pytest.fixture(scope="module")
def texts(manifest) -> dict[str, str]:
    """What is said in each of the samples."""
    return {sample["file"]: sample["text"] for sample in manifest}


@pytest.fixture
def call(capsys):
    """A function that calls the command in this process: status, output and errors."""

    def call(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            status = end.code
        return status, *capsys.readouterr()

    return call


def run(*arguments, **options):
    """Run the command as a process: status, output and errors."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options = {"env": ENVIRONMENT, "encoding": "utf-8", **pipes, **options}
    done = subprocess.run([*COMMAND, *map(os.fspath, arguments)], timeout=300, **options)
    return done.returncode, done.stdout, done.stderr


def run_on_terminal(*arguments, **options):
    """Run the command with standard error, and output unless `options` say, on a terminal.

    Returns the status, what the terminal was sent, and the lines that it shows in the end.
    """
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    options = {"stdin": terminal, "stdout": terminal, "stderr": terminal, **options}
    sent = b""
    with subprocess.Popen(
        [*COMMAND, *map(os.fspath, arguments)], env=ENVIRONMENT, **options
    ) as process:
        os.close(terminal)
        # Linux reports the closed terminal as an error, macOS as the end of the file.
        with contextlib.suppress(OSError):
            while data := os.read(ours, 4096):
                sent += data
    os.close(ours)
    text = sent.decode()
    return process.returncode, text, screen(text)


def screen(text) -> list[str]:
    """Return the lines that a terminal shows after `text`."""
    rows, row, column = [[]], 0, 0
    for part in re.findall(r"\x1b\[A|\x1b\[K|[^\x1b]", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            if row == len(rows):
                rows.append([])
        elif part == "\x1b[A":
            row -= 1
        elif part == "\x1b[K":
            del rows[row][column:]
        else:
            assert part >= " ", f"{part!r} is not expected here"
            assert column < COLUMNS, "a line is too long for the terminal"
            rows[row] += " " * (column - len(rows[row]))
            rows[row][column : column + 1] = part
            column += 1
    lines = ["".join(row).rstrip() for row in rows]
    assert lines.pop() == "", "the last line is not complete"
    return lines


@pytest.fixture
def endless(samples):
    """The command, at work on a great many files."""
    # A shell has what it starts in the background ignore interrupts, and children inherit that.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [*COMMAND, "transcribe", *["s01_en.wav"] * 10_000],
            cwd=samples,
            env=ENVIRONMENT,
            encoding="utf-8",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    finally:
        signal.signal(signal.SIGINT, ours)
    with process:
        yield process
        process.kill()


# Transcripts


@pytest.mark.parametrize("name", ["s01_en.wav", "s02_de.wav", "s07_fr.wav"])
def test_one_recording_is_printed_as_text(call, samples, texts, name):
    assert call("transcribe", samples / name) == (0, texts[name] + "\n", "")


def test_several_recordings_are_printed_in_the_order_given(call, samples, texts):
    names = ["s03_en.wav", "s01_en.wav", "s02_de.wav", "s01_en.wav"]
    status, output, errors = call("transcribe", *(samples / name for name in names))
    assert (status, errors) == (0, "")
    assert output == "".join(f"==> {samples / name} <==\n{texts[name]}\n" for name in names)


def test_json_is_printed_as_a_line_per_recording(call, samples, texts):
    names = ["s02_de.wav", "s01_en.wav"]
    files = [samples / name for name in names]
    status, output, errors = call("transcribe", "--format", "json", *files)
    assert (status, errors) == (0, "")
    documents = [json.loads(line) for line in output.splitlines()]
    assert [document["text"] for document in documents] == [texts[name] for name in names]
    assert [document["language"] for document in documents] == ["de", "en"]
    assert "Öffne" in output


@pytest.mark.parametrize(
    ("form", "start", "marker"), [("srt", "1\n", ","), ("vtt", "WEBVTT\n\n", ".")]
)
def test_subtitles_of_one_recording_are_printed(call, samples, form, start, marker):
    status, output, errors = call("transcribe", "--format", form, samples / "s01_en.wav")
    assert (status, errors) == (0, "")
    time = rf"00:00:0\d\{marker}\d\d\d"
    assert re.fullmatch(rf"{start}{time} --> {time}\nTwo five one\.\n\n", output)


@pytest.mark.parametrize("form", SUFFIXES)
def test_a_file_per_recording_is_written(call, samples, tmp_path, form):
    names = ["s02_de", "s01_en", "s05_en"]
    out = tmp_path / "not" / "there" / "yet"
    files = [samples / f"{name}.wav" for name in names]
    assert call("transcribe", "--format", form, "--output-dir", out, *files) == (0, "", "")
    assert sorted(path.name for path in out.iterdir()) == sorted(n + SUFFIXES[form] for n in names)
    for file in files:
        content = (out / (file.stem + SUFFIXES[form])).read_text(encoding="utf-8")
        assert content == call("transcribe", "--format", form, file)[1]


def test_an_existing_file_is_replaced(call, samples, tmp_path):
    (tmp_path / "s01_en.txt").write_text("old " * 100)
    call("transcribe", "--output-dir", tmp_path, samples / "s01_en.wav")
    assert (tmp_path / "s01_en.txt").read_text() == "Two five one.\n"


def test_a_recording_is_translated(call, samples, manifest):
    [sample] = [sample for sample in manifest if sample["file"] == "s02_de.wav"]
    status, output, _ = call("transcribe", "--task", "translate", samples / "s02_de.wav")
    assert (status, output) == (0, sample["english"] + "\n")


@pytest.mark.parametrize(("arguments", "sure"), [([], False), (["--language", "de"], True)])
def test_a_language_that_is_given_is_not_detected(call, samples, arguments, sure):
    output = call("transcribe", "--format", "json", *arguments, samples / "s02_de.wav")[1]
    document = json.loads(output)
    assert document["language"] == "de"
    assert (document["language_probability"] == 1) == sure


@pytest.mark.parametrize("compute_type", ["auto", "float32", "int8"])
def test_a_model_directory_device_and_compute_type_are_used(call, samples, compute_type):
    arguments = ["--model", EMBEDDED_MODELS["pico"], "--device", "cpu"]
    arguments += ["--compute-type", compute_type, samples / "s01_en.wav"]
    assert call("transcribe", *arguments) == (0, "Two five one.\n", "")


def test_a_damaged_recording_is_transcribed_with_a_warning(call, samples, tmp_path):
    whole = (samples / "s03_en.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) * 3 // 4])
    status, output, errors = call("transcribe", tmp_path / "cut.wav")
    assert status == 0
    assert output.startswith("Set the alarm")
    assert errors.startswith(f"speechrnt: warning: {tmp_path / 'cut.wav'}: ")


# Failures


@pytest.mark.parametrize("bad", ["missing.wav", "directory", "empty.wav", "text.wav", "bad\nname"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_bad_file_does_not_stop_the_others(call, samples, texts, tmp_path, bad, place):
    (tmp_path / "directory").mkdir()
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("This is no recording. " * 100)
    good = [samples / "s01_en.wav", samples / "s02_de.wav"]
    files = [*good[:place], tmp_path / bad, *good[place:]]
    out = tmp_path / "out"
    status, _, errors = call("transcribe", "--output-dir", out, *files)
    assert status == 1
    assert errors.startswith("speechrnt: error: ")
    assert Path(bad).name in errors or repr(bad)[1:-1] in errors
    assert errors.count("\n") == 1
    assert {path.name: path.read_text(encoding="utf-8") for path in out.iterdir()} == {
        file.with_suffix(".txt").name: texts[file.name] + "\n" for file in good
    }


def test_on_standard_output_too_a_bad_file_does_not_stop_the_others(call, samples, tmp_path):
    files = [samples / "s01_en.wav", tmp_path / "missing.wav", samples / "s01_en.wav"]
    status, output, errors = call("transcribe", *files)
    assert status == 1
    assert output == f"==> {files[0]} <==\nTwo five one.\n" * 2
    assert "missing.wav" in errors


def test_text_and_messages_in_one_stream_keep_their_order(samples):
    arguments = ["transcribe", "s01_en.wav", "missing.wav", "s01_en.wav"]
    status, output, _ = run(*arguments, cwd=samples, stderr=subprocess.STDOUT)
    assert status == 1
    starts = [line.partition(" ")[0] for line in output.splitlines()]
    assert starts == ["==>", "Two", "speechrnt:", "==>", "Two"]


def test_if_every_file_is_bad_the_status_is_1(call, tmp_path):
    status, output, errors = call("transcribe", tmp_path / "a.wav", tmp_path / "b.wav")
    assert (status, output, errors.count("speechrnt: error: ")) == (1, "", 2)


@pytest.mark.parametrize(
    "names", [["a.wav", "b.wav", "a.flac"], ["a.wav", "sub/a.wav"], ["a", "a"]]
)
def test_two_files_that_would_be_written_to_one_are_refused(call, tmp_path, names):
    out = tmp_path / "out"
    status, output, errors = call("transcribe", "--output-dir", out, *names)
    assert (status, output) == (2, "")
    assert errors == (
        f"speechrnt: error: two of the files would be written to {out / 'a.txt'}; run them apart\n"
    )
    assert not out.exists()


@pytest.mark.parametrize("form", ["srt", "vtt"])
def test_subtitles_of_several_recordings_need_a_directory(call, samples, form):
    files = [samples / "s01_en.wav", samples / "s02_de.wav"]
    assert call("transcribe", "--format", form, *files) == (
        2,
        "",
        f"speechrnt: error: --format {form} with several files needs --output-dir\n",
    )


def test_an_unknown_model_gets_the_list_of_names(call, samples):
    status, output, errors = call("transcribe", "--model", "huge", samples / "s01_en.wav")
    assert (status, output) == (2, "")
    assert errors.startswith("speechrnt: error: 'huge': no model of this name")
    assert ", ".join(available_models()) in errors


def test_a_directory_that_holds_no_model_is_said(call, samples, tmp_path):
    status, output, errors = call("transcribe", "--model", tmp_path, samples / "s01_en.wav")
    assert (status, output) == (2, "")
    assert f"speechrnt: error: {tmp_path}: not a Whisper model" in errors


def test_an_unknown_language_gets_the_list_of_languages(call, samples):
    arguments = ["--language", "ja", samples / "s01_en.wav"]
    message = "speechrnt: error: --language ja: the model knows de, en, es, fr\n"
    assert call("transcribe", *arguments) == (2, "", message)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--device", "cuda"], "speechrnt: error: device: CTranslate2 sees no CUDA device"),
        (["--compute-type", "int4"], "speechrnt: error: compute_type: 'int4' is not supported"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--task", "sing"], "argument --task: invalid choice: 'sing'"),
        (["--format", "pdf"], "argument --format: invalid choice: 'pdf'"),
        (["--lang", "en"], "unrecognized arguments: --lang"),
        (["--beams"], "unrecognized arguments: --beams"),
    ],
)
def test_a_wrong_option_stops_before_the_first_file(
    call, samples, monkeypatch, arguments, complaint
):
    monkeypatch.setattr(ctranslate2, "get_cuda_device_count", lambda: 0)
    status, output, errors = call("transcribe", samples / "s01_en.wav", *arguments)
    assert (status, output) == (2, "")
    assert complaint in errors


@pytest.mark.parametrize("name", ["file", "file/under"])
def test_an_output_directory_that_cannot_be_made_is_said(call, samples, tmp_path, name):
    (tmp_path / "file").touch()
    arguments = ["--output-dir", tmp_path / name, samples / "s01_en.wav"]
    status, output, errors = call("transcribe", *arguments)
    assert (status, output) == (2, "")
    assert errors.startswith("speechrnt: error: ")
    assert str(tmp_path / name) in errors


def test_an_output_that_cannot_be_written_does_not_stop_the_others(call, samples, tmp_path):
    (tmp_path / "s01_en.txt").mkdir()
    files = [samples / "s01_en.wav", samples / "s02_de.wav"]
    status, _, errors = call("transcribe", "--output-dir", tmp_path, *files)
    assert status == 1
    assert str(tmp_path / "s01_en.txt") in errors
    assert (tmp_path / "s02_de.txt").is_file()


# Names and encodings


@pytest.mark.parametrize(
    "name", ["with space.wav", "Übung 日本 👋.wav", "-dash.wav", "--model", "-"]
)
def test_any_file_name_will_do(samples, tmp_path, name):
    shutil.copy(samples / "s01_en.wav", tmp_path / name)
    assert run("transcribe", "--", name, cwd=tmp_path) == (0, "Two five one.\n", "")
    status, output, errors = run("transcribe", "--output-dir", "out", "--", name, cwd=tmp_path)
    assert (status, output, errors) == (0, "", "")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{Path(name).stem}.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have only Unicode names")
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_file_name_that_is_not_unicode_will_do(samples, tmp_path, locale):
    name = os.fsdecode(b"\xff.wav")
    shutil.copy(samples / "s01_en.wav", tmp_path / name)
    arguments = ["transcribe", name, "missing", name]
    environment = {**ENVIRONMENT, "LC_ALL": locale}
    status, output, errors = run(*arguments, cwd=tmp_path, env=environment, errors="replace")
    assert status == 1
    assert output.count("Two five one.\n") == 2
    assert errors.count("\n") == 1


ASCII = [
    pytest.param({"PYTHONIOENCODING": "ascii"}, id="PYTHONIOENCODING"),
    pytest.param({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, id="LC_ALL"),
]


@pytest.mark.parametrize("variables", ASCII)
def test_text_is_escaped_where_the_encoding_lacks_a_character(samples, tmp_path, variables):
    arguments = ["transcribe", samples / "s02_de.wav", samples / "s01_en.wav"]
    status, output, errors = run(*arguments, env={**ENVIRONMENT, **variables})
    assert (status, errors) == (0, "")
    assert output.splitlines()[1::2] == ["\\xd6ffne das Fenster.", "Two five one."]


@pytest.mark.parametrize("variables", ASCII)
def test_json_stays_json_where_the_encoding_lacks_a_character(samples, variables):
    arguments = ["transcribe", "--format", "json", samples / "s02_de.wav"]
    status, output, errors = run(*arguments, env={**ENVIRONMENT, **variables})
    assert (status, errors) == (0, "")
    assert output.isascii()
    assert json.loads(output)["text"] == "Öffne das Fenster."


@pytest.mark.parametrize("variables", ASCII)
def test_written_files_are_utf_8_in_any_locale(samples, tmp_path, variables):
    arguments = ["transcribe", "--output-dir", tmp_path, samples / "s02_de.wav"]
    assert run(*arguments, env={**ENVIRONMENT, **variables}) == (0, "", "")
    assert (tmp_path / "s02_de.txt").read_text(encoding="utf-8") == "Öffne das Fenster.\n"


# Progress


@pytest.mark.parametrize("arguments", [[], ["--no-progress"]])
def test_on_a_pipe_there_is_no_progress_bar(samples, arguments):
    assert run("transcribe", *arguments, samples / "s01_en.wav") == (0, "Two five one.\n", "")


def test_on_a_pipe_there_is_a_progress_bar_if_asked_for(samples):
    status, output, errors = run("transcribe", "--progress", samples / "s01_en.wav")
    assert (status, output) == (0, "Two five one.\n")
    assert "s01_en.wav:   0%|" in errors


@pytest.mark.parametrize("arguments", [[], ["--progress"]])
def test_on_a_terminal_the_bar_leaves_the_lines_of_text_intact(samples, texts, arguments):
    names = ["s00_es.wav", "s01_en.wav", "s02_de.wav"]
    status, sent, shown = run_on_terminal("transcribe", *arguments, *names, cwd=samples)
    assert status == 0
    for name in names:
        assert f"{name}:   0%|" in sent
    assert shown == [line for name in names for line in (f"==> {name} <==", texts[name])]


def test_on_a_terminal_there_is_no_bar_if_not_asked_for(samples, texts):
    status, sent, _ = run_on_terminal("transcribe", "--no-progress", samples / "s01_en.wav")
    assert (status, sent) == (0, texts["s01_en.wav"] + "\r\n")


def test_on_a_terminal_messages_are_lines_of_their_own(samples, tmp_path):
    whole = (samples / "s03_en.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) * 3 // 4])
    shutil.copy(samples / "s01_en.wav", tmp_path / "good.wav")
    names = ["good.wav", "none.wav", "cut.wav"]
    status, _, shown = run_on_terminal("transcribe", *names, cwd=tmp_path)
    assert status == 1
    assert shown[:2] == ["==> good.wav <==", "Two five one."]
    assert shown[2].startswith("speechrnt: error: 'none.wav': no such file")
    assert shown[3].startswith("speechrnt: warning: cut.wav: ")
    assert shown[4] == "==> cut.wav <=="
    assert shown[5].startswith("Set the alarm")
    assert len(shown) == 6


def test_the_bar_shows_while_the_text_goes_to_a_file(samples, tmp_path):
    with (tmp_path / "text").open("wb") as file:
        arguments = ["transcribe", samples / "s01_en.wav"]
        status, sent, shown = run_on_terminal(*arguments, stdout=file)
    assert (status, shown) == (0, [])
    assert "s01_en.wav:   0%|" in sent
    assert (tmp_path / "text").read_text() == "Two five one.\n"


# The end of the process


@pytest.mark.parametrize(
    "arguments", [["models"], ["info"], ["transcribe", "s01_en.wav", "s02_de.wav"]]
)
def test_a_reader_that_has_left_is_no_error_worth_a_traceback(samples, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        status, _, errors = run(*arguments, cwd=samples, stdout=pipe)
    assert (status, errors) == (1, "")


def test_a_reader_that_leaves_early_stops_the_rest(endless):
    assert endless.stdout.readline() == "==> s01_en.wav <==\n"
    endless.stdout.close()
    assert endless.stderr.read() == ""
    assert endless.wait(100) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [["models"], ["transcribe", "s01_en.wav"]])
def test_a_full_disk_is_said(samples, arguments):
    with Path("/dev/full").open("wb") as full:
        status, _, errors = run(*arguments, cwd=samples, stdout=full)
    assert status == 1
    assert "No space left on device" in errors
    assert "Traceback" not in errors


def test_an_interrupt_ends_it_with_130_and_no_traceback(endless):
    assert endless.stdout.readline() == "==> s01_en.wav <==\n"
    endless.send_signal(signal.SIGINT)
    output, errors = endless.communicate(timeout=300)
    assert (endless.returncode, errors) == (130, "")
    assert output.count("Two five one.") < 10_000


# A model of the hub


def test_a_download_shows_no_bar_on_a_pipe(samples, tmp_path):
    files = {path.name: path.read_bytes() for path in EMBEDDED_MODELS["pico"].iterdir()}
    code = "from speechrnt.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["transcribe", "--model", "tiny", samples / "s01_en.wav"]
    with Hub({"Systran/faster-whisper-tiny": Repository({"main": files})}) as hub:
        client = start_client(code, *arguments, url=hub.url, home=tmp_path)
        assert client.communicate(timeout=300) == ("Two five one.\n", "")
        assert client.returncode == 0
        client = start_client(code, "models", url=hub.url, home=tmp_path)
        output, errors = client.communicate(timeout=300)
    assert (client.returncode, errors) == (0, "")
    downloaded = [line.split()[0] for line in output.splitlines() if "(downloaded)" in line]
    assert downloaded == ["tiny"]


# Other commands


def test_models_lists_the_names_the_embedded_one_first(call):
    status, output, errors = call("models")
    assert (status, errors) == (0, "")
    lines = output.splitlines()
    assert [line.split()[0] for line in lines] == available_models()
    assert lines[0].split() == ["pico", "embedded"]
    assert lines[-1].split() == ["turbo", "mobiuslabsgmbh/faster-whisper-large-v3-turbo"]
    assert len({re.match(r"\S+ +", line).end() for line in lines}) == 1


@pytest.mark.parametrize("gpus", [0, 2])
def test_info_tells_what_the_machine_offers(call, monkeypatch, gpus):
    types = {"cpu": {"int8", "float32"}, "cuda": {"float16", "bfloat16"}}
    monkeypatch.setattr(ctranslate2, "get_cuda_device_count", lambda: gpus)
    monkeypatch.setattr(ctranslate2, "get_supported_compute_types", types.__getitem__)
    status, output, errors = call("info")
    assert (status, errors) == (0, "")
    facts = dict(re.split("  +", line, maxsplit=1) for line in output.splitlines())
    assert facts["speechrnt"] == speechrnt.__version__
    assert facts["ctranslate2"] == ctranslate2.__version__
    assert facts["log-mel kernel"] == speechrnt._mel.isa()
    assert int(facts["usable cores"]) >= 1
    assert facts["compute types, cpu"] == "float32, int8"
    assert facts["cublas"] == speechrnt.cublas.status()
    if gpus:
        assert facts["inference memory, cuda"] == speechrnt.inference_memory.status("cuda")
        assert facts["features, cuda"] == speechrnt.handover.status()
        assert facts["gpu"] == "2 CUDA device(s)"
        assert facts["compute types, cuda"] == "bfloat16, float16"
    else:
        assert facts["gpu"]
        assert "compute types, cuda" not in facts


def test_a_gpu_without_cublas_is_reported_with_what_to_install(call, monkeypatch):
    def refuse():
        raise GpuUnavailable("CTranslate2 needs cuBLAS 12 on a GPU: pip install 'speechrnt[gpu]'")

    monkeypatch.setattr(ctranslate2, "get_cuda_device_count", lambda: 1)
    monkeypatch.setattr(speechrnt.cublas, "preload", refuse)
    status, output, errors = call("transcribe", "--device", "cuda", "s01_en.wav")
    assert (status, output) == (2, "")
    assert errors == (
        "speechrnt: error: CTranslate2 needs cuBLAS 12 on a GPU: pip install 'speechrnt[gpu]'\n"
    )


def test_the_version_is_printed(call):
    assert call("--version") == (0, f"speechrnt {speechrnt.__version__}\n", "")
    assert call("-V") == (0, f"speechrnt {speechrnt.__version__}\n", "")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            [],
            ["recordings into text stream transcribe audio", "info show versions"],
        ),
        (["transcribe"], ["FILE [FILE ...]", "--output-dir DIR", "(default: pico)", "Exit status"]),
        (["stream"], ["on standard input", "(default: s16)", "Example: arecord"]),
        (["models"], ["already here"]),
        (["info"], ["compute types"]),
    ],
)
def test_help_fits_a_terminal(call, monkeypatch, command, words):
    monkeypatch.setenv("COLUMNS", "80")
    status, output, errors = call(*command, "--help")
    assert (status, errors) == (0, "")
    assert output.startswith(" ".join(["usage: speechrnt", *command]))
    assert max(map(len, output.splitlines())) <= 80
    for words_together in words:
        assert words_together in " ".join(output.split())


@pytest.mark.parametrize("arguments", [[], ["transcribe"], ["listen"], ["--model", "tiny"]])
def test_a_wrong_call_gets_the_usage(call, arguments):
    status, output, errors = call(*arguments)
    assert (status, output) == (2, "")
    assert errors.startswith("usage: speechrnt ")


def test_the_module_is_the_command():
    assert run("--version") == (0, f"speechrnt {speechrnt.__version__}\n", "")
    status, output, errors = run()
    assert (status, output) == (2, "")
    assert errors.startswith("usage: speechrnt [-h] [-V] COMMAND ...\n")
