"""Whisper's log-mel spectrogram, computed without the GIL.

Input is mono float32 PCM at 16 kHz. A frame is 400 samples under a periodic Hann window, one every
160 samples (10 ms); frame ``i`` is centred on sample ``160 * i``, and a signal of ``n`` samples has
``n // 160 + 1`` frames. Before its first sample a signal is mirrored, after its last it is silent,
which is what faster-whisper's padding amounts to. The power spectrum goes through 80 or 128
triangular filters on Slaney's mel scale from 0 to 8 kHz, then ``log10``, with 1e-10 as the smallest
power. Whisper's normalization raises everything to at least 8 below the maximum and maps ``x`` to
``(x + 4) / 4``.

Frames do not depend on their neighbours: whole signals, parts of them and pushes to an
`IncrementalLogMel` give the same bits.

Samples are not checked: one that is not finite, or whose square overflows, makes the frames that
cover it NaN, and maxima ignore NaN. Callers who cannot vouch for their samples validate them first.

The best instruction set that the CPU has is chosen at import. The environment variable
``SPEECHRNT_ISA``, read then, forces a lower one, such as ``avx2`` or ``sse2``; results differ
between instruction sets by rounding only. Importing raises `OptionError` for one that is not there.
"""

cimport cython
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_STRIDES, PyBuffer_Release, PyObject_GetBuffer
from libc.math cimport INFINITY
from libc.string cimport memcpy, memmove

import os

import numpy as np

from speechrnt.errors import InvalidAudioError, OptionError

__all__ = [
    "IncrementalLogMel",
    "cast",
    "frame_count",
    "isa",
    "log10_mel",
    "log_mel",
    "mel_filters",
    "normalize",
]


cdef extern from "_mel_kernel.h" namespace "speechrnt_mel" nogil:
    const int kHop
    const int kReach
    const int kIsas

    struct Signal:
        const float *head
        Py_ssize_t head_start
        const char *pcm
        Py_ssize_t pcm_start
        Py_ssize_t pcm_end

    struct Rows:
        char *data
        Py_ssize_t stride
        bint half

    struct Affine:
        float scale
        float offset

    const int kBins

    struct MelBank:
        const int *first
        const int *width
        const float *weights

    struct Tables:
        MelBank bank80
        MelBank bank128

    struct Isa:
        const char *name
        bint available
        void (*normalize)(
            const Rows &source, const Rows &out, int channels, Py_ssize_t frames, Affine stored,
            float floor,
        ) noexcept nogil
        float (*maximum)(const Rows &source, int channels, Py_ssize_t frames) noexcept nogil

    const Tables tables
    const Isa[] isas
    void fill_tables() noexcept
    float compute(
        const Isa &isa, const Signal &signal, Py_ssize_t first, Py_ssize_t count,
        const MelBank &bank, Affine stored, const Rows &out,
    ) noexcept


cdef const Isa *chosen_isa


cdef const Isa *choose_isa(object wanted) except NULL:
    available = []
    for i in range(kIsas):
        if isas[i].available:
            name = isas[i].name.decode()
            if wanted is None or wanted == name:
                return &isas[i]
            available.append(name)
    raise OptionError(
        f"SPEECHRNT_ISA={wanted!r} is not available here; choose one of: {', '.join(available)}"
    )


fill_tables()
chosen_isa = choose_isa(os.environ.get("SPEECHRNT_ISA") or None)


cdef inline const MelBank *bank_of(int n_mels) noexcept nogil:
    return &tables.bank80 if n_mels == 80 else &tables.bank128


cdef inline Affine affine_of(MelScale scale) noexcept nogil:
    cdef Affine affine
    affine.scale = 1 if scale == MEL_LOG10 else 0.25
    affine.offset = 0 if scale == MEL_LOG10 else 1
    return affine


cdef inline Rows kernel_rows(const MelRows *rows) noexcept nogil:
    cdef Rows result
    result.data = <char *>rows.data
    result.stride = rows.stride
    result.half = rows.layout == MEL_FLOAT16
    return result


