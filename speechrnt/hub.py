"""Names of models, and fetching them from the Hugging Face hub."""

from __future__ import annotations

import re
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import huggingface_hub

from .errors import ModelLoadError, ModelNotFoundError

__all__ = [
    "EMBEDDED_MODELS",
    "HUB_MODELS",
    "MODEL_FILES",
    "OPTIONAL_FILES",
    "WEIGHTS",
    "available_models",
    "download_model",
    "fetch_tokenizer",
]

EMBEDDED_MODELS = {"pico": Path(__file__).parent / "assets" / "pico"}

# Where the converted models of the standard names live on the hub (faster-whisper, utils.py, MIT).
HUB_MODELS = {
    "tiny.en": "Systran/faster-whisper-tiny.en",
    "tiny": "Systran/faster-whisper-tiny",
    "base.en": "Systran/faster-whisper-base.en",
    "base": "Systran/faster-whisper-base",
    "small.en": "Systran/faster-whisper-small.en",
    "small": "Systran/faster-whisper-small",
    "medium.en": "Systran/faster-whisper-medium.en",
    "medium": "Systran/faster-whisper-medium",
    "large-v1": "Systran/faster-whisper-large-v1",
    "large-v2": "Systran/faster-whisper-large-v2",
    "large-v3": "Systran/faster-whisper-large-v3",
    "large": "Systran/faster-whisper-large-v3",
    "distil-large-v2": "Systran/faster-distil-whisper-large-v2",
    "distil-medium.en": "Systran/faster-distil-whisper-medium.en",
    "distil-small.en": "Systran/faster-distil-whisper-small.en",
    "distil-large-v3": "Systran/faster-distil-whisper-large-v3",
    "distil-large-v3.5": "distil-whisper/distil-large-v3.5-ct2",
    "large-v3-turbo": "mobiuslabsgmbh/faster-whisper-large-v3-turbo",
    "turbo": "mobiuslabsgmbh/faster-whisper-large-v3-turbo",
}

WEIGHTS = "model.bin"
MODEL_FILES = ("config.json", WEIGHTS, "vocabulary.*")
OPTIONAL_FILES = ("preprocessor_config.json", "speechrnt.json", "tokenizer.json")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def available_models() -> list[str]:
    """Return the names that `load_model` knows, the embedded model first.

    Besides these, any hub id (``"owner/name"``) and any local directory in CTranslate2's format can
    be loaded.
    """
    return [*EMBEDDED_MODELS, *HUB_MODELS]


def download_model(
    size_or_id: str,
    output_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
    cache_dir: str | PathLike[str] | None = None,
    revision: str | None = None,
    use_auth_token: str | bool | None = None,
) -> str:
    """Fetch a converted model from the hub and return its directory.

    Parameters
    ----------
    size_or_id
        A name from `available_models` or a hub id. The embedded model is never downloaded: its
        directory in the package is returned.
    output_dir
        Put the files here instead of into the cache.
    local_files_only
        Only look into the cache.
    cache_dir, revision, use_auth_token
        As in `load_model`.

    Raises
    ------
    ModelNotFoundError
        If the name is unknown, or the files are neither in the cache nor to be had.
    """
    if size_or_id in EMBEDDED_MODELS:
        return str(EMBEDDED_MODELS[size_or_id])
    repository = HUB_MODELS.get(size_or_id, size_or_id)
    if not _HUB_ID.fullmatch(repository):
        raise ModelNotFoundError(
            f"{size_or_id!r}: no model of this name and no such directory; use one of "
            f"{', '.join(available_models())}, a hub id like 'owner/name', or the path of a "
            "directory in CTranslate2's format"
        )
    arguments: dict[str, Any] = {}
    if output_dir is not None:
        arguments["local_dir"] = fspath(output_dir)
    if cache_dir is not None:
        arguments["cache_dir"] = fspath(cache_dir)
    if use_auth_token is not None:
        arguments["token"] = use_auth_token
    try:
        directory = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=[*MODEL_FILES, *OPTIONAL_FILES],
            **arguments,
        )
    # The hub client reports failures as its own errors, as OSError, and as those of its transport,
    # which differs between its versions.
    except Exception as error:
        raise ModelNotFoundError(_download_advice(size_or_id, repository, error)) from error
    return str(directory)


def fetch_tokenizer(
    name: str,
    multilingual: bool,
    cache_dir: str | PathLike[str] | None,
    local_files_only: bool,
) -> bytes:
    """Return OpenAI's tokenizer.json, which converted models without one use."""
    original = "openai/whisper-tiny" if multilingual else "openai/whisper-tiny.en"
    try:
        where = None if cache_dir is None else fspath(cache_dir)
        # With local_files_only, hf_hub_download asks the hub about other things all the same.
        path = huggingface_hub.try_to_load_from_cache(original, "tokenizer.json", where)
        if not isinstance(path, str):
            if local_files_only:
                raise FileNotFoundError("it is not in the cache, and only local files are allowed")
            path = huggingface_hub.hf_hub_download(original, "tokenizer.json", cache_dir=where)
        return Path(path).read_bytes()
    # See download_model.
    except Exception as error:
        raise ModelLoadError(
            f"{name}: has no tokenizer.json, and OpenAI's cannot be fetched from {original} "
            f"({_reason(error)}); copy the tokenizer.json of the original model into the directory"
        ) from error


def _download_advice(name: str, repository: str, error: Exception) -> str:
    # Imported here, as it brings an HTTP client that most processes never need.
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return f"{name}: no such directory, and not a hub id: {_reason(error)}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{name}: the hub gives {repository!r} only to users who have accepted its conditions; "
            "do so on its page, and pass use_auth_token"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{name}: no such directory, and the hub has no public model {repository!r}; check the "
            "spelling, or pass use_auth_token for a private one"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name}: {repository} has no such revision on the hub"
    return (
        f"{name}: not in the cache, and cannot be fetched from the hub "
        f"({type(error).__name__}: {_reason(error)}). To use it without a "
        f"network, run `hf download {repository} --local-dir DIR` on a machine that has one, "
        "copy DIR here, and give its path as the model; the embedded model 'pico' needs nothing"
    )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
