"""C interface of the log-mel front end, for cimport by code that runs without the GIL.

Nothing here allocates, takes the GIL or raises; callers check their arguments. All functions may
run on any number of threads at once, on different `MelStream` objects and different rows.
"""

cdef enum MelLayout:
    MEL_FLOAT32
    MEL_FLOAT16

# What a stored value is. MEL_WHISPER is log10 rescaled to the units Whisper reads, (log10 + 4) / 4,
# not yet raised to the window's floor. Rounding is monotone, so raising the stored value gives the
# bits that raising before storing would, in half precision too.
cdef enum MelScale:
    MEL_LOG10
    MEL_WHISPER

# n_mels rows, `stride` bytes apart (any sign), each of contiguous elements, at any alignment.
cdef struct MelRows:
    void *data
    Py_ssize_t stride
    MelLayout layout

# Samples that later frames still need, and the counts so far. Set by mel_stream_reset only.
cdef struct MelStream:
    float[400] tail
    Py_ssize_t samples
    Py_ssize_t frames
    int n_mels

# Frames of a whole signal of n_samples.
cdef Py_ssize_t mel_frame_count(Py_ssize_t n_samples) noexcept nogil

# Frames [first, first + count) of a whole signal of unnormalized values, to the first `count`
# columns of `out`. Requires n_mels 80 or 128, first + count <= mel_frame_count(n_samples). `pcm` is
# n_samples floats at any alignment. `maximum`, in log10 units, is raised to the largest of them;
# start it at -inf. NaN in the samples reaches the frames that cover it but never `maximum`.
cdef void mel_frames(
    const void *pcm, Py_ssize_t n_samples, Py_ssize_t first, Py_ssize_t count, int n_mels,
    MelScale scale, const MelRows *out, float *maximum,
) noexcept nogil

# The normalization pass: values of `source`, stored in `scale`, to Whisper's in `out`, nothing
# lying more than 8 decades below `maximum` (log10 units). `source` and `out` may be the same rows.
cdef void mel_normalize(
    const MelRows *source, const MelRows *out, int n_mels, Py_ssize_t n_frames, MelScale scale,
    float maximum,
) noexcept nogil

cdef void mel_stream_reset(MelStream *stream, int n_mels) noexcept nogil

# Frames that mel_stream_push of n_samples would write, and that mel_stream_finish would.
cdef Py_ssize_t mel_stream_ready(const MelStream *stream, Py_ssize_t n_samples) noexcept nogil
cdef Py_ssize_t mel_stream_remaining(const MelStream *stream) noexcept nogil

# Both raise `maximum` as mel_frames does, and return the number of frames written to `out`. After
# mel_stream_finish, only mel_stream_reset may follow.
cdef Py_ssize_t mel_stream_push(
    MelStream *stream, const void *pcm, Py_ssize_t n_samples, MelScale scale, const MelRows *out,
    float *maximum,
) noexcept nogil
cdef Py_ssize_t mel_stream_finish(
    MelStream *stream, MelScale scale, const MelRows *out, float *maximum,
) noexcept nogil
