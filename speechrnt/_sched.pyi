from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, Literal, TypeVar

from speechrnt._sched_types import Priority, SchedulerHealth, SchedulerStatistics

__all__ = ["Priority", "Scheduler"]

_T = TypeVar("_T")

class Scheduler(Executor):
    def __init__(
        self,
        workers: int | None = None,
        *,
        affinity: Literal["auto"] | Iterable[int] | None = None,
        reserved: int = 0,
        min_workers: int | None = None,
        max_workers: int | None = None,
        max_queued: int = 65536,
        stealing: bool = True,
        stall_after: float = 10.0,
        at_exit: Literal["drain", "cancel"] = "drain",
        name: str = "speechrnt",
    ) -> None: ...
    def submit(  # type: ignore[override]  # keywords beside ParamSpec cannot be written
        self,
        fn: Callable[..., _T],
        /,
        *args: Any,
        priority: Priority = ...,
        delay: float | None = None,
        deadline: float | None = None,
        **kwargs: Any,
    ) -> Future[_T]: ...
    def submit_nowait(
        self,
        fn: Callable[..., object],
        /,
        *args: Any,
        priority: Priority = ...,
        delay: float | None = None,
        deadline: float | None = None,
        **kwargs: Any,
    ) -> None: ...
    def submit_many(
        self,
        fn: Callable[..., _T],
        arguments: Iterable[Iterable[Any]],
        /,
        *,
        priority: Priority = ...,
    ) -> list[Future[_T]]: ...
    def map(
        self,
        fn: Callable[..., _T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        priority: Priority = ...,
    ) -> Iterator[_T]: ...
    def resize(self, workers: int) -> None: ...
    def drain(self, timeout: float | None = None) -> None: ...
    def shutdown(
        self, wait: bool = True, *, cancel_futures: bool = False, timeout: float | None = None
    ) -> None: ...
    def is_worker(self) -> bool: ...
    def statistics(self) -> SchedulerStatistics: ...
    def health(self) -> SchedulerHealth: ...
