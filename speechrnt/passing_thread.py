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

    An interrupt is raised at once while the call goes on; the interpreter's exit waits for it.

    Raises
    ------
    BaseException
        What the function raises.
    """
    returned: list[T] = []
    raised: list[BaseException] = []

    def call() -> None:
        try:
            returned.append(function())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call, name="speechrnt-load", daemon=False)
    try:
        thread.start()
    except RuntimeError:  # no more threads, or the interpreter is exiting
        return function()
    thread.join()
    if raised:
        try:
            raise raised[0]
        finally:
            raised.clear()  # or else the exception would hold itself
    return returned[0]
