"""cuBLAS: found where pip puts it, loaded before CTranslate2 asks for it, or what to install.

Small libraries of its names stand for it, in processes of their own, as what is loaded stays.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from speechrnt import cublas
from speechrnt.errors import GpuUnavailable

ROOT = Path(__file__).parent.parent
CUBLAS, CUBLAS_LT = "libcublas.so.12", "libcublasLt.so.12"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="CUDA is Linux's here")

PRELOAD = """
import ctypes, json, os, sys
from speechrnt import cublas, errors

def loaded():
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps}
    return sorted(path for path in paths if "libcublas" in path)

facts = {"before": cublas.status(), "untouched": loaded()}
try:
    cublas.preload()
except errors.GpuUnavailable as error:
    facts["error"] = str(error)
facts["loaded"] = loaded()
facts["after"] = cublas.status()
try:
    ctypes.CDLL("libcublas.so.12")  # as CTranslate2 does
    facts["found"] = loaded()
except OSError:
    facts["found"] = None
cublas.preload() if "error" not in facts else None
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """A directory with both libraries, of which the first needs the second, as NVIDIA's does."""
    compiler = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0])
    if compiler is None:
        pytest.skip("needs a C compiler")
    directory = tmp_path_factory.mktemp("cublas")
    (directory / "lt.c").write_text("int cublasLtAnswer(void) { return 42; }\n")
    (directory / "cublas.c").write_text(
        "int cublasLtAnswer(void);\nint cublasAnswer(void) { return cublasLtAnswer(); }\n"
    )
    for source, name, needed in (("lt.c", CUBLAS_LT, []), ("cublas.c", CUBLAS, [CUBLAS_LT])):
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", source, *needed, "-o", name]
        subprocess.run(command, cwd=directory, check=True)
    return directory


@pytest.fixture
def wheel(libraries, tmp_path):
    """A directory for sys.path in which the wheel of cuBLAS is installed."""
    place = tmp_path / "site-packages" / "nvidia" / "cublas" / "lib"
    place.mkdir(parents=True)
    for name in (CUBLAS, CUBLAS_LT):
        shutil.copy(libraries / name, place)
    return place


def run(*search, code=PRELOAD, **environment):
    environment = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"} | {
        key: str(value) for key, value in environment.items()
    }
    path = os.pathsep.join(map(str, [*search, ROOT, *sys.path]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def none_here():
    """Skip where the real one is installed."""
    if cublas._is_loaded() or not cublas.status().startswith("libcublas.so.12 was not found"):
        pytest.skip("cuBLAS 12 is installed here")


def test_the_wheels_library_is_loaded_before_ctranslate2_asks_for_it(wheel):
    facts = run(wheel.parent.parent.parent)
    assert facts["before"] == str(wheel / CUBLAS)
    assert facts["untouched"] == []
    assert "error" not in facts
    assert (
        facts["loaded"] == facts["found"] == sorted([str(wheel / CUBLAS), str(wheel / CUBLAS_LT)])
    )
    assert facts["after"] == "libcublas.so.12, loaded"


def test_the_wheel_goes_before_what_the_loader_finds(wheel, libraries):
    facts = run(wheel.parent.parent.parent, LD_LIBRARY_PATH=libraries)
    assert facts["loaded"] == sorted([str(wheel / CUBLAS), str(wheel / CUBLAS_LT)])


def test_without_a_wheel_the_loader_finds_it(libraries, none_here):
    facts = run(LD_LIBRARY_PATH=libraries)
    assert facts["before"] == "libcublas.so.12, found by the dynamic loader"
    assert facts["loaded"] == sorted([str(libraries / CUBLAS), str(libraries / CUBLAS_LT)])


def test_where_there_is_none_the_message_says_what_to_install(none_here):
    facts = run()
    assert facts["loaded"] == []
    assert facts["found"] is None
    assert facts["error"].startswith("CTranslate2 needs cuBLAS 12 on a GPU, and libcublas.so.12 ")
    assert "pip install 'speechrnt[gpu]' (or nvidia-cublas-cu12; cuBLAS 13 does" in facts["error"]
    assert facts["before"] == facts["after"]
    assert facts["after"].startswith(
        "libcublas.so.12 was not found; on a GPU, CTranslate2 needs it"
    )


def test_a_wheel_that_cannot_be_loaded_is_named_and_the_loader_asked(wheel, libraries, none_here):
    (wheel / CUBLAS).write_bytes(b"cut off")
    facts = run(wheel.parent.parent.parent)
    assert str(wheel / CUBLAS) in facts["error"]
    assert "too short" in facts["error"]
    assert "pip install" in facts["error"]
    facts = run(wheel.parent.parent.parent, LD_LIBRARY_PATH=libraries)
    assert "error" not in facts
    assert str(libraries / CUBLAS) in facts["loaded"]


def test_a_wheel_without_the_second_library_is_named(wheel, none_here):
    (wheel / CUBLAS_LT).unlink()
    facts = run(wheel.parent.parent.parent)
    assert str(wheel / CUBLAS_LT) in facts["error"]


def test_what_is_loaded_already_is_taken(wheel, libraries):
    code = f"""
import ctypes
for name in ("{CUBLAS_LT}", "{CUBLAS}"):
    ctypes.CDLL("{libraries}/" + name)
"""
    facts = run(wheel.parent.parent.parent, code=code + PRELOAD)
    assert facts["loaded"] == sorted([str(libraries / CUBLAS), str(libraries / CUBLAS_LT)])


def test_ctranslate2_names_the_library_that_is_looked_for():
    """CTranslate2's x86-64 wheel; other builds of it may have no CUDA."""
    if os.uname().machine != "x86_64":
        pytest.skip("the wheels of other machines have no CUDA")
    assert cublas._is_needed()


def test_a_build_of_ctranslate2_without_cuda_needs_none(tmp_path, monkeypatch, none_here):
    library = tmp_path / "libctranslate2.so.4"
    library.write_bytes(b"\x7fELF without any GPU")
    maps = tmp_path / "maps"
    maps.write_text(f"7f00-7f01 r-xp 00000000 fe:00 7 {library}\n7f01-7f02 rw-p 0 00:00 0\n")
    monkeypatch.setattr(cublas, "_MAPS", maps)
    assert cublas.status() == "not used by this build of CTranslate2"
    cublas.preload()
    library.write_bytes(b"\x7fELF ... libcublas.so.12\0libcuda.so.1")
    with pytest.raises(GpuUnavailable, match="needs cuBLAS 12 on a GPU"):
        cublas.preload()
