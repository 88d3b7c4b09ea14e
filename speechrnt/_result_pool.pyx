"""A pool of transcription results.

A result is what a request comes to: text, tokens, segments, times, confidence, language, and
whether it is final. Its arrays stay with the record from lease to lease, so that once they have
grown to what transcripts need, a result is filled in without an allocation.

What Python reads from a result is a copy, which outlives the lease.
"""

cimport cython
from cpython cimport array as c_array
from libc.math cimport NAN, isnan
from libc.stdint cimport int32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset, strlen
from libcpp.atomic cimport atomic, memory_order_relaxed
from speechrnt._pools cimport (
    SR_OK,
    SR_STALE,
    object_pool_acquire,
    object_pool_free,
    object_pool_maintain,
    object_pool_new,
    object_pool_release,
    object_pool_statistics,
    object_pool_trim,
    raise_status,
    seconds_of,
    sr_pool_statistics,
)

from array import array
from typing import NamedTuple

from speechrnt._pools import PoolStatistics, check_limits, health_of
from speechrnt.errors import OptionError, PoolClosedError

__all__ = ["ResultSegment", "TranscriptionResult", "TranscriptionResultPool"]

# Arrays larger than this are freed when the lease ends: one endless transcript is not a reason to
# keep a megabyte per record. 30 s of speech come to 448 tokens at most.
cdef enum:
    KEPT_BYTES = 16 * 1024
    LANGUAGE_BYTES = 16
    MOST_TOKENS = 0x7FFFFFFF  # as segments count them


cdef bint reserve(ResultArray *block, size_t size) noexcept nogil:
    cdef size_t capacity = block.capacity
    cdef void *grown
    if size <= capacity:
        return True
    capacity = max(size, 2 * capacity, <size_t> 256)
    grown = realloc(block.data, capacity)
    if grown == NULL:
        return False
    block.data = <char *> grown
    block.capacity = capacity
    return True


cdef void shrink(ResultArray *block, size_t kept) noexcept nogil:
    if block.capacity > kept:
        free(block.data)
        block.data = NULL
        block.size = 0
        block.capacity = 0


cdef void destroy(void *object) noexcept nogil:
    cdef ResultRecord *record = <ResultRecord *> object
    shrink(&record.text, 0)
    shrink(&record.tokens, 0)
    shrink(&record.segments, 0)


cdef int result_pool_new(sr_pool_options *options, sr_pool **pool) noexcept nogil:
    options.object_size = sizeof(ResultRecord)
    options.destroy = destroy
    return object_pool_new(options, pool)


cdef void result_clear(ResultRecord *record) noexcept nogil:
    record.text.size = 0
    record.tokens.size = 0
    record.segments.size = 0
    record.start = 0
    record.end = 0
    record.queue_s = 0
    record.compute_s = 0
    record.confidence = NAN
    record.is_final = False
    memset(record.language, 0, sizeof(record.language))


cdef void result_shrink(ResultRecord *record) noexcept nogil:
    shrink(&record.text, KEPT_BYTES)
    shrink(&record.tokens, KEPT_BYTES)
    shrink(&record.segments, KEPT_BYTES)


cdef inline bint assign(ResultArray *block, const void *data, size_t size) noexcept nogil:
    if not reserve(block, size):
        return False
    if size:
        memcpy(block.data, data, size)
    block.size = size
    return True


cdef bytes contents(const ResultArray *block):
    """A copy, to make Python objects of, while which another thread could release the record."""
    return block.data[:block.size]


cdef bint result_set_text(ResultRecord *record, const char *text, size_t size) noexcept nogil:
    return assign(&record.text, text, size)


cdef bint result_set_tokens(
    ResultRecord *record, const int32_t *tokens, size_t n_tokens,
) noexcept nogil:
    return assign(&record.tokens, tokens, n_tokens * sizeof(int32_t))


cdef bint result_add_segment(ResultRecord *record, const SegmentRecord *segment) noexcept nogil:
    cdef ResultArray *segments = &record.segments
    if not reserve(segments, segments.size + sizeof(SegmentRecord)):
        return False
    memcpy(segments.data + segments.size, segment, sizeof(SegmentRecord))
    segments.size += sizeof(SegmentRecord)
    return True


cdef inline void append(ResultArray *block, const void *data, size_t size) noexcept nogil:
    if size:
        memcpy(block.data + block.size, data, size)
        block.size += size


