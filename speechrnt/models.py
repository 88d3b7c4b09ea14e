"""Finding, fetching and loading Whisper models in CTranslate2's format."""

from __future__ import annotations

import atexit
import ctypes
import json
import logging
import os
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import filter as matching
from functools import partial
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import ctranslate2
import numpy as np
import tokenizers
from numpy.typing import NDArray

from . import cublas, inference_memory, mempool, openmp
from .decoding import MAX_PROMPT_TOKENS
from .errors import (
    GpuError,
    GpuUnavailable,
    ModelError,
    ModelLoadError,
    ModelNotFoundError,
    OptionError,
    PoolExhausted,
)
from .handover import FeatureHandover, open_handover
from .hub import (
    EMBEDDED_MODELS,
    HUB_MODELS,
    MODEL_FILES,
    OPTIONAL_FILES,
    WEIGHTS,
    available_models,
    download_model,
    fetch_tokenizer,
)
from .residency import Residency
from .sizing import ModelShape, fit, footprint, read_shape
from .system import usable_memory
from .tokenizer import Tokenizer

__all__ = [
    "DEFAULT_MODEL",
    "Capabilities",
    "Model",
    "load_model",
    "resolve_compute_type",
    "resolve_device",
]

logger = logging.getLogger("speechrnt")

DEFAULT_MODEL = "pico"
"""Name of the embedded model."""

DEVICES = ("auto", "cpu", "cuda")

# Preference of compute_type="auto": the fastest type that keeps the accuracy of the usual
# conversions on that device.
_AUTO_COMPUTE_TYPES = {
    "cpu": ("int8_float32", "int8", "float32"),
    "cuda": ("float16", "bfloat16", "float32"),
}

# Lists of token ids in config.json that CTranslate2 uses without looking whether they are there and
# within the vocabulary: the second one only to detect the language.
_SUPPRESS_FIRST = "suppress_ids_begin"
_LANGUAGES = "lang_ids"


@dataclass(frozen=True)
class Capabilities:
    """What a model says it was trained for, beyond what every Whisper model is.

    Read from ``speechrnt.json`` in the model directory. A model without that file gets the
    defaults: stock Whisper weights are only good with the 30 s they were trained on.

    Attributes
    ----------
    variable_context
        Whether the encoder was trained on input of any length up to 30 s.
    max_window_s
        Longest stretch of speech, in seconds, that the model handles well in one window.
    margin_s
        Seconds of silence the model expects after the audio when the context is reduced.
    max_prompt_tokens
        Most tokens of previous text the model handles well.
    """

    variable_context: bool = False
    max_window_s: float = 30.0
    margin_s: float = 0.0
    max_prompt_tokens: int = MAX_PROMPT_TOKENS

    def __post_init__(self) -> None:
        if not isinstance(self.variable_context, bool):
            raise ModelLoadError("speechrnt.json: variable_context must be true or false")
        _check_range("max_window_s", self.max_window_s, 1, 30)
        _check_range("margin_s", self.margin_s, 0, 30)
        _check_range("max_prompt_tokens", self.max_prompt_tokens, 0, MAX_PROMPT_TOKENS)
        if not isinstance(self.max_prompt_tokens, int):
            raise ModelLoadError("speechrnt.json: max_prompt_tokens must be a whole number")

    @classmethod
    def from_json(cls, text: str | bytes) -> Capabilities:
        """Read the declaration; keys that are not capabilities are left to others.

        Raises
        ------
        ModelLoadError
            If it is not JSON, or a value is out of range.
        """
        try:
            declared = json.loads(text)
        except ValueError as error:
            raise ModelLoadError(f"speechrnt.json: is not valid JSON: {error}") from error
        if not isinstance(declared, dict):
            raise ModelLoadError("speechrnt.json: must hold a JSON object")
        known = {each.name for each in fields(cls)}
        return cls(**{key: value for key, value in declared.items() if key in known})