cdef Py_ssize_t mel_frame_count(Py_ssize_t n_samples) noexcept nogil:
    return n_samples // kHop + 1


cdef void mel_frames(
    const void *pcm, Py_ssize_t n_samples, Py_ssize_t first, Py_ssize_t count, int n_mels,
    MelScale scale, const MelRows *out, float *maximum,
) noexcept nogil:
    cdef Signal signal
    signal.head = NULL
    signal.head_start = 0
    signal.pcm = <const char *>pcm
    signal.pcm_start = 0
    signal.pcm_end = n_samples
    cdef float largest = compute(
        chosen_isa[0], signal, first, count, bank_of(n_mels)[0], affine_of(scale), kernel_rows(out)
    )
    maximum[0] = max(maximum[0], largest)


cdef void mel_normalize(
    const MelRows *source, const MelRows *out, int n_mels, Py_ssize_t n_frames, MelScale scale,
    float maximum,
) noexcept nogil:
    cdef Affine affine
    cdef float floor = maximum - 8
    affine.scale = 0.25 if scale == MEL_LOG10 else 1
    affine.offset = 1 if scale == MEL_LOG10 else 0
    chosen_isa.normalize(
        kernel_rows(source), kernel_rows(out), n_mels, n_frames, affine, (floor + 4) / 4
    )


cdef void mel_stream_reset(MelStream *stream, int n_mels) noexcept nogil:
    stream.samples = 0
    stream.frames = 0
    stream.n_mels = n_mels


cdef inline Py_ssize_t first_needed(Py_ssize_t next_frame) noexcept nogil:
    """First sample that frames from `next_frame` on use; frames 0 and 1 mirror the beginning."""
    return next_frame * kHop - kReach if next_frame > 1 else 0


cdef Py_ssize_t mel_stream_ready(const MelStream *stream, Py_ssize_t n_samples) noexcept nogil:
    cdef Py_ssize_t samples = stream.samples + n_samples
    if samples < kReach:
        return 0
    return (samples - kReach) // kHop + 1 - stream.frames


cdef Py_ssize_t mel_stream_remaining(const MelStream *stream) noexcept nogil:
    return mel_frame_count(stream.samples) - stream.frames


cdef void stream_frames(
    MelStream *stream, const void *pcm, Py_ssize_t n_samples, Py_ssize_t count, MelScale scale,
    const MelRows *out, float *maximum,
) noexcept nogil:
    """Write the stream's next `count` frames, given the samples that follow its tail."""
    cdef Signal signal
    signal.head = stream.tail
    signal.head_start = first_needed(stream.frames)
    signal.pcm = <const char *>pcm
    signal.pcm_start = stream.samples
    signal.pcm_end = stream.samples + n_samples
    cdef float largest = compute(
        chosen_isa[0], signal, stream.frames, count, bank_of(stream.n_mels)[0], affine_of(scale),
        kernel_rows(out),
    )
    maximum[0] = max(maximum[0], largest)


cdef Py_ssize_t mel_stream_push(
    MelStream *stream, const void *pcm, Py_ssize_t n_samples, MelScale scale, const MelRows *out,
    float *maximum,
) noexcept nogil:
    if n_samples == 0:
        return 0
    cdef Py_ssize_t count = mel_stream_ready(stream, n_samples)
    if count:
        stream_frames(stream, pcm, n_samples, count, scale, out, maximum)

    # Fewer than 400 samples stay: had frame `next_frame` all of its own, it would be final.
    cdef Py_ssize_t next_frame = stream.frames + count
    cdef Py_ssize_t dropped = first_needed(next_frame) - first_needed(stream.frames)
    cdef Py_ssize_t tail = stream.samples - first_needed(stream.frames)
    cdef Py_ssize_t kept = max(tail - dropped, 0)
    cdef Py_ssize_t skipped = max(dropped - tail, 0)
    memmove(stream.tail, stream.tail + (tail - kept), kept * sizeof(float))
    memcpy(
        stream.tail + kept,
        <const char *>pcm + skipped * sizeof(float),
        (n_samples - skipped) * sizeof(float),
    )
    stream.samples += n_samples
    stream.frames = next_frame
    return count