cdef bint result_append(
    ResultRecord *record, const char *text, size_t size, const int32_t *tokens, size_t n_tokens,
    SegmentRecord *segment,
) noexcept nogil:
    cdef size_t n_before = record.tokens.size // sizeof(int32_t)
    if (
        n_before + n_tokens > MOST_TOKENS
        or not reserve(&record.text, record.text.size + size)
        or not reserve(&record.tokens, record.tokens.size + n_tokens * sizeof(int32_t))
        or not reserve(&record.segments, record.segments.size + sizeof(SegmentRecord))
    ):
        return False
    segment.first_token = <int32_t> n_before
    segment.n_tokens = <int32_t> n_tokens
    append(&record.text, text, size)
    append(&record.tokens, tokens, n_tokens * sizeof(int32_t))
    append(&record.segments, segment, sizeof(SegmentRecord))
    return True


class ResultSegment(NamedTuple):
    """A part of a result.

    Attributes
    ----------
    start, end : float
        Seconds from the beginning of the stream.
    first_token, n_tokens : int
        Which of the result's tokens are this segment's.
    avg_logprob, no_speech_prob, compression_ratio : float
        NaN if they are not known.
    seek : int
        Where the window begins that it was decoded in, in mel frames.
    """

    start: float
    end: float
    first_token: int
    n_tokens: int
    avg_logprob: float = float("nan")
    no_speech_prob: float = float("nan")
    compression_ratio: float = float("nan")
    seek: int = 0


@cython.final
@cython.no_gc
cdef class TranscriptionResultPool:
    """Records for the results of requests, with their arrays.

    Parameters
    ----------
    limits : PoolLimits, optional
        Bytes are those of the records without their arrays, which hold 48 KiB per idle record at
        most. Pages are not given to the system separately: `purge_after_s` is not used.

    Raises
    ------
    OptionError
        The limits allow for no record.
    PoolExhausted
        There is no memory for the initial records.

    Examples
    --------
    >>> pool = TranscriptionResultPool()
    >>> with pool.acquire() as result:
    ...     result.text = "Guten Tag."
    ...     result.language = "de"
    ...     text = result.text
    >>> text
    'Guten Tag.'
    """

    cdef sr_pool *pool
    cdef object limits
    cdef Py_ssize_t hard
    cdef atomic[bint] is_closed
    cdef object __weakref__

    def __cinit__(self, limits=None):
        cdef sr_pool_options options
        limits = check_limits(limits)
        options.initial, options.soft, options.hard = limits.sizes(sizeof(ResultRecord))
        options.overflow = limits.overflow == "allocate"
        self.limits = limits
        self.hard = options.hard
        raise_status(result_pool_new(&options, &self.pool), "pools")

    def __dealloc__(self):
        # Results hold a reference to the pool: nothing is in use.
        if self.pool != NULL:
            object_pool_free(self.pool)

    def acquire(self):
        """Lend an empty result.

        Returns
        -------
        TranscriptionResult

        Raises
        ------
        PoolExhausted
            The pool is at its limit, or the system has no memory. At the limit, results that are
            idle in the cache of another thread, 32 at most, cannot be had.
        PoolClosedError
            The pool is closed.
        """
        cdef TranscriptionResult result = TranscriptionResult.__new__(TranscriptionResult)
        if self.is_closed.load(memory_order_relaxed):
            raise PoolClosedError("the pool is closed")
        status = object_pool_acquire(self.pool, &result.handle, <void **> &result.record)
        if status != SR_OK:
            raise_status(status, f"{self.hard} results")
        result_clear(result.record)
        result.pool = self
        return result

    def trim(self):
        """Free what is idle, in whole chunks of records, down to `initial_size`.

        Other threads give back what they have cached at their next release, or when they end.
        """
        with nogil:
            object_pool_trim(self.pool)

    def maintain(self, now=None):
        """Free what recent demand does not explain and has been idle for `free_after_s`.

        To be called about once per `epoch_s`: see `maintain_on`.

        Parameters
        ----------
        now : float, optional
            Seconds; ``time.monotonic()`` if not given. If it is less than the last, that counts.

        Raises
        ------
        OptionError
            `now` is no number, or negative, or not finite.
        """
        cdef double c_now = seconds_of(now)
        cdef double epoch = self.limits.epoch_s
        cdef double free_after = self.limits.free_after_s
        with nogil:
            object_pool_maintain(self.pool, c_now, epoch, free_after)

    def close(self):
        """Free what is idle, as `trim` does, and refuse further acquires.

        Results in use stay good. The rest of the memory goes when the last of them is released and
        the pool is collected. Closing twice is harmless.
        """
        self.is_closed.store(True, memory_order_relaxed)
        self.trim()

    @property
    def closed(self):
        """Whether `close` was called."""
        return bool(self.is_closed.load(memory_order_relaxed))

    def health(self):
        """Return the use against the limit, as a `PoolHealth`."""
        cdef sr_pool_statistics now
        object_pool_statistics(self.pool, &now)
        return health_of(self.closed, <double> now.in_use / self.hard)

    def statistics(self):
        """Return a `PoolStatistics`."""
        cdef sr_pool_statistics now
        object_pool_statistics(self.pool, &now)
        return PoolStatistics(
            hits=now.acquired - now.misses - now.overflows,
            misses=now.misses,
            overflows=now.overflows,
            in_use=now.in_use,
            idle=now.idle,
            peak=now.peak,
            reserved_bytes=now.reserved_bytes,
            idle_bytes=now.reserved_bytes - now.in_use * sizeof(ResultRecord),
            purges=now.purges,
            kept=0,
            max_size=self.hard,
            max_bytes=self.limits.max_bytes,
        )


