"""A module of another package, which calls the log-mel front end without the GIL."""

from libc.math cimport INFINITY
from speechrnt._mel cimport (
    MEL_FLOAT32,
    MEL_WHISPER,
    MelRows,
    mel_frame_count,
    mel_frames,
    mel_normalize,
)


def log_mel(bytes pcm, int n_mels):
    """Return ``n_mels`` rows of float32, as bytes, for the float32 samples in ``pcm``."""
    cdef Py_ssize_t n_samples = len(pcm) // sizeof(float)
    cdef Py_ssize_t n_frames = mel_frame_count(n_samples)
    cdef bytearray mel = bytearray(n_mels * n_frames * sizeof(float))
    cdef MelRows rows = MelRows(<char *> mel, n_frames * sizeof(float), MEL_FLOAT32)
    cdef const char *samples = pcm
    cdef float maximum = -INFINITY
    with nogil:
        mel_frames(samples, n_samples, 0, n_frames, n_mels, MEL_WHISPER, &rows, &maximum)
        mel_normalize(&rows, &rows, n_mels, n_frames, MEL_WHISPER, maximum)
    return bytes(mel)