cdef Py_ssize_t mel_stream_finish(
    MelStream *stream, MelScale scale, const MelRows *out, float *maximum,
) noexcept nogil:
    cdef Py_ssize_t count = mel_stream_remaining(stream)
    stream_frames(stream, NULL, 0, count, scale, out, maximum)
    stream.frames += count
    return count


cdef int check_n_mels(int n_mels) except -1:
    if n_mels != 80 and n_mels != 128:
        raise OptionError(f"n_mels must be 80 or 128, not {n_mels}")
    return 0


cdef inline bint holds(const Py_buffer *view, char code) noexcept:
    """Whether the elements are of struct type `code` in the byte order of all our platforms."""
    cdef const char *format = view.format
    if format[0] in b"@=<^":
        format += 1
    return format[0] == code and format[1] == 0


cdef object dtype_of(object array, const Py_buffer *view):
    """What error messages call the element type of `array`."""
    return getattr(array, "dtype", f"format {view.format.decode()!r}")


cdef tuple shape_of(const Py_buffer *view):
    return tuple([view.shape[i] for i in range(view.ndim)])


cdef int acquire_pcm(object pcm, Py_buffer *view) except -1:
    """Fill `view` with contiguous one-dimensional float32 samples, a copy of them if need be."""
    try:
        PyObject_GetBuffer(pcm, view, PyBUF_STRIDES | PyBUF_FORMAT)
    except (BufferError, TypeError, ValueError) as error:
        raise InvalidAudioError(
            f"pcm must be a float32 array, not {type(pcm).__name__}"
        ) from error
    try:
        if not holds(view, b"f"):
            raise InvalidAudioError(f"pcm must be float32, not {dtype_of(pcm, view)}")
        if view.ndim != 1:
            raise InvalidAudioError(
                f"pcm must have one dimension (mono), not the shape {shape_of(view)}"
            )
        if view.shape[0] < 2 or view.strides[0] == view.itemsize:
            return 0
    except InvalidAudioError:
        PyBuffer_Release(view)
        raise
    PyBuffer_Release(view)
    PyObject_GetBuffer(np.ascontiguousarray(pcm), view, PyBUF_STRIDES | PyBUF_FORMAT)
    return 0


cdef bint acquire_rows(object array, str name, Py_buffer *view, MelRows *rows) except -1:
    """Fill `view` and `rows` with those of `array`; return whether its rows are contiguous."""
    try:
        PyObject_GetBuffer(array, view, PyBUF_STRIDES | PyBUF_FORMAT)
    except (BufferError, TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be a float32 or float16 array, not {type(array).__name__}"
        ) from error
    try:
        if holds(view, b"f"):
            rows.layout = MEL_FLOAT32
        elif holds(view, b"e"):
            rows.layout = MEL_FLOAT16
        else:
            raise TypeError(f"{name} must be float32 or float16, not {dtype_of(array, view)}")
        if view.ndim != 2:
            raise ValueError(f"{name} must have two dimensions, not the shape {shape_of(view)}")
    except (TypeError, ValueError):
        PyBuffer_Release(view)
        raise
    rows.data = view.buf
    rows.stride = view.strides[0]
    return view.shape[1] < 2 or view.strides[1] == view.itemsize


cdef object acquire_out(
    object out, Py_ssize_t n_rows, Py_ssize_t n_frames, Py_buffer *view, MelRows *rows,
):
    """Fill `view` and `rows` with those of `out`, or of a new float32 array; return the array."""
    if out is None:
        out = np.empty((n_rows, n_frames), dtype=np.float32)
    contiguous_rows = acquire_rows(out, "out", view, rows)
    try:
        if view.readonly:
            raise ValueError("out must be writable")
        if view.shape[0] != n_rows or view.shape[1] != n_frames:
            raise ValueError(f"out must have the shape {(n_rows, n_frames)}, not {shape_of(view)}")
        if not contiguous_rows:
            raise ValueError("out must be contiguous in its last dimension")
    except ValueError:
        PyBuffer_Release(view)
        raise
    return out


