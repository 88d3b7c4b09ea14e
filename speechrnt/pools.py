"""Pools: audio buffers, transcription results, and any Python objects that are costly to make."""

from ._audio_pool import AudioBuffer, AudioBufferPool
from ._pools import Lease, ObjectPool, PoolHealth, PoolLimits, PoolStatistics
from ._result_pool import ResultSegment, TranscriptionResult, TranscriptionResultPool
from .maintenance import Maintenance, maintain_on

__all__ = [
    "AudioBuffer",
    "AudioBufferPool",
    "Lease",
    "Maintenance",
    "ObjectPool",
    "PoolHealth",
    "PoolLimits",
    "PoolStatistics",
    "ResultSegment",
    "TranscriptionResult",
    "TranscriptionResultPool",
    "maintain_on",
]
