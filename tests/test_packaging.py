"""The sdist and the wheel: what they hold, and that the wheel works where it is installed."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import speechrnt

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "speechrnt"

PYTHONS = ["cp310", "cp311", "cp312", "cp313", "cp314", "cp314t"]
BUILD_PRODUCTS = (".c", ".cpp", ".html", ".pyc", ".so")

IMPORT_ALONE = """
import sys

def refuse(event, args):
    for kind in ("os.exec", "os.posix_spawn", "os.system", "socket.connect", "socket.get",
                 "subprocess."):
        assert not event.startswith(kind), (event, args)

sys.addaudithook(refuse)
import speechrnt
"""


def run(*command, **options):
    """Run ``python ...``; a failure shows what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        **options,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The directory of an sdist, and of a wheel built from it, of sources as in a fresh clone."""
    source = tmp_path_factory.mktemp("source") / "speechrnt"
    not_cloned = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*.so")
    shutil.copytree(ROOT, source, ignore=not_cloned)
    dist = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--outdir", dist, source)
    return dist


@pytest.fixture(scope="session")
def wheel(built):
    return next(built.glob("*.whl"))


def package_files():
    """What every distribution holds: all of speechrnt/ that is source."""
    paths = [path for path in PACKAGE.rglob("*") if path.is_file()]
    return {p.relative_to(ROOT).as_posix() for p in paths if p.suffix not in BUILD_PRODUCTS}


def test_the_sdist_holds_the_sources_and_no_build_products(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert package_files() <= files
    assert {"LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py"} <= files
    assert {"tests/conftest.py", "tests/samples/manifest.json"} <= files
    # What the tests and benchmarks have in C++ is written by hand.
    package = [name for name in files if name.startswith("speechrnt/")]
    assert [name for name in package if name.endswith(BUILD_PRODUCTS)] == []
    assert [name for name in files if name.endswith((".html", ".pyc", ".so"))] == []


def test_the_wheel_holds_the_package_and_its_extensions(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    files = {name for name in names if ".dist-info/" not in name}
    extensions = {name for name in files if name.endswith(".so")}
    assert files - extensions == package_files()
    sources = {path.stem for path in PACKAGE.glob("*.pyx")}
    if sys.platform != "linux":
        sources = {name for name in sources if not name.startswith(("_gpu", "capi_gpu"))}
    assert {Path(name).name.partition(".")[0] for name in extensions} == sources


def test_the_installed_wheel_works_outside_the_source_tree(wheel, tmp_path):
    site = tmp_path / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    for name in ("wheel", "samples", "downstream"):
        shutil.copytree(ROOT / "tests" / name, tmp_path / "tests" / name)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    run("-m", "pytest", "tests/wheel", cwd=tmp_path, env=environment)


def test_metadata_gives_the_version_and_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Version"] == speechrnt.__version__
    assert metadata["License-Expression"] == "Apache-2.0"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="cibuildwheel needs Python 3.11")
@pytest.mark.parametrize(
    ("platform", "arch", "tag"),
    [
        ("linux", "x86_64", "manylinux_x86_64"),
        ("linux", "aarch64", "manylinux_aarch64"),
        ("macos", "x86_64", "macosx_x86_64"),
        ("macos", "arm64", "macosx_arm64"),
    ],
)
def test_releases_are_built_for_every_supported_python(platform, arch, tag):
    question = ["--platform", platform, "--archs", arch, "--print-build-identifiers"]
    answer = run("-m", "cibuildwheel", *question, ROOT)
    assert answer.split() == [f"{python}-{tag}" for python in PYTHONS]


def test_importing_needs_no_compiler_and_no_network():
    run("-c", IMPORT_ALONE)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("def f(int[:] x, key):\n    return x[key]\n", "performance hint"),
        ("cdef void f() nogil:\n    pass\ndef g():\n    f()\n", "performance hint"),
        ("def f():\n    return 1\n    return 2\n", "Unreachable code"),
    ],
    ids=["untyped index", "GIL taken after a call", "warning"],
)
def test_what_cython_complains_of_fails_the_build(source, complaint, tmp_path):
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "speechrnt").mkdir()
    (tmp_path / "speechrnt" / "bad.pyx").write_text(source)
    for attempt in ("first", "with what the first one left behind"):
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode != 0, attempt
        assert complaint in done.stdout + done.stderr


def test_a_release_build_needs_the_gpu_modules(tmp_path):
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "speechrnt").mkdir()
    (tmp_path / "speechrnt" / "_gpu.pyx").write_text("")
    hide = "import sys; sys.modules['cuda'] = None; import runpy; runpy.run_path('setup.py')"
    for required, outcome in (("1", 1), ("", 0)):
        done = subprocess.run(
            [sys.executable, "-c", hide.replace(";", "; sys.argv = ['setup.py', 'build'];", 1)],
            cwd=tmp_path,
            env={**os.environ, "SPEECHRNT_GPU": required},
            capture_output=True,
            text=True,
        )
        assert done.returncode == outcome, done.stderr
        assert "the GPU modules" in done.stdout + done.stderr
        assert "cuda-bindings is not installed" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_binaries_run_on_every_cpu():
    inputs = [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "Makefile"]
    inputs += [path for path in PACKAGE.iterdir() if path.suffix in {".h", ".pyx"}]
    for path in inputs:
        assert "-march=native" not in path.read_text(encoding="utf-8"), path
