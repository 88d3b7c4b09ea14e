from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Literal, NoReturn, TypeVar, final

from typing_extensions import Self

__all__ = ["Lease", "ObjectPool", "PoolHealth", "PoolLimits", "PoolStatistics"]

_T = TypeVar("_T")

@dataclass(frozen=True)
class PoolLimits:
    initial_size: int = 0
    soft_size: int | None = None
    max_size: int = 1024
    soft_bytes: int | None = None
    max_bytes: int | None = None
    overflow: Literal["raise", "allocate"] = "raise"
    epoch_s: float = 1.0
    purge_after_s: float = 1.0
    free_after_s: float = 10.0

    def __post_init__(self) -> None: ...
    def sizes(self, object_size: int) -> tuple[int, int, int]: ...

@dataclass(frozen=True)
class PoolStatistics:
    hits: int
    misses: int
    overflows: int
    in_use: int
    idle: int
    peak: int
    reserved_bytes: int
    idle_bytes: int
    purges: int
    kept: int
    max_size: int
    max_bytes: int | None

    @property
    def hit_rate(self) -> float: ...

@dataclass(frozen=True)
class PoolHealth:
    state: Literal["ok", "high", "full", "closed"]
    utilisation: float

@final
class ObjectPool(Generic[_T]):
    def __new__(
        cls,
        factory: Callable[[], _T],
        limits: PoolLimits | None = None,
        *,
        reset: Callable[[_T], object] | None = None,
        validator: Callable[[_T], object] | None = None,
        deleter: Callable[[_T], object] | None = None,
        object_size: int = 0,
    ) -> Self: ...
    def __class_getitem__(cls, item: Any) -> Any: ...
    def acquire(self) -> Lease[_T]: ...
    def trim(self) -> None: ...
    def maintain(self, now: float | None = None) -> None: ...
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    def health(self) -> PoolHealth: ...
    def statistics(self) -> PoolStatistics: ...

@final
class Lease(Generic[_T]):
    def __init__(self, *args: object, **kwargs: object) -> NoReturn: ...
    def __class_getitem__(cls, item: Any) -> Any: ...
    @property
    def value(self) -> _T: ...
    def release(self) -> None: ...
    def __enter__(self) -> _T: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...
