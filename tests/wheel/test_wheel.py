"""The installed package, seen from outside the source tree."""

import importlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

import speechrnt
from speechrnt import _mel

DISTRIBUTION = importlib.metadata.distribution("speechrnt")
PACKAGE = Path(speechrnt.__file__).parent
SAMPLES = Path(__file__).parent.parent / "samples"
MODEL_FILES = {
    "CARD.md",
    "config.json",
    "model.bin",
    "preprocessor_config.json",
    "speechrnt.json",
    "tokenizer.json",
    "vocabulary.json",
}


def run(module, *arguments, **options):
    """Run ``python -m module``; a failure shows what it printed."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def installed_files():
    return [file for file in DISTRIBUTION.files if file.parts[0] == "speechrnt"]


def test_the_wheel_is_what_is_imported():
    assert Path(DISTRIBUTION.locate_file("speechrnt/__init__.py")) == PACKAGE / "__init__.py"
    assert not (PACKAGE.parent / "pyproject.toml").exists(), "imported from the source tree"


def test_version_agrees_with_the_metadata():
    assert DISTRIBUTION.version == speechrnt.__version__


def test_the_command_is_installed():
    (command,) = DISTRIBUTION.entry_points.select(group="console_scripts")
    assert command.name == "speechrnt"
    assert callable(command.load())


def test_the_model_travels():
    assert {path.name for path in (PACKAGE / "assets" / "pico").iterdir()} == MODEL_FILES


def test_each_extension_brings_its_declarations_and_stubs():
    assert (PACKAGE / "py.typed").is_file()
    sources = [file for file in installed_files() if file.suffix == ".pyx"]
    assert sources
    for source in sources:
        for suffix in (".pxd", ".pyi"):
            assert (PACKAGE / source.name).with_suffix(suffix).is_file(), f"{source} {suffix}"


def test_no_build_products_travel():
    assert [file for file in installed_files() if file.suffix in {".c", ".cpp", ".html"}] == []


@pytest.mark.parametrize("language", ["en", "de"])
def test_command_line_transcribes(language):
    clips = json.loads((SAMPLES / "manifest.json").read_text(encoding="utf-8"))
    clip = next(clip for clip in clips if clip["lang"] == language)
    assert clip["text"] in run("speechrnt", "transcribe", SAMPLES / clip["file"])


@pytest.mark.skipif(
    shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) is None,
    reason="needs a C compiler",
)
def test_another_package_can_cimport(tmp_path, monkeypatch):
    shutil.copy(Path(__file__).parent / "downstream.pyx", tmp_path)
    build = ["Cython.Build.Cythonize", "--inplace", "-X", "freethreading_compatible=True"]
    run(*build, "downstream.pyx", cwd=tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    downstream = importlib.import_module("downstream")
    pcm = np.random.default_rng(0).normal(scale=0.1, size=4000).astype(np.float32)
    assert downstream.log_mel(pcm.tobytes(), 80) == _mel.log_mel(pcm, 80).tobytes()
