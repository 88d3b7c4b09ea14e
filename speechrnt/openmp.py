"""How CTranslate2's threads wait for each other on the CPU.

CTranslate2 divides its work with OpenMP, and in each step of the decoder its threads wait for each
other dozens of times. The runtime in its wheels, GNU's libgomp, has them look again and again, and
sleep if that was in vain. How often they look decides on the time of a step:

- A hundred times, while there are more threads than cores: too short, they always sleep. It counts
  the helpers of each thread that ever had some; and a model divides work where it is loaded, and
  then in its workers. So with a thread for each core, what loading has left behind makes all later
  calls slow.
- Three hundred thousand times otherwise, some milliseconds: very fast, until something else wants
  the cores. Then those who look hold up those they are waiting for.

`perf/bench_threads.py` measures it: with five hundred looks and nothing left behind, the decoder of
a model in the shape of tiny takes less than half the time on two idle cores, and a quarter to a
third more where a neighbour keeps one of them busy. So this module sets that number when libgomp is
loaded, and models are loaded in threads that end, as the helpers of a thread end with it. Where
libgomp was there before us, or a number was given in the environment (``GOMP_SPINCOUNT``,
``OMP_WAIT_POLICY``), it stays as it is.

To be imported before CTranslate2.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["call_in_passing_thread", "load"]

T = TypeVar("T")

_SPIN_COUNT = "GOMP_SPINCOUNT"
_WAIT_POLICY = "OMP_WAIT_POLICY"

# A look is a load and, on x86, a pause of 15 to 50 ns; elsewhere it takes a nanosecond or two.
_LOOKS = 500 if platform.machine() in ("x86_64", "AMD64") else 10_000


def _bound_waits() -> bool:
    """Load the libgomp of CTranslate2's wheel with our number of looks.

    Returns
    -------
    bool
        Whether the number is known to be this one, or the user's.
    """
    if _SPIN_COUNT in os.environ or _WAIT_POLICY in os.environ:
        return True
    library = _libgomp()
    if library is None or _is_loaded(library):
        return False
    # It is read once, when the library is loaded, and is not for other programs.
    os.environ[_SPIN_COUNT] = str(_LOOKS)
    try:
        ctypes.CDLL(str(library))
    except OSError:
        return False
    finally:
        del os.environ[_SPIN_COUNT]
    return True


def _libgomp() -> Path | None:
    """Return the library that CTranslate2's wheel brings along, if it does."""
    found = importlib.util.find_spec("ctranslate2") if sys.platform == "linux" else None
    if found is None or found.origin is None:
        return None
    libraries = Path(found.origin).parent.with_suffix(".libs").glob("libgomp-*.so*")
    return min(libraries, default=None)


def _is_loaded(library: Path) -> bool:
    try:
        ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return False
    return True


_waits_are_bounded = _bound_waits()


def load(function: Callable[[], T]) -> T:
    """Call a function that loads a model, so that it leaves no helpers behind if that is better.

    Raises
    ------
    BaseException
        What the function raises, or what interrupts this thread meanwhile.
    """
    return call_in_passing_thread(function) if _waits_are_bounded else function()


def call_in_passing_thread(function: Callable[[], T]) -> T:
    """Call a function in a new thread, or in this one if there can be none; return what it does.

    An interrupt meanwhile is raised when the call is over, as it would be had this thread called
    CTranslate2 itself: nothing goes on behind the caller's back.

    Raises
    ------
    BaseException
        What the function raises, or what interrupted this thread meanwhile.
    """
    returned: list[T] = []
    raised: list[BaseException] = []
    interrupts: list[BaseException] = []
    begun = threading.Lock()
    is_over = threading.Event()

    def call() -> None:
        if not begun.acquire(blocking=False):
            return
        try:
            returned.append(function())
        except BaseException as error:
            raised.append(error)
        finally:
            is_over.set()

    thread = threading.Thread(target=call, name="speechrnt-load", daemon=False)
    try:
        thread.start()
    except RuntimeError:  # no more threads, or the interpreter is exiting
        return function()
    except BaseException as interrupt:
        if begun.acquire(blocking=False):
            raise
        interrupts.append(interrupt)
    # Not `join`: interrupted, those before Python 3.13 take a thread for ended that goes on.
    while not is_over.is_set():
        try:
            is_over.wait()
        except BaseException as interrupt:
            interrupts.append(interrupt)
    thread.join()
    if interrupts:
        # More urgent than whatever came of the call.
        raised[:] = interrupts[:1]
        interrupts.clear()
    if raised:
        try:
            raise raised[0]
        finally:
            raised.clear()  # or else the exception would hold itself
    return returned[0]