cdef SegmentRecord new_segment(double start, double end) except *:
    cdef SegmentRecord segment
    if not 0 <= start <= end:
        raise OptionError(f"a segment must not end before it starts, as {start} to {end} does")
    memset(&segment, 0, sizeof(SegmentRecord))  # the bytes between its fields are copied, too
    segment.start = start
    segment.end = end
    segment.compression_ratio = NAN
    return segment


@cython.final
@cython.no_gc
@cython.freelist(64)
cdef class TranscriptionResult:
    """A result on loan from a `TranscriptionResultPool`.

    Made by `TranscriptionResultPool.acquire`. It ends with `release`, at the end of a ``with``
    block, or when it is collected; all else then raises `HandleError`. One thread at a time may use
    a result, and any may release it.
    """

    cdef TranscriptionResultPool pool  # None once released
    cdef uint64_t handle
    cdef ResultRecord *record

    def __init__(self):
        raise TypeError("results come from TranscriptionResultPool.acquire")

    cdef ResultRecord *live(self) except NULL:
        if self.pool is None:
            raise_status(SR_STALE, None)
        return self.record

    @property
    @cython.critical_section
    def text(self):
        """What was said."""
        cdef ResultRecord *record = self.live()
        return record.text.data[:record.text.size].decode()

    @text.setter
    def text(self, str text not None):
        encoded = text.encode()
        with cython.critical_section(self):
            if not result_set_text(self.live(), encoded, len(encoded)):
                raise MemoryError()

    @property
    @cython.critical_section
    def tokens(self):
        """Token ids, as a list; set from any iterable of integers."""
        cdef bytes copied = contents(&self.live().tokens)
        cdef const int32_t *tokens = <const int32_t *> <const char *> copied
        return [tokens[i] for i in range(len(copied) // sizeof(int32_t))]

    @tokens.setter
    def tokens(self, tokens):
        cdef c_array.array ids = array("i", list(tokens))
        with cython.critical_section(self):
            if not result_set_tokens(self.live(), <const int32_t *> ids.data.as_ints, len(ids)):
                raise MemoryError()

    @property
    @cython.critical_section
    def segments(self):
        """The segments so far, as a list of `ResultSegment`."""
        cdef bytes copied = contents(&self.live().segments)
        cdef const SegmentRecord *segment = <const SegmentRecord *> <const char *> copied
        segments = []
        for _ in range(len(copied) // sizeof(SegmentRecord)):
            segments.append(
                ResultSegment(
                    segment.start,
                    segment.end,
                    segment.first_token,
                    segment.n_tokens,
                    segment.avg_logprob,
                    segment.no_speech_prob,
                    segment.compression_ratio,
                    segment.seek,
                )
            )
            segment += 1
        return segments

    def append(
        self, str text not None, tokens, double start, double end, *, int32_t seek=0,
        double avg_logprob=NAN, double no_speech_prob=NAN, double compression_ratio=NAN,
    ):
        """Append a segment with its text and its tokens.

        Parameters
        ----------
        text
            What is added to the text, with the space before it where one goes.
        tokens
            Its ids: an iterable of integers.
        start, end : float
            Seconds from the beginning of the stream, in this order.
        seek, avg_logprob, no_speech_prob, compression_ratio
            See `ResultSegment`.

        Raises
        ------
        HandleError
            The result was released.
        OptionError
            The times are not a range.
        """
        cdef c_array.array ids = array("i", list(tokens))
        cdef bytes encoded = text.encode()
        cdef SegmentRecord segment = new_segment(start, end)
        segment.seek = seek
        segment.avg_logprob = avg_logprob
        segment.no_speech_prob = no_speech_prob
        segment.compression_ratio = compression_ratio
        with cython.critical_section(self):
            if not result_append(
                self.live(), <const char *> encoded, len(encoded),
                <const int32_t *> ids.data.as_ints, len(ids), &segment,
            ):
                raise MemoryError()

    def add_segment(
        self, double start, double end, int32_t first_token=0, int32_t n_tokens=0, *,
        double avg_logprob=NAN, double no_speech_prob=NAN,
    ):
        """Append a segment.

        Parameters
        ----------
        start, end : float
            Seconds from the beginning of the stream, in this order.
        first_token, n_tokens : int
            Which of the result's tokens are this segment's.
        avg_logprob, no_speech_prob : float
            NaN if they are not known.

        Raises
        ------
        HandleError
            The result was released.
        OptionError
            The times or the tokens are not a range, or not within the result's tokens.
        """
        cdef SegmentRecord segment = new_segment(start, end)
        cdef ResultRecord *record
        segment.first_token = first_token
        segment.n_tokens = n_tokens
        segment.avg_logprob = avg_logprob
        segment.no_speech_prob = no_speech_prob
        with cython.critical_section(self):
            record = self.live()
            n = <Py_ssize_t> (record.tokens.size // sizeof(int32_t))
            if first_token < 0 or n_tokens < 0 or <Py_ssize_t> first_token + n_tokens > n:
                raise OptionError(
                    f"tokens {first_token} to {first_token + <Py_ssize_t> n_tokens} "
                    f"are not among the {n} of the result"
                )
            if not result_add_segment(record, &segment):
                raise MemoryError()

    @property
    @cython.critical_section
    def language(self):
        """Language code, or None if it is not known."""
        cdef ResultRecord *record = self.live()
        return record.language[:strlen(record.language)].decode() or None

    @language.setter
    def language(self, str language):
        encoded = (language or "").encode()
        if len(encoded) >= LANGUAGE_BYTES or b"\0" in encoded:
            raise OptionError(f"language must be a code, not {language!r}")
        with cython.critical_section(self):
            memcpy(self.live().language, <const char *> encoded, len(encoded) + 1)

    @property
    @cython.critical_section
    def confidence(self):
        """From 0 to 1, or None if it is not known."""
        cdef float confidence = self.live().confidence
        return None if isnan(confidence) else confidence

    @confidence.setter
    def confidence(self, confidence):
        cdef float value = NAN if confidence is None else confidence
        if value < 0 or value > 1:
            raise OptionError(f"confidence must be from 0 to 1, not {confidence}")
        with cython.critical_section(self):
            self.live().confidence = value

    @property
    @cython.critical_section
    def is_final(self):
        """Whether the text will not change any more."""
        return bool(self.live().is_final)

    @is_final.setter
    @cython.critical_section
    def is_final(self, bint is_final):
        self.live().is_final = is_final

    @property
    @cython.critical_section
    def span(self):
        """Start and end of the audio, in seconds from the beginning of the stream."""
        cdef ResultRecord *record = self.live()
        return record.start, record.end

    @span.setter
    def span(self, span):
        cdef double start, end
        start, end = span
        if not 0 <= start <= end:
            raise OptionError(f"a span must not end before it starts, as {start} to {end} does")
        with cython.critical_section(self):
            self.live().start = start
            self.live().end = end

    @property
    @cython.critical_section
    def timings(self):
        """How long the request waited and how long it was worked on, in seconds."""
        cdef ResultRecord *record = self.live()
        return record.queue_s, record.compute_s

    @timings.setter
    def timings(self, timings):
        cdef double queue_s, compute_s
        queue_s, compute_s = timings
        if not (queue_s >= 0 and compute_s >= 0):
            raise OptionError(f"timings must not be negative, as in {queue_s}, {compute_s}")
        with cython.critical_section(self):
            self.live().queue_s = queue_s
            self.live().compute_s = compute_s

    def release(self):
        """Give the result back. Any thread may.

        Raises
        ------
        HandleError
            It was released already.
        """
        if not self.finish():
            raise_status(SR_STALE, None)

    cdef bint finish(self) noexcept:
        """End the lease; false if it has ended already."""
        cdef TranscriptionResultPool pool
        with cython.critical_section(self):
            pool = self.pool
            self.pool = None
        if pool is None:
            return False
        result_shrink(self.record)
        object_pool_release(pool.pool, self.handle)
        return True

    def __enter__(self):
        return self

    def __exit__(self, exc_type, exc_value, traceback, /):
        self.finish()

    def __dealloc__(self):
        self.finish()
