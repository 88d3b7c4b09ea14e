"""Whether a model's weights are in memory: freed on request or when idle, loaded again when used.

CTranslate2's `unload_model` does nothing while a call is under way, without saying so, and counts a
call as under way for a moment after its result is there. So calls are counted here: the weights
are freed between calls, and that they are is verified.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any

from . import openmp
from .errors import ModelError, OptionError

__all__ = ["Residency"]

# How long CTranslate2 may take to notice that a call is over.
_SETTLING_S = 5.0
_POLL_S = 0.005

# How often the idle watch looks whether the model still exists.
_WATCH_S = 1.0

logger = logging.getLogger("speechrnt")


class Residency:
    """Who uses a model, and whether it is loaded; a context manager around each call.

    Safe to use from any number of threads.

    Parameters
    ----------
    whisper
        The CTranslate2 model.
    name
        What to call it in messages.
    calls
        Entered around what the idle watch asks of CTranslate2, which must not be under way when
        the interpreter exits.
    """

    def __init__(
        self, whisper: Any, name: str, calls: AbstractContextManager[None] | None = None
    ) -> None:
        self._whisper = whisper
        self._calls = nullcontext() if calls is None else calls
        self._name = name
        self._changed = threading.Condition()
        self._uses = 0
        self._unloading = 0  # those who wait until nobody uses it
        self._is_loaded = True
        self._last_use = time.monotonic()
        self._idle_s: float | None = None
        self._idle_to_cpu = False
        self._keeper: threading.Thread | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are where they are used."""
        return self._is_loaded

    def __enter__(self) -> None:
        with self._changed:
            # Or else several who take turns would never leave a gap.
            self._changed.wait_for(lambda: not self._unloading)
            if not self._is_loaded:
                self._load()
            self._uses += 1

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._uses -= 1
            if not self._uses:
                self._last_use = time.monotonic()
                self._changed.notify_all()

    def load(self) -> None:
        """Bring the weights back, if they are not there."""
        with self._changed:
            if not self._is_loaded:
                self._load()

    def unload(self, to_cpu: bool = False, timeout: float | None = None) -> None:
        """Free the weights, with `to_cpu` to the CPU's memory, when the calls under way are over.

        Calls that are made meanwhile wait.

        Raises
        ------
        TimeoutError
            If some still were after `timeout` seconds. Nothing has changed.
        ModelError
            If CTranslate2 does not let go of the weights.
        OptionError
            If they are to be kept in the CPU's memory, and are used there.
        """
        self._check_to_cpu(to_cpu)
        with self._changed:
            self._unloading += 1
            try:
                if not self._changed.wait_for(lambda: not self._uses, timeout):
                    raise TimeoutError(
                        f"{self._name}: still in use after {timeout} s; not unloaded"
                    )
                self._unload(to_cpu)
            finally:
                self._unloading -= 1
                self._changed.notify_all()

    def unload_when_idle(self, seconds: float | None, to_cpu: bool = False) -> None:
        """Free the weights whenever no call was made for so many seconds; None stops that."""
        if seconds is not None and (
            not isinstance(seconds, Real) or isinstance(seconds, bool) or not float(seconds) >= 0
        ):
            raise OptionError(f"seconds: must be a number from 0, or None, not {seconds!r}")
        self._check_to_cpu(to_cpu)
        with self._changed:
            self._idle_s = None if seconds is None else float(seconds)
            self._idle_to_cpu = to_cpu
            self._last_use = time.monotonic()
            self._changed.notify_all()
            if seconds is not None and self._keeper is None:
                self._keeper = threading.Thread(
                    target=_keep, args=(weakref.ref(self),), name="speechrnt-idle", daemon=True
                )
                self._keeper.start()

    def _check_to_cpu(self, to_cpu: bool) -> None:
        if to_cpu and self._whisper.device == "cpu":
            raise OptionError("to_cpu: the model runs on the CPU; unloading frees its memory there")

    def _load(self) -> None:
        try:
            if self._whisper.device == "cpu":
                openmp.load(self._whisper.load_model)
            else:
                self._whisper.load_model()
        finally:
            # Also when an interrupt has come meanwhile.
            self._is_loaded = self._whisper.model_is_loaded
        if not self._is_loaded:
            raise ModelError(f"{self._name}: CTranslate2 did not load the model again")

    def _unload(self, to_cpu: bool) -> None:
        deadline = time.monotonic() + _SETTLING_S
        while self._is_loaded:
            self._whisper.unload_model(to_cpu)
            if not self._whisper.model_is_loaded:
                self._is_loaded = False
            elif time.monotonic() > deadline:
                raise ModelError(
                    f"{self._name}: CTranslate2 keeps the model, as it is used by somebody who "
                    "calls CTranslate2 directly"
                )
            else:
                time.sleep(_POLL_S)

    def _wait_or_unload(self) -> bool:
        """Do one step of the idle watch; tell whether it goes on."""
        with self._changed:
            if self._idle_s is None:
                self._keeper = None
                return False
            left = self._last_use + self._idle_s - time.monotonic()
            if self._uses or not self._is_loaded:
                left = _WATCH_S
            elif left <= 0:
                try:
                    with self._calls:
                        self._unload(self._idle_to_cpu)
                    return True
                except ModelError as error:
                    logger.warning("not unloaded though idle: %s", error)
                    left = _WATCH_S
            # Not for longer: the model may be dropped meanwhile, which nobody tells.
            self._changed.wait(min(left, _WATCH_S))
            return True


def _keep(reference: weakref.ref[Residency]) -> None:
    while True:
        residency = reference()
        if residency is None or not residency._wait_or_unload():
            return
        del residency