def _check_range(name: str, value: object, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ModelLoadError(
            f"speechrnt.json: {name} must be a number from {least} to {most}, not {value!r}"
        )


class _Calls:
    """The calls into CTranslate2 under way.

    A daemon thread inside CTranslate2 while the interpreter goes away would crash the process, so
    the exit waits for the calls under way, and no more are let in.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._under_way = 0
        self._closed = False

    def __enter__(self) -> None:
        with self._changed:
            if self._closed:
                raise ModelError("the interpreter is exiting: no model can be used any more")
            self._under_way += 1

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._under_way -= 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._under_way)


_calls = _Calls()
atexit.register(_calls.close)

_loaded: weakref.WeakSet[Model] = weakref.WeakSet()
_has_loaded = False
_is_orphan = False


def _after_fork_in_child() -> None:
    """Forget the calls and the threads that are not in the child."""
    global _is_orphan
    _is_orphan = _has_loaded
    _calls.__init__()  # type: ignore[misc]
    for model in _loaded:
        # Never freed: the destructor would wait for the model's threads.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(model.whisper))


os.register_at_fork(after_in_child=_after_fork_in_child)


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model; immutable, and safe to use from any number of threads.

    It belongs to the process that loaded it: CTranslate2's threads do not survive a fork, and a
    forked child gets a `ModelError` if it uses the model or loads another one.

    Attributes
    ----------
    name
        The name, hub id or path it was asked for by.
    whisper
        The CTranslate2 model.
    tokenizer
        Its vocabulary.
    capabilities
        What it was trained for.
    shape
        Its dimensions; None if its file is of a kind that only CTranslate2 can read.
    handover
        What takes features to its GPU; None on the CPU, and where CTranslate2 does.
    """

    name: str
    whisper: ctranslate2.models.Whisper
    tokenizer: Tokenizer
    capabilities: Capabilities
    shape: ModelShape | None = None
    handover: FeatureHandover | None = field(default=None, repr=False)
    residency: Residency = field(init=False, repr=False)
    _compute_type: str = field(init=False, repr=False)
    _n_mels: int = field(init=False, repr=False)
    _is_multilingual: bool = field(init=False, repr=False)
    _process: int = field(default_factory=os.getpid, init=False, repr=False)

    def __post_init__(self) -> None:
        global _has_loaded
        _has_loaded = True
        _loaded.add(self)
        object.__setattr__(self, "residency", Residency(self.whisper, self.name, _calls))
        # CTranslate2 does not tell while the weights are unloaded.
        object.__setattr__(self, "_compute_type", str(self.whisper.compute_type))
        object.__setattr__(self, "_n_mels", int(self.whisper.n_mels))
        object.__setattr__(self, "_is_multilingual", bool(self.whisper.is_multilingual))

    def __reduce__(self) -> str:
        raise ModelError(f"{self.name}: a model cannot be pickled; load it in each process")

    @property
    def compute_type(self) -> str:
        """What the weights are computed with, such as ``"int8_float32"``."""
        return self._compute_type

    @property
    def n_mels(self) -> int:
        """Number of mel bands the encoder takes: 80 or 128."""
        return self._n_mels

    @property
    def is_multilingual(self) -> bool:
        """Whether the model knows more than English."""
        return self._is_multilingual

    def encode(self, features: NDArray[np.float32]) -> ctranslate2.StorageView:
        """Run the encoder.

        Parameters
        ----------
        features : (batch, n_mels, frames) ndarray of float32
            C-contiguous; not to be changed before the call returns.

        Returns
        -------
        (batch, (frames + 1) // 2, d_model) StorageView
            On the model's device; on the CPU if the model is spread over several GPUs, since the
            next call may run on any of them.
        """
        whisper = self._here()
        if self.handover is not None:
            with _calls, self.residency:
                return self.handover.encode(whisper, features)
        to_cpu = whisper.device == "cuda" and len(whisper.device_index) > 1
        with _calls, self.residency:
            return whisper.encode(ctranslate2.StorageView.from_array(features), to_cpu=to_cpu)

    def detect_language(self, encoding: ctranslate2.StorageView) -> list[tuple[str, float]]:
        """Return code and probability of every language in one encoded window, best first."""
        [probabilities] = self.detect_languages(encoding)
        return probabilities

    def detect_languages(self, encoding: ctranslate2.StorageView) -> list[list[tuple[str, float]]]:
        """Return the same for each of several windows encoded together."""
        whisper = self._here()
        with _calls, self.residency:
            windows = whisper.detect_language(encoding)
        return [
            [(token[2:-2], probability) for token, probability in probabilities]
            for probabilities in windows
        ]

    def generate(
        self, encoding: ctranslate2.StorageView, prompts: list[list[int]], **options: Any
    ) -> list[ctranslate2.models.WhisperGenerationResult]:
        """Run the decoder; `options` are those of `ctranslate2.models.Whisper.generate`."""
        whisper = self._here()
        with _calls, self.residency:
            results: list[ctranslate2.models.WhisperGenerationResult] = whisper.generate(
                encoding, prompts, **options
            )
        return results

    def load(self) -> None:
        """Bring the weights back into memory; see `Residency`."""
        self._here()
        with _calls:
            self.residency.load()

    def unload(self, to_cpu: bool = False, timeout: float | None = None) -> None:
        """Free the weights between two calls; see `Residency.unload`."""
        self._here()
        with _calls:
            self.residency.unload(to_cpu, timeout)

    def unload_when_idle(self, seconds: float | None, to_cpu: bool = False) -> None:
        """Free the weights after so many seconds; see `Residency.unload_when_idle`."""
        self._here()
        self.residency.unload_when_idle(seconds, to_cpu)

    def fitting_batch(self, wanted: int, frames: int = 3000, beam_size: int = 5) -> int:
        """Return how many windows can be decoded in one call while all workers do the same.

        On the CPU half of the memory that this process may use is counted with, on a GPU what is
        free there now, and what the driver keeps for CTranslate2.

        Parameters
        ----------
        wanted
            The most to return, at least 1.
        frames
            Frames of features in a window.
        beam_size
            Beams per window.

        Returns
        -------
        int
            From 1 to `wanted`; `wanted` if nothing is known of the memory or the model.

        Raises
        ------
        OptionError
            If a number is out of range.
        """
        if self.shape is None:
            return wanted
        device, compute_type = self.whisper.device, self.compute_type
        counts = {"device": device, "beam_size": beam_size, "audio_positions": (frames + 1) // 2}
        try:
            if device == "cuda":
                # The weights are there already, and no longer free.
                weights = footprint(self.shape, compute_type, **counts).weights
                memory = weights + _free_memory(self.whisper.device_index)
            else:
                memory = usable_memory() // 2
            return fit(
                self.shape,
                memory,
                [compute_type],
                batch=wanted,
                num_workers=self.whisper.num_workers,
                **counts,
            ).decode_batch
        except PoolExhausted:
            return 1
        except (GpuUnavailable, GpuError):
            return wanted

    def align(
        self,
        encoding: ctranslate2.StorageView,
        opening: list[int],
        texts: list[list[int]],
        frames: list[int],
        median_filter_width: int,
    ) -> list[ctranslate2.models.WhisperAlignmentResult]:
        """Find out when the tokens of transcripts were said; see `Whisper.align`."""
        whisper = self._here()
        with _calls, self.residency:
            alignments: list[ctranslate2.models.WhisperAlignmentResult] = whisper.align(
                encoding, opening, texts, frames, median_filter_width=median_filter_width
            )
        return alignments

    def check_process(self) -> None:
        """Raise `ModelError` in a forked child of the process that the model belongs to."""
        if os.getpid() != self._process:
            raise ModelError(
                f"{self.name}: was loaded before this process was forked, and does not work in "
                "the child; start processes with the 'spawn' method, or before the first model"
            )

    def _here(self) -> ctranslate2.models.Whisper:
        """Return the model if it belongs to this process."""
        self.check_process()
        return self.whisper


def load_model(
    model: str | PathLike[str] = DEFAULT_MODEL,
    device: str = "auto",
    compute_type: str = "default",
    *,
    device_index: int | list[int] = 0,
    cpu_threads: int = 0,
    num_workers: int = 1,
    download_root: str | PathLike[str] | None = None,
    local_files_only: bool = False,
    files: Mapping[str, bytes | BinaryIO] | None = None,
    revision: str | None = None,
    use_auth_token: str | bool | None = None,
    gpu_pool_bytes: int | None = None,
    **model_kwargs: Any,
) -> Model:
    """Load a Whisper model.

    Parameters
    ----------
    model
        A name from `available_models`, a directory in CTranslate2's format, or a hub id
        (``"owner/name"``). Names other than the embedded model's are downloaded once and then come
        from the cache.
    device
        ``"cpu"``, ``"cuda"``, or ``"auto"``: CUDA if CTranslate2 sees a device.
    compute_type
        ``"default"`` keeps the type the model was saved in, as far as the device supports it;
        ``"auto"`` takes the fastest one with the usual accuracy (see `resolve_compute_type`);
        or one of CTranslate2's types by name.
    device_index
        Which GPU, or a list of GPUs to hold a copy each.
    cpu_threads
        Threads per worker on the CPU; 0 means CTranslate2's choice (``OMP_NUM_THREADS``, or four at
        most).
    num_workers
        Calls that may run at the same time.
    download_root
        Where to cache downloads, instead of the hub's standard cache.
    local_files_only
        Never use the network.
    files
        The model's files in memory, by name; `model` is then only a name for it.
    revision
        Branch, tag or commit of the hub repository.
    use_auth_token
        Token for the hub, or True for the one stored by its login command.
    gpu_pool_bytes
        Limit of the memory on the GPU through which features reach the model. None: they go through
        a pool that all models share; 0: CTranslate2's way.
    **model_kwargs
        Passed on to `ctranslate2.models.Whisper`.

    Raises
    ------
    ModelNotFoundError
        If the name is unknown, the directory does not exist, or the download failed.
    ModelLoadError
        If the directory is not a Whisper model that can be loaded.
    OptionError
        If an option is unknown, out of range, or not supported here.
    ModelError
        If this process was forked from one that had loaded a model.
    GpuUnavailable
        If CTranslate2 sees the GPU but cannot use it, as cuBLAS 12 is not installed.
    GpuError
        If the driver refused what a GPU needs.

    Notes
    -----
    The first model on a device has CTranslate2's memory there kept: see `inference_memory`.
    """
    if _is_orphan:
        # The OpenMP runtime in CTranslate2 waits for the threads it had in the parent.
        raise ModelError(
            "no model can be loaded here: this process was forked from one that had loaded a "
            "model; start processes with the 'spawn' method, or before the first model"
        )
    if not isinstance(model, (str, PathLike)):
        raise OptionError(f"model: must be a name or a path, not {model!r}")
    if not isinstance(files, (Mapping, type(None))):
        raise OptionError(f"files: must map names to contents, not {files!r}")
    name = os.fsdecode(model)
    device = resolve_device(device)
    indices = _checked_device_index(device_index, device)
    is_auto = compute_type == "auto"
    compute_type = resolve_compute_type(compute_type, device, indices[0])
    _check_count("cpu_threads", cpu_threads, 0)
    _check_count("num_workers", num_workers, 1)
    if gpu_pool_bytes is not None:
        _check_count("gpu_pool_bytes", gpu_pool_bytes, 0)
    if files is None:
        directory = _find(
            model,
            cache_dir=download_root,
            local_files_only=local_files_only,
            revision=revision,
            use_auth_token=use_auth_token,
        )
        place, in_memory, texts = str(directory), None, _read_texts(directory)
    else:
        place, in_memory = name, {key: _read(key, content) for key, content in files.items()}
        _check_complete(place, in_memory)
        texts = in_memory

    shape = _read_shape(place if in_memory is None else in_memory[WEIGHTS])
    if device == "cpu":
        inference_memory.prepare()
    else:
        cublas.preload()
        for index in indices:
            inference_memory.prepare(f"cuda:{index}")
        if is_auto and shape is not None:
            compute_type = _fitting_compute_type(compute_type, shape, indices, num_workers)
    try:
        construct = partial(
            ctranslate2.models.Whisper,
            place,
            device=device,
            device_index=indices,
            compute_type=compute_type,
            intra_threads=int(cpu_threads),
            inter_threads=int(num_workers),
            files=in_memory,
            **model_kwargs,
        )
        whisper = openmp.load(construct) if device == "cpu" else construct()
    except TypeError as error:
        raise OptionError(
            f"model_kwargs: ctranslate2.models.Whisper does not take {model_kwargs}"
        ) from error
    except (RuntimeError, ValueError, MemoryError) as error:
        raise ModelLoadError(
            f"{name}: CTranslate2 cannot load this as a Whisper model: {error}"
        ) from error
    if whisper.n_mels not in (80, 128):
        raise ModelLoadError(f"{name}: the model takes {whisper.n_mels} mel bands, not 80 or 128")
    multilingual = bool(whisper.is_multilingual)
    content = texts.get("tokenizer.json")
    if content is None:
        content = fetch_tokenizer(name, multilingual, download_root, local_files_only)
    try:
        tokenizer = _load_tokenizer(content, multilingual)
        _check_ids(texts, tokenizer)
        declaration = texts.get("speechrnt.json")
        capabilities = (
            Capabilities() if declaration is None else Capabilities.from_json(declaration)
        )
    except ModelLoadError as error:
        raise ModelLoadError(f"{name}: {error}") from error
    # With several GPUs, nobody knows yet which of them a call will run on.
    on_one_gpu = device == "cuda" and len(indices) == 1
    handover = None
    if on_one_gpu:
        handover = open_handover(indices[0], whisper.compute_type, gpu_pool_bytes)
    return Model(name, whisper, tokenizer, capabilities, shape, handover)


def resolve_device(device: str) -> str:
    """Return ``"cpu"`` or ``"cuda"`` for a requested device.

    Raises
    ------
    OptionError
        If the device is unknown, or CUDA is asked for and CTranslate2 sees no device.
    """
    if device not in DEVICES:
        raise OptionError(f"device: {device!r} is unknown; use one of {', '.join(DEVICES)}")
    gpus = ctranslate2.get_cuda_device_count()
    if device == "cuda" and not gpus:
        raise OptionError("device: CTranslate2 sees no CUDA device; use 'cpu' or 'auto'")
    if device == "auto":
        return "cuda" if gpus else "cpu"
    return device


def resolve_compute_type(compute_type: str, device: str, device_index: int = 0) -> str:
    """Return the compute type to load with.

    Parameters
    ----------
    compute_type
        ``"default"`` is passed on; ``"auto"`` becomes the first supported one of float16, bfloat16
        and float32 on CUDA, of int8 and float32 on the CPU; any other is checked against what
        CTranslate2 supports on the device. Loading a model with ``"auto"`` takes an 8-bit type on a
        GPU that has no room for a larger one.
    device
        ``"cpu"`` or ``"cuda"``.
    device_index
        Which GPU.

    Raises
    ------
    OptionError
        If the type is not supported on the device.
    """
    if compute_type == "default":
        return compute_type
    supported = sorted(ctranslate2.get_supported_compute_types(device, device_index))
    if compute_type == "auto":
        return next(kind for kind in _AUTO_COMPUTE_TYPES[device] if kind in supported)
    if compute_type not in supported:
        raise OptionError(
            f"compute_type: {compute_type!r} is not supported on {device}; use one of "
            f"default, auto, {', '.join(supported)}"
        )
    return compute_type


def _fitting_compute_type(
    preferred: str, shape: ModelShape, indices: list[int], num_workers: int
) -> str:
    """Return the preferred type, or a smaller one if there is no room for it on one of the GPUs."""
    supported = ctranslate2.get_supported_compute_types("cuda", indices[0])
    try:
        memory = _free_memory(indices)
        return fit(shape, memory, supported, batch=1, num_workers=num_workers).compute_type
    except (GpuUnavailable, GpuError, PoolExhausted):
        # What is free is not known, or not even one long window fits: CTranslate2 will tell.
        return preferred


def _free_memory(indices: list[int]) -> int:
    """Return how many bytes are free on each of some GPUs."""
    return min(mempool.free_memory(index)[0] for index in indices)


def _read_shape(weights: str | bytes) -> ModelShape | None:
    try:
        return read_shape(weights)
    except ModelLoadError as error:
        # Nothing of a model depends on it, and CTranslate2 says what is wrong, if anything is.
        logger.debug("%s", error)
        return None


def _checked_device_index(device_index: int | list[int], device: str) -> list[int]:
    """Return the indices as a list."""
    indices = [device_index] if isinstance(device_index, int) else list(device_index)
    count = ctranslate2.get_cuda_device_count() if device == "cuda" else 1
    if not indices or any(index not in range(count) for index in indices):
        raise OptionError(
            f"device_index: must be a number or list of numbers from 0 to {count - 1} on "
            f"{device}, not {device_index!r}"
        )
    return indices


def _check_count(option: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise OptionError(f"{option}: must be a whole number from {least}, not {value!r}")


def _find(model: str | PathLike[str], **hub_arguments: Any) -> Path:
    """Return the directory of a model, fetching it if it is a name on the hub."""
    name = os.fsdecode(model)
    if name in EMBEDDED_MODELS and isinstance(model, str):
        return EMBEDDED_MODELS[name]
    try:
        directory = Path(name).expanduser()
        if name and directory.is_dir():
            return directory
        is_file = directory.is_file()
    except (OSError, RuntimeError):  # no path can be so long, or no user has this name
        is_file = False
    if is_file and name not in HUB_MODELS:
        raise ModelNotFoundError(
            f"{name}: is a file; give the directory that holds config.json and model.bin"
        )
    if not isinstance(model, str) or (name not in HUB_MODELS and _looks_like_path(name)):
        raise ModelNotFoundError(
            f"{name}: no such directory; give the directory that holds config.json and model.bin, "
            f"or one of the names {', '.join(available_models())}"
        )
    return Path(download_model(name, **hub_arguments))


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _check_complete(place: str, names: Iterable[str]) -> None:
    names = list(names)
    missing = [pattern for pattern in MODEL_FILES if not matching(names, pattern)]
    if missing:
        raise ModelLoadError(
            f"{place}: not a Whisper model in CTranslate2's format: {', '.join(missing)} "
            "missing; load it again if its download was interrupted, or else convert a model with "
            "ct2-transformers-converter, and copy its tokenizer.json and preprocessor_config.json "
            "along"
        )


def _read_texts(directory: Path) -> dict[str, bytes]:
    """Return the files of a complete model directory, except the weights."""
    try:
        _check_complete(str(directory), (path.name for path in directory.iterdir()))
        return {
            path.name: path.read_bytes()
            for pattern in (*MODEL_FILES, *OPTIONAL_FILES)
            for path in directory.glob(pattern)
            if path.name != WEIGHTS and path.is_file()
        }
    except OSError as error:
        raise ModelLoadError(f"{directory}: cannot be read: {error}") from error


def _read(name: str, content: bytes | BinaryIO) -> bytes:
    if hasattr(content, "read"):
        content = content.read()
    if not isinstance(content, bytes):
        raise OptionError(
            f"files: {name!r} must be bytes or a file opened in binary mode, not "
            f"{type(content).__name__}"
        )
    return content


def _load_tokenizer(content: bytes, multilingual: bool) -> Tokenizer:
    try:
        loaded = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the bindings raise no narrower class
        raise ModelLoadError(f"tokenizer.json cannot be read: {error}") from error
    return Tokenizer(loaded, multilingual)


def _check_ids(texts: Mapping[str, bytes], tokenizer: Tokenizer) -> None:
    """Check that tokenizer and configuration mean the same ids as the model's vocabulary.

    CTranslate2 has read the configuration and the vocabulary before, so that both are well-formed.
    """
    if "vocabulary.json" in texts:
        vocabulary = json.loads(texts["vocabulary.json"])
    else:
        vocabulary = texts["vocabulary.txt"].decode(errors="replace").split("\n")
    for index in (tokenizer.eot, tokenizer.sot, tokenizer.no_timestamps):
        token = tokenizer.hf_tokenizer.id_to_token(index)
        if vocabulary[index : index + 1] != [token]:
            raise ModelLoadError(
                f"tokenizer.json belongs to another model: {token} is {index} there, but not in "
                "the vocabulary; copy the tokenizer.json of the original model into the directory"
            )
    config = json.loads(texts["config.json"])
    if not isinstance(config, dict):
        raise ModelLoadError("config.json: must hold a JSON object")
    for key in (_SUPPRESS_FIRST, _LANGUAGES) if tokenizer.multilingual else (_SUPPRESS_FIRST,):
        ids = config.get(key, False)
        good = isinstance(ids, list) and all(index in range(len(vocabulary)) for index in ids)
        # CTranslate2 takes null for an empty list.
        if not good and ids is not None:
            raise ModelLoadError(
                f"config.json: {key} must be a list of token ids below {len(vocabulary)}"
            )
    if tokenizer.multilingual and not config[_LANGUAGES]:
        raise ModelLoadError(f"config.json: {_LANGUAGES} of a multilingual model must not be empty")
