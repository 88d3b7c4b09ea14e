"""Checks of what a scheduler is told."""

import operator
import os
import sys
from collections.abc import Iterable
from typing import SupportsFloat, SupportsIndex

from .errors import OptionError

__all__ = ["checked_count", "checked_seconds", "chosen_cores", "default_count"]

LONGEST_S = 1e9  # 31 years, which clocks that count nanoseconds in 64 bits can still add


def checked_count(name: str, value: SupportsIndex, low: int, high: int) -> int:
    """Return `value` as an integer from `low` to `high`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise OptionError(f"{name} must be an integer, not {value!r}") from None
    if not low <= number <= high:
        raise OptionError(f"{name} must be from {low} to {high}, not {number}")
    return number


def checked_seconds(name: str, value: SupportsFloat, zero_allowed: bool) -> float:
    """Return `value` as a float that all clocks can count."""
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        raise OptionError(f"{name} must be a number of seconds, not {value!r}") from None
    if not 0 <= seconds <= LONGEST_S or (seconds == 0 and not zero_allowed):
        raise OptionError(f"{name} must be a positive number of seconds up to 1e9, not {value!r}")
    return seconds


def _allowed_cores() -> list[int] | None:
    """Return the CPUs that the calling thread may use, or None where that is unknown."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def default_count() -> int:
    """Return how many CPUs this process may use."""
    cores = _allowed_cores()
    return (os.cpu_count() or 1) if cores is None else len(cores)


def chosen_cores(
    affinity: str | Iterable[int] | None, n_workers: int
) -> tuple[list[int] | None, str]:
    """Return the CPU of each worker, or None, and why there are none."""
    if affinity is None:
        return None, ""
    allowed = _allowed_cores()
    cores: list[int] | None
    if isinstance(affinity, str):
        if affinity != "auto":
            raise OptionError(f"affinity must be None, 'auto' or CPU numbers, not {affinity!r}")
        cores = allowed
    else:
        try:
            cores = [operator.index(core) for core in affinity]
        except TypeError:
            raise OptionError(
                f"affinity must be None, 'auto' or CPU numbers, not {affinity!r}"
            ) from None
        if not cores:
            raise OptionError("affinity must name at least one CPU")
        if allowed is not None and not set(cores) <= set(allowed):
            wrong = sorted(set(cores) - set(allowed))
            raise OptionError(
                f"affinity names CPUs {wrong}, but this process may only use {allowed}"
            )
    if allowed is None or cores is None:
        return None, f"threads cannot be bound to CPUs on {sys.platform}"
    return [cores[i % len(cores)] for i in range(n_workers)], ""
