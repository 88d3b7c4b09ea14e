from collections.abc import Callable
from typing import Any, final

from numpy.typing import NDArray

from ._sched import Scheduler

__all__ = ["compute", "spawn"]

@final
class MelTask: ...

def compute(pcm: NDArray[Any], out: NDArray[Any], first: int = 0) -> float: ...
def spawn(
    scheduler: Scheduler,
    priority: int,
    pcm: NDArray[Any],
    out: NDArray[Any],
    done: Callable[[float | None, float], object],
) -> None: ...
