"""Voice activity detection: how likely each 32 ms of a signal holds speech.

The network is Silero VAD (https://github.com/snakers4/silero-vad, MIT), reduced to what 16 kHz
audio needs by tools/simplify_vad.py and run by ONNX Runtime. One session serves the whole process;
what belongs to a stream is its recurrent state, 1.3 KiB.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FRAME_SAMPLES", "VoiceActivityDetector"]

FRAME_SAMPLES = 512
"""Samples of a frame, at 16 kHz."""

_CONTEXT_SAMPLES = 64
_MODEL = Path(__file__).parent / "assets" / "silero_vad" / "silero_vad_16k.onnx"

_session_lock = threading.Lock()


@cache
def _load_session() -> Any:
    # From 1.29 on it sends usage data to its makers, by a thread of its own, which also keeps
    # forked children from exiting. It looks at this when it is imported.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Streams run side by side, each in its caller's thread.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    return onnxruntime.InferenceSession(
        _MODEL.read_bytes(), options, providers=["CPUExecutionProvider"]
    )


def _session() -> Any:
    with _session_lock:  # two threads in `cache` would both load
        return _load_session()


class VoiceActivityDetector:
    """The detector's state for one stream.

    Used by one thread at a time; any number of detectors work side by side. Equal samples give
    equal probabilities, to the bit, however they were cut into calls.
    """

    __slots__ = ("_c", "_context", "_h", "_run")

    def __init__(self) -> None:
        self._run = _session().run
        self._h = np.zeros((1, 1, 128), dtype=np.float32)
        self._c = np.zeros((1, 1, 128), dtype=np.float32)
        # The network sees the end of the frame before, too.
        self._context = np.zeros(_CONTEXT_SAMPLES, dtype=np.float32)

    def probabilities(self, samples: NDArray[np.float32]) -> list[float]:
        """Return the probability of speech in each of the next frames.

        A frame costs a quarter in a call of 16 of what it does alone.

        Parameters
        ----------
        samples : (n,) ndarray of float32
            16 kHz mono. If `n` is no multiple of `FRAME_SAMPLES`, the stream ends with it, and the
            last frame is filled up with silence.
        """
        if not len(samples):
            return []
        n_frames = -(-len(samples) // FRAME_SAMPLES)
        if not n_frames:
            return []
        inputs = np.zeros((n_frames, _CONTEXT_SAMPLES + FRAME_SAMPLES), dtype=np.float32)
        frames = inputs[:, _CONTEXT_SAMPLES:]
        n_whole = len(samples) // FRAME_SAMPLES
        frames[:n_whole] = samples[: n_whole * FRAME_SAMPLES].reshape(-1, FRAME_SAMPLES)
        rest = samples[n_whole * FRAME_SAMPLES :]
        frames[n_whole:, : len(rest)] = rest
        inputs[0, :_CONTEXT_SAMPLES] = self._context
        inputs[1:, :_CONTEXT_SAMPLES] = frames[:-1, -_CONTEXT_SAMPLES:]
        self._context = frames[-1, -_CONTEXT_SAMPLES:].copy()
        state = {"input": inputs, "h": self._h, "c": self._c}
        probabilities, self._h, self._c = self._run(None, state)
        return [float(probability) for probability in probabilities]
