"""The ``speechrnt`` command."""

from __future__ import annotations

import argparse
import io
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import ctranslate2
import huggingface_hub
from tqdm import tqdm

from . import _mel, cublas, demo, handover, inference_memory
from ._version import __version__
from .audio import PCM_ENCODINGS, SAMPLE_RATE, load_audio
from .errors import SpeechRNTError
from .formats import WRITERS
from .hub import EMBEDDED_MODELS, HUB_MODELS
from .live import EventPrinter, pcm_chunks, play, recorded_chunks
from .models import DEFAULT_MODEL, DEVICES
from .results import Segment
from .stt import OptimizedSTTFactory, PerformanceOptimizedSTT
from .system import cpu_name, usable_cores, why_no_gpu
from .tokenizer import TASKS
from .transcribe import WhisperModel

__all__ = ["main"]

EXIT_OK = 0
EXIT_SOME_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt"}
_SUBTITLES = ("srt", "vtt")


def main(arguments: Sequence[str] | None = None) -> int:
    r"""Run the command.

    Parameters
    ----------
    arguments
        The words after the command's name; those of the process by default.

    Returns
    -------
    int
        0 if all went well, 1 if some files could not be transcribed, 2 if nothing could be started,
        130 after an interrupt.

    Notes
    -----
    Standard output keeps the encoding of the locale. Characters that it lacks are written as
    escapes: those of JSON in JSON, ``\xf6`` or ``\u4e16`` in the other formats. The files in
    ``--output-dir`` are always UTF-8.
    """
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the locale's encoding lacks is no reason to stop half-way.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status: int = options.run(options)
        print(end="", flush=True)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as error:
        # Of standard output; all others are reported where they happen.
        if not isinstance(error, BrokenPipeError):
            _report("error", f"standard output: {error}")
        # What is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_SOME_FAILED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="speechrnt", description="Low-latency speech-to-text.", allow_abbrev=False
    )
    parser.add_argument("-V", "--version", action="version", version=f"speechrnt {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    transcribe = commands.add_parser(
        "transcribe",
        allow_abbrev=False,
        help="turn recordings into text",
        description="Turn recordings into text, in the order given. A file that cannot be "
        "transcribed is reported and does not stop the others.",
        epilog="Exit status: 0 if all files were transcribed, 1 if some were not, 2 if nothing "
        "could be started (usage, model), 130 after an interrupt.",
    )
    transcribe.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="recording: wav, flac, mp3, m4a, ogg, webm, mp4, ...",
    )
    transcribe.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="name (see 'speechrnt models'), hub id or directory (default: %(default)s)",
    )
    transcribe.add_argument(
        "--language", metavar="CODE", help="language spoken, such as en (default: detected)"
    )
    transcribe.add_argument(
        "--task",
        choices=TASKS,
        default=TASKS[0],
        help="transcribe, or translate to English (default: %(default)s)",
    )
    transcribe.add_argument(
        "--device", choices=DEVICES, default="auto", help="where to compute (default: %(default)s)"
    )
    transcribe.add_argument(
        "--compute-type",
        default="default",
        metavar="TYPE",
        help="'default' (as the model was saved), 'auto', or one that 'speechrnt info' lists",
    )
    transcribe.add_argument(
        "--format",
        choices=tuple(WRITERS),
        default="text",
        help="form of output (default: %(default)s)",
    )
    transcribe.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="write a UTF-8 file per recording here instead of to standard output",
    )
    transcribe.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="show a progress bar (default: on a terminal)",
    )
    transcribe.set_defaults(run=_transcribe)

    live = commands.add_parser(
        "stream",
        allow_abbrev=False,
        help="transcribe audio as it comes, with partial results",
        description="Transcribe a recording as if it were being spoken, or PCM from standard "
        "input as it comes. On a terminal the line is written again as more is understood; "
        "elsewhere each event is a line.",
        epilog="Example: arecord -q -f S16_LE -r 16000 -c 1 -t raw | speechrnt stream -",
    )
    live.add_argument("file", metavar="FILE", help="recording, or - for PCM on standard input")
    live.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="name (see 'speechrnt models'), hub id or directory (default: %(default)s)",
    )
    live.add_argument(
        "--language", metavar="CODE", help="language spoken, such as en (default: detected)"
    )
    live.add_argument(
        "--device", choices=DEVICES, default="auto", help="where to compute (default: %(default)s)"
    )
    live.add_argument(
        "--compute-type",
        default="default",
        metavar="TYPE",
        help="'default' (as the model was saved), 'auto', or one that 'speechrnt info' lists",
    )
    live.add_argument(
        "--sample-rate",
        type=int,
        default=SAMPLE_RATE,
        metavar="HZ",
        help="of the PCM, mono (default: %(default)s)",
    )
    live.add_argument(
        "--encoding",
        choices=tuple(PCM_ENCODINGS),
        default="s16",
        help="of the PCM, little endian (default: %(default)s)",
    )
    live.add_argument(
        "--speed",
        type=float,
        default=1.0,
        metavar="TIMES",
        help="play the recording so many times as fast (default: %(default)s)",
    )
    live.add_argument("--json", action="store_true", help="each event as a line of JSON")
    live.set_defaults(run=_stream)

    models = commands.add_parser(
        "models",
        help="list the models known by name",
        description="List the models known by name, and whether they are already here.",
    )
    models.set_defaults(run=_models)

    info = commands.add_parser(
        "info",
        help="show versions and what this machine offers",
        description="Show versions, processor, cores, GPU and compute types.",
    )
    info.set_defaults(run=_info)

    tour = commands.add_parser(
        "demo",
        help="show each part at work, in under a minute",
        description="Show pools, scheduler, streaming and the engine at work on real audio.",
    )
    tour.set_defaults(run=_demo)
    return parser


