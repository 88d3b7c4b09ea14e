"""What a pool of GPU memory tells about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Defragmentation", "GpuMemoryHealth", "GpuMemoryStatistics"]

FRAGMENTED = 0.25  # from where on fragmentation may be worth a defragmentation
MUCH_FREE = 0.1  # of what is reserved
FULL = 0.9  # of the limit


def mib(size: int) -> str:
    """Write a number of bytes."""
    return f"{size / 2**20:.1f} MiB"


@dataclass(frozen=True)
class GpuMemoryStatistics:
    """Numbers of a pool, all read at one moment. Sizes are in bytes, counts since it was made.

    docs/gpu-memory.md says what they are called in PyTorch, RMM, CuPy and CUDA.

    Attributes
    ----------
    allocations, frees : int
    in_use, requested : int
        Live blocks: what they take in the pool, and what was asked for.
    pending : int
        Freed, but a stream may still use it.
    reserved : int
        Taken from the device: `in_use`, `pending` and `free`.
    limit : int
        Bound on `reserved`.
    free : int
        What an allocation may have.
    peak, peak_reserved : int
        The largest `in_use` and `reserved` so far.
    live, free_blocks : int
        Numbers of blocks in use and of free ones, which are the holes.
    largest_free : int
        The largest block that can be allocated without growing or moving chunks.
    pinned_free : int
        Free, but in chunks that are partly in use: it can be neither moved nor given back.
    chunks : int
        Physical chunks that are mapped, or segments.
    splits, merges : int
        Blocks that were divided, and that were joined with a neighbour.
    grows, trims : int
        Times that memory was taken from the device, and given back.
    defragmentations, remapped_chunks : int
        Times that free chunks were moved together, and how many were moved in all.
    retries : int
        Times that a request had to wait for streams, or for CTranslate2's memory to be trimmed.
    ooms, fragmented_ooms : int
        Requests that failed, and those of them that failed although as much was free.
    by_size : dict of int to int
        Allocations by size: keys are powers of two, each standing for sizes up to twice itself.
    backing : {"vmm", "segments"}
    error : int
        The code of the driver that poisoned the pool; 0 otherwise.
    """

    allocations: int
    frees: int
    in_use: int
    requested: int
    pending: int
    reserved: int
    limit: int
    free: int
    peak: int
    peak_reserved: int
    live: int
    free_blocks: int
    largest_free: int
    pinned_free: int
    chunks: int
    splits: int
    merges: int
    grows: int
    trims: int
    defragmentations: int
    remapped_chunks: int
    retries: int
    ooms: int
    fragmented_ooms: int
    by_size: dict[int, int]
    backing: str
    error: int

    @classmethod
    def of(cls, native: Mapping[str, int], sizes: list[int]) -> GpuMemoryStatistics:
        """Bring what the native pool counts into this form."""
        names = {"blocks": "live"}
        counts = {
            names.get(name, name.removesuffix("_bytes")): value
            for name, value in native.items()
            if name not in ("by_size", "vmm")
        }
        return cls(
            **counts,
            by_size={1 << i: count for i, count in enumerate(sizes) if count},
            backing="vmm" if native["vmm"] else "segments",
        )

    @property
    def is_fragmented(self) -> bool:
        """Whether moving free chunks together may be worthwhile."""
        return self.fragmentation > FRAGMENTED and self.free > MUCH_FREE * self.reserved

    def describe(self) -> str:
        """Write in one line what is taken and what is free."""
        return (
            f"{mib(self.in_use)} in use, {mib(self.pending)} pending, {mib(self.free)} free in "
            f"{self.free_blocks} block(s) of {mib(self.largest_free)} at most"
        )

    def health(self, obstacle: str | None) -> GpuMemoryHealth:
        """Judge these numbers; `obstacle` is why the pool lends nothing, if it does not."""
        problems = [] if obstacle is None else [obstacle]
        utilisation = (self.in_use + self.pending) / self.limit
        if utilisation >= FULL:
            problems.append(f"{utilisation:.0%} of the limit of {mib(self.limit)} is in use")
        if self.is_fragmented or (self.fragmentation > FRAGMENTED and self.fragmented_ooms):
            problems.append(
                f"{self.fragmentation:.0%} of the free {mib(self.free)} is outside the largest "
                "free block"
            )
        return GpuMemoryHealth(not problems, utilisation, self.fragmentation, tuple(problems))

    @property
    def utilisation(self) -> float:
        """`in_use` as a part of `reserved`; 1 if nothing is reserved."""
        return self.in_use / self.reserved if self.reserved else 1.0

    @property
    def fragmentation(self) -> float:
        """What part of the free memory is not in the largest free block; 0 if nothing is free.

        Many small holes give a value near 1 and may cost little: compare `free_blocks`, and
        `pinned_free` with `reserved`.
        """
        return 1.0 - self.largest_free / self.free if self.free else 0.0

    @property
    def internal_waste(self) -> float:
        """What part of `in_use` was not asked for."""
        return 1.0 - self.requested / self.in_use if self.in_use else 0.0


@dataclass(frozen=True)
class GpuMemoryHealth:
    """Whether a pool is in order.

    Attributes
    ----------
    healthy : bool
    utilisation : float
        In use and pending, as a part of the limit.
    fragmentation : float
    problems : tuple of str
        What is not in order, a sentence each.
    """

    healthy: bool
    utilisation: float
    fragmentation: float
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Defragmentation:
    """What `GpuMemoryPool.defragment` did.

    Attributes
    ----------
    remapped_chunks : int
        Free chunks that were moved.
    largest_free_before, largest_free_after : int
        The largest free block, in bytes.
    """

    remapped_chunks: int
    largest_free_before: int
    largest_free_after: int
