"""The test double of the NVIDIA driver, which must be loaded before anything asks for the real one.

After `load`, ``libcuda.so.1`` is the double for the rest of the process: cuda-bindings, CTranslate2
and `ctypes` all find it by that name. So it belongs into a process of its own.
"""

import contextlib
import ctypes
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).parent

OUT_OF_MEMORY = 2
ILLEGAL_ADDRESS = 700
GIB = 2**30


def compiler():
    """The C compiler's command, or None without one."""
    command = (sysconfig.get_config_var("CC") or "cc").split()[0]
    return shutil.which(command)


def build(directory):
    """Compile the double into a directory and return its path."""
    from cuda import pathfinder

    library = Path(directory) / "libcuda.so.1"
    include = pathfinder.find_nvidia_header_directory("cudart")
    flags = ["-std=c11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    named = ["-Wl,-soname,libcuda.so.1", f"-I{include}", str(HERE / "cuda_double.c")]
    subprocess.run([compiler(), *flags, *named, "-o", str(library)], check=True)
    return library


class Double:
    """The tests' side of the double; each method is described at its function in the C file."""

    def __init__(self, library):
        self.library = library
        for name in ("double_calls", "double_live", "double_hazards"):
            getattr(library, name).restype = ctypes.c_ulong
        library.double_used.restype = ctypes.c_size_t
        library.double_call.restype = ctypes.c_char_p

    def configure(self, count=1, *, device=0, capacity=8 * GIB, vmm=True, pools=True):
        self.library.double_configure(count, device, ctypes.c_size_t(capacity), vmm, pools)

    def leave(self, available):
        """Let the device have so much memory that is not in use."""
        self.configure(capacity=self.used() + available)

    @contextlib.contextmanager
    def failing(self, name=None, n=1, code=OUT_OF_MEMORY, times=1):
        """Within it, the n-th call fails and the following up to `times` in all."""
        self.fail(name, n, code, times)
        try:
            yield
        finally:
            self.fail(None, 0, 0, 0)

    def fail(self, name, n, code, times):
        name = None if name is None else name.encode()
        self.library.double_fail(name, ctypes.c_ulong(n), code, ctypes.c_ulong(times))

    def fault_pending(self):
        return bool(self.library.double_fault_pending())

    @contextlib.contextmanager
    def broken(self, code=ILLEGAL_ADDRESS):
        """Within it, every call fails, as with a dead context."""
        self.library.double_break(code)
        try:
            yield
        finally:
            self.library.double_break(0)

    @contextlib.contextmanager
    def deinitialised(self):
        """Within it, the driver has been shut down, as late in the exit of a process."""
        self.library.double_deinitialise(1)
        try:
            yield
        finally:
            self.library.double_deinitialise(0)

    @contextlib.contextmanager
    def held(self, stream):
        """Within it, the stream does not get on with its work unless somebody waits for it."""
        address = ctypes.c_void_p(int(stream))
        self.library.double_hold(address, 1)
        try:
            yield
        finally:
            self.library.double_hold(address, 0)

    def calls(self, name=None):
        return self.library.double_calls(None if name is None else name.encode())

    def log(self, since):
        """The names of the calls after the first `since`."""
        numbers = range(since, self.calls())
        return [self.library.double_call(ctypes.c_ulong(i)).decode() for i in numbers]

    def used(self, device=0):
        """Physical memory in use, in bytes."""
        return self.library.double_used(device)

    def live(self, kind):
        """How many exist: plain, pinned, registered, reserved, mapped, pooled, physical..."""
        return self.library.double_live(kind.encode())

    def everything(self):
        """Counts of all that can leak; equal before and after if nothing did."""
        kinds = "plain pinned registered reserved mapped pooled physical event stream pool".split()
        state = {kind: self.live(kind) for kind in kinds}
        return state | {"used": self.used(), "retained": self.library.double_retained(0)}

    def hazards(self):
        """How often memory was given back that a stream still had to use."""
        return self.library.double_hazards()


def load():
    """Make the double this process's driver."""
    directory = tempfile.mkdtemp(prefix="speechrnt-cuda-")
    library = ctypes.CDLL(str(build(directory)), mode=ctypes.RTLD_GLOBAL)
    return Double(library)