cdef object whole_signal(object pcm, int n_mels, object out, MelScale scale):
    """All frames of `pcm`, stored in `scale`; with MEL_WHISPER, normalized."""
    cdef Py_buffer samples, target
    cdef MelRows rows
    cdef Py_ssize_t n_samples, n_frames
    cdef float maximum = -INFINITY
    check_n_mels(n_mels)
    acquire_pcm(pcm, &samples)
    try:
        n_samples = samples.shape[0]
        n_frames = mel_frame_count(n_samples)
        out = acquire_out(out, n_mels, n_frames, &target, &rows)
        try:
            with nogil:
                mel_frames(
                    samples.buf, n_samples, 0, n_frames, n_mels, scale, &rows, &maximum
                )
                if scale == MEL_WHISPER:
                    mel_normalize(&rows, &rows, n_mels, n_frames, scale, maximum)
        finally:
            PyBuffer_Release(&target)
    finally:
        PyBuffer_Release(&samples)
    return out


def frame_count(Py_ssize_t n_samples):
    """Count the frames of a whole signal.

    Parameters
    ----------
    n_samples : int
        Samples of the signal, not negative.

    Returns
    -------
    int
        ``n_samples // 160 + 1``.

    Raises
    ------
    ValueError
        `n_samples` is negative.
    """
    if n_samples < 0:
        raise ValueError(f"n_samples must not be negative, but is {n_samples}")
    return mel_frame_count(n_samples)


def mel_filters(int n_mels=80):
    """Return the weights of the mel filters.

    Parameters
    ----------
    n_mels : int
        Mel channels, 80 or 128.

    Returns
    -------
    new float32 array of shape (n_mels, 201)
        What each bin of the power spectrum, 40 Hz apart, contributes to each channel.

    Raises
    ------
    OptionError
        `n_mels` is neither 80 nor 128.
    """
    check_n_mels(n_mels)
    cdef const MelBank *bank = bank_of(n_mels)
    cdef const float *weight = bank.weights
    filters = np.zeros((n_mels, kBins), dtype=np.float32)
    for channel in range(n_mels):
        for bin in range(bank.first[channel], bank.first[channel] + bank.width[channel]):
            filters[channel, bin] = weight[0]
            weight += 1
    return filters


def isa():
    """Name the instruction set that the kernel was chosen for.

    Returns
    -------
    str
        ``"avx512"``, ``"avx2"`` or ``"sse2"`` on x86-64, ``"neon"`` on 64-bit ARM, ``"generic"``
        elsewhere.
    """
    return chosen_isa.name.decode()


def log_mel(object pcm, int n_mels=80, object out=None):
    """Compute the log-mel spectrogram that Whisper reads.

    Equal to faster-whisper's ``FeatureExtractor`` up to rounding. Runs without the GIL, from any
    number of threads at once, and allocates only the result.

    Parameters
    ----------
    pcm : buffer of float32, shape (n,)
        Mono samples at 16 kHz, nominally from -1 to 1. Need not be aligned; copied first if not
        contiguous.
    n_mels : int
        Mel channels, 80 or 128.
    out : buffer of float32 or float16, shape (n_mels, n // 160 + 1), optional
        Where to put the result. Writable, with contiguous rows any distance apart; must not
        overlap `pcm`.

    Returns
    -------
    out, or a new float32 array of that shape
        The maximum of the whole signal sets the floor.

    Raises
    ------
    InvalidAudioError
        `pcm` is not a one-dimensional float32 buffer.
    OptionError
        `n_mels` is neither 80 nor 128.
    TypeError, ValueError
        `out` has the wrong type or the wrong shape, layout or access. Nothing was written.
    """
    return whole_signal(pcm, n_mels, out, MEL_WHISPER)


def log10_mel(object pcm, int n_mels=80, object out=None):
    """Compute the logarithm of the mel power, without normalization.

    Parameters and errors are those of `log_mel`.

    Returns
    -------
    out, or a new float32 array of shape (n_mels, n // 160 + 1)
        ``log10`` of the mel power, -10 at the least. Normalize it, or any window of it, with
        `normalize`; a float16 `out` loses precision that normalization then cannot recover.
    """
    return whole_signal(pcm, n_mels, out, MEL_LOG10)