def _transcribe(options: argparse.Namespace) -> int:
    directory: Path | None = options.output_dir
    if options.format in _SUBTITLES and len(options.files) > 1 and directory is None:
        return _fail(f"--format {options.format} with several files needs --output-dir")
    outputs: list[Path | None] = [
        directory and directory / (file.stem + _SUFFIXES[options.format]) for file in options.files
    ]
    for number, output in enumerate(outputs):
        if output is not None and output in outputs[:number]:
            return _fail(f"two of the files would be written to {output}; run them apart")
    if options.progress is None:
        options.progress = sys.stderr.isatty()
    if not options.progress and options.model not in EMBEDDED_MODELS:
        # Imported here, as it brings an HTTP client that most processes never need.
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    try:
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        model = WhisperModel(options.model, options.device, compute_type=options.compute_type)
    except (SpeechRNTError, OSError) as error:
        return _fail(str(error))
    if options.language not in (None, *model.supported_languages):
        return _fail(
            f"--language {options.language}: the model knows {', '.join(model.supported_languages)}"
        )

    status = EXIT_OK
    for file, output in zip(options.files, outputs, strict=True):
        try:
            _transcribe_file(model, file, output, options)
        except BrokenPipeError:
            raise
        except (SpeechRNTError, OSError) as error:
            _report("error", str(error))
            status = EXIT_SOME_FAILED
    return status


def _transcribe_file(
    model: WhisperModel, file: Path, output: Path | None, options: argparse.Namespace
) -> None:
    write = WRITERS[options.format]
    segments, info = model.transcribe(file, language=options.language, task=options.task)
    for warning in info.warnings:
        _report("warning", f"{file}: {warning}")
    with tqdm(
        total=round(info.duration, 2),
        desc=file.name,
        unit="s",
        leave=False,
        disable=not options.progress,
    ) as progress:
        followed = _followed(segments, progress)
        if output is not None:
            # Nothing is written before the whole transcript is there.
            text = io.StringIO()
            write(followed, info, text, str(file))
            output.write_text(text.getvalue(), encoding="utf-8")
            return
        if options.format == "text" and len(options.files) > 1:
            print(f"==> {file} <==", file=_AboveProgress())
        write(followed, info, _AboveProgress(), str(file))


