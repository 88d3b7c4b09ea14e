"""Calls in a thread of their own that ends with them.

CTranslate2 on the CPU divides its work with OpenMP, and in each step of the decoder its threads
wait for each other dozens of times. The OpenMP runtime in its wheels (GNU's libgomp) has them do so
in a loop for some milliseconds, which is fast. But it keeps the helpers of each thread that ever
had some, and while there are more of all these than the process has cores, a thread turns a hundred
times and then sleeps. A model divides work where it is loaded, and then in its workers. So with as
many threads as cores, the helpers that loading it has left behind make every later call slow: on
two cores, the decoder of a model in the shape of tiny took twice as long with them, and longer than
on one.

The helpers of a thread end with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["call_in_passing_thread"]

T = TypeVar("T")


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