def normalize(object log10_mel, object out=None, object maximum=None):
    """Normalize frames as Whisper does: ``(max(x, maximum - 8) + 4) / 4``.

    Runs without the GIL, from any number of threads at once.

    Parameters
    ----------
    log10_mel : buffer of float32 or float16, shape (rows, frames)
        As from `log10_mel` or `IncrementalLogMel`. Copied first if its rows are not contiguous.
    out : buffer of float32 or float16, same shape, optional
        Where to put the result. Writable, with contiguous rows any distance apart. May be
        `log10_mel` itself, but must not overlap it otherwise.
    maximum : float, optional
        What counts as the maximum. Default: the largest value in `log10_mel`.

    Returns
    -------
    out, or a new float32 array

    Raises
    ------
    TypeError, ValueError
        `log10_mel` is not a two-dimensional buffer of floats, or `out` has the wrong type, shape,
        layout or access. Nothing was written.
    """
    cdef Py_buffer source, target
    cdef MelRows source_rows, rows
    cdef bint find_maximum = maximum is None
    cdef float largest = 0 if find_maximum else maximum
    if not acquire_rows(log10_mel, "log10_mel", &source, &source_rows):
        PyBuffer_Release(&source)
        acquire_rows(np.ascontiguousarray(log10_mel), "log10_mel", &source, &source_rows)
    try:
        out = acquire_out(out, source.shape[0], source.shape[1], &target, &rows)
        try:
            with nogil:
                if find_maximum:
                    largest = chosen_isa.maximum(
                        kernel_rows(&source_rows), source.shape[0], source.shape[1]
                    )
                mel_normalize(
                    &source_rows, &rows, source.shape[0], source.shape[1], MEL_LOG10, largest
                )
        finally:
            PyBuffer_Release(&target)
    finally:
        PyBuffer_Release(&source)
    return out


def cast(object values, object out):
    """Copy values between float32 and float16, rounding to the nearest, half to even.

    Runs without the GIL, from any number of threads at once. A zero loses its sign.

    Parameters
    ----------
    values : buffer of float32 or float16, shape (rows, frames)
        Copied first if its rows are not contiguous.
    out : buffer of float32 or float16, same shape
        As of `normalize`.

    Returns
    -------
    out

    Raises
    ------
    TypeError, ValueError
        As of `normalize`.
    """
    if out is None:
        raise TypeError("out must be a float32 or float16 array, not None")
    cdef Py_buffer source, target
    cdef MelRows source_rows, rows
    if not acquire_rows(values, "values", &source, &source_rows):
        PyBuffer_Release(&source)
        acquire_rows(np.ascontiguousarray(values), "values", &source, &source_rows)
    try:
        acquire_out(out, source.shape[0], source.shape[1], &target, &rows)
        try:
            with nogil:
                # Without a floor, and in the units in which they are, values stay what they are.
                mel_normalize(
                    &source_rows, &rows, source.shape[0], source.shape[1], MEL_WHISPER, -INFINITY
                )
        finally:
            PyBuffer_Release(&target)
    finally:
        PyBuffer_Release(&source)
    return out