class _AboveProgress(io.TextIOBase):
    """Standard output, kept apart from a progress bar on the same terminal.

    Lines are written whole: the bar is drawn again after each write, at the start of the line.
    """

    def __init__(self) -> None:
        self._line = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return sys.stdout.encoding

    def write(self, text: str) -> int:
        lines, newline, self._line = (self._line + text).rpartition("\n")
        if newline:
            with tqdm.external_write_mode(file=sys.stdout):
                print(lines, flush=True)
        return len(text)


def _followed(segments: Iterable[Segment], progress: tqdm[NoReturn]) -> Iterator[Segment]:
    for segment in segments:
        progress.update(max(0.0, min(segment.end, progress.total) - progress.n))
        yield segment


def _stream(options: argparse.Namespace) -> int:
    if not options.speed > 0:
        return _fail(f"--speed {options.speed}: must be more than 0")
    is_pcm = options.file == "-"
    try:
        audio = None if is_pcm else load_audio(Path(options.file))
        engine = PerformanceOptimizedSTT(
            OptimizedSTTFactory.recommended_config(),
            options.model,
            device=options.device,
            compute_type=options.compute_type,
        )
    except (SpeechRNTError, OSError) as error:
        return _fail(str(error))
    printer = EventPrinter(sys.stdout, options.json)
    try:
        with engine:
            stream = engine.stream(
                callback=printer,
                language=options.language,
                sample_rate=options.sample_rate if is_pcm else SAMPLE_RATE,
                encoding=options.encoding,
            )
            if audio is None:
                chunks = pcm_chunks(sys.stdin.buffer, options.sample_rate, options.encoding)
            else:
                chunks = recorded_chunks(audio, options.speed)
            warnings = play(stream, chunks, printer).warnings
    except SpeechRNTError as error:
        return _fail(str(error))
    for warning in (*(() if audio is None else audio.warnings), *warnings):
        _report("warning", f"{options.file}: {warning}")
    return EXIT_OK


def _models(_options: argparse.Namespace) -> int:
    width = max(map(len, HUB_MODELS))
    for name in EMBEDDED_MODELS:
        print(f"{name:{width}}  embedded")
    for name, repository in HUB_MODELS.items():
        here = isinstance(huggingface_hub.try_to_load_from_cache(repository, "model.bin"), str)
        print(f"{name:{width}}  {repository}{'  (downloaded)' if here else ''}")
    return EXIT_OK


def _info(_options: argparse.Namespace) -> int:
    packages = ("ctranslate2", "av", "numpy", "tokenizers", "huggingface-hub")
    no_gpu = why_no_gpu()
    facts = {
        "speechrnt": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{package: version(package) for package in packages},
        "processor": cpu_name(),
        "log-mel kernel": _mel.isa(),
        "usable cores": str(usable_cores()),
        "inference memory": inference_memory.status(),
        "gpu": no_gpu or f"{ctranslate2.get_cuda_device_count()} CUDA device(s)",
    }
    if no_gpu is None:
        facts["inference memory, cuda"] = inference_memory.status("cuda")
        facts["features, cuda"] = handover.status()
    facts["cublas"] = cublas.status()
    for device in ("cpu",) if no_gpu else ("cpu", "cuda"):
        types = ctranslate2.get_supported_compute_types(device)
        facts[f"compute types, {device}"] = ", ".join(sorted(types))
    width = max(map(len, facts))
    for fact, value in facts.items():
        print(f"{fact:{width}}  {value}")
    return EXIT_OK


def _demo(_options: argparse.Namespace) -> int:
    demo.run()
    return EXIT_OK


def _report(kind: str, message: str) -> None:
    print(f"speechrnt: {kind}: {message}", file=sys.stderr)


def _fail(message: str) -> int:
    _report("error", message)
    return EXIT_USAGE
