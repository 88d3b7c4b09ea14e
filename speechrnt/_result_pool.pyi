from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple, NoReturn, final

from typing_extensions import Self

from ._pools import PoolHealth, PoolLimits, PoolStatistics

__all__ = ["ResultSegment", "TranscriptionResult", "TranscriptionResultPool"]

class ResultSegment(NamedTuple):
    start: float
    end: float
    first_token: int
    n_tokens: int
    avg_logprob: float = ...
    no_speech_prob: float = ...
    compression_ratio: float = ...
    seek: int = ...

@final
class TranscriptionResultPool:
    def __new__(cls, limits: PoolLimits | None = None) -> Self: ...
    def acquire(self) -> TranscriptionResult: ...
    def trim(self) -> None: ...
    def maintain(self, now: float | None = None) -> None: ...
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    def health(self) -> PoolHealth: ...
    def statistics(self) -> PoolStatistics: ...

@final
class TranscriptionResult:
    def __init__(self, *args: object, **kwargs: object) -> NoReturn: ...
    text: str
    is_final: bool
    span: tuple[float, float]
    timings: tuple[float, float]
    language: str | None
    confidence: float | None
    @property
    def tokens(self) -> list[int]: ...
    @tokens.setter
    def tokens(self, tokens: Iterable[int]) -> None: ...
    @property
    def segments(self) -> list[ResultSegment]: ...
    def append(
        self,
        text: str,
        tokens: Iterable[int],
        start: float,
        end: float,
        *,
        seek: int = 0,
        avg_logprob: float = ...,
        no_speech_prob: float = ...,
        compression_ratio: float = ...,
    ) -> None: ...
    def add_segment(
        self,
        start: float,
        end: float,
        first_token: int = 0,
        n_tokens: int = 0,
        *,
        avg_logprob: float = ...,
        no_speech_prob: float = ...,
    ) -> None: ...
    def release(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...