@cython.final
cdef class IncrementalLogMel:
    """Log-mel of a signal that arrives in pieces.

    A frame is final once all its samples have arrived, 160 * i + 200 of them for frame ``i``, and
    is returned by the `push` that brought the last. Whatever the pieces, the frames are bit for bit
    those of `log10_mel` on the whole signal. Less than 400 samples are kept, in the object itself.

    Calls from several threads take turns; the computation runs without the GIL.

    Parameters
    ----------
    n_mels : int
        Mel channels, 80 or 128.

    Raises
    ------
    OptionError
        `n_mels` is neither 80 nor 128.

    Examples
    --------
    >>> import numpy as np
    >>> mel = IncrementalLogMel()
    >>> mel.push(np.zeros(400, dtype=np.float32)).shape
    (80, 2)
    >>> mel.finish().shape
    (80, 1)
    """

    cdef MelStream stream
    cdef bint finished
    cdef cython.pymutex lock

    def __cinit__(self, int n_mels=80):
        check_n_mels(n_mels)
        mel_stream_reset(&self.stream, n_mels)

    @property
    def n_mels(self):
        """Mel channels."""
        return self.stream.n_mels

    @property
    def samples(self):
        """Samples pushed since the last reset."""
        with self.lock:
            return self.stream.samples

    @property
    def frames(self):
        """Frames returned since the last reset."""
        with self.lock:
            return self.stream.frames

    def frames_from_push(self, Py_ssize_t n_samples):
        """Count the frames that a push of `n_samples` would return now, to size its `out`.

        `finish` would return ``frame_count(samples) - frames``.

        Parameters
        ----------
        n_samples : int
            Samples of the push, not negative.

        Returns
        -------
        int

        Raises
        ------
        RuntimeError
            The signal is finished.
        ValueError
            `n_samples` is negative.
        """
        if n_samples < 0:
            raise ValueError(f"n_samples must not be negative, but is {n_samples}")
        with self.lock:
            self.check_unfinished()
            return mel_stream_ready(&self.stream, n_samples)

    def push(self, object pcm, object out=None):
        """Append samples and return the frames they complete.

        Parameters
        ----------
        pcm : buffer of float32, shape (n,)
            Mono samples at 16 kHz that follow those pushed before. Need not be aligned; copied
            first if not contiguous.
        out : buffer of float32 or float16, shape (n_mels, frames_from_push(n)), optional
            Where to put the result. Writable, with contiguous rows any distance apart; must not
            overlap `pcm`.

        Returns
        -------
        out, or a new float32 array of that shape
            Unnormalized, as from `log10_mel`.

        Raises
        ------
        InvalidAudioError
            `pcm` is not a one-dimensional float32 buffer.
        RuntimeError
            The signal is finished.
        TypeError, ValueError
            `out` has the wrong type or the wrong shape, layout or access.

        After an error the object is as it was before the call.
        """
        cdef Py_buffer samples, target
        cdef MelRows rows
        cdef float maximum = -INFINITY
        acquire_pcm(pcm, &samples)
        try:
            with self.lock:
                self.check_unfinished()
                out = acquire_out(
                    out, self.stream.n_mels, mel_stream_ready(&self.stream, samples.shape[0]),
                    &target, &rows,
                )
                try:
                    with nogil:
                        mel_stream_push(
                            &self.stream, samples.buf, samples.shape[0], MEL_LOG10, &rows, &maximum
                        )
                finally:
                    PyBuffer_Release(&target)
        finally:
            PyBuffer_Release(&samples)
        return out

    def finish(self, object out=None):
        """End the signal, with silence after it, and return the remaining frames.

        Parameters
        ----------
        out : buffer of float32 or float16, optional
            Where to put the result, of shape ``(n_mels, frame_count(samples) - frames)``.
            Writable, with contiguous rows any distance apart.

        Returns
        -------
        out, or a new float32 array of that shape
            Unnormalized, as from `log10_mel`. One or two frames.

        Raises
        ------
        RuntimeError
            The signal is finished already.
        TypeError, ValueError
            `out` has the wrong type or the wrong shape, layout or access. The signal is not
            finished then.
        """
        cdef Py_buffer target
        cdef MelRows rows
        cdef float maximum = -INFINITY
        with self.lock:
            self.check_unfinished()
            out = acquire_out(
                out, self.stream.n_mels, mel_stream_remaining(&self.stream), &target, &rows
            )
            try:
                with nogil:
                    mel_stream_finish(&self.stream, MEL_LOG10, &rows, &maximum)
                    self.finished = True
            finally:
                PyBuffer_Release(&target)
        return out

    def reset(self):
        """Forget the signal and start a new one."""
        with self.lock:
            mel_stream_reset(&self.stream, self.stream.n_mels)
            self.finished = False

    cdef int check_unfinished(self) except -1:
        if self.finished:
            raise RuntimeError("the signal is finished; call reset() to start a new one")
        return 0
