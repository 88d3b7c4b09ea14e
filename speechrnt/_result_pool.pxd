"""C interface of the pool of transcription results.

The functions run without the GIL and take no Python object. A record belongs to whoever leases it,
from object_pool_acquire to object_pool_release (_pools.pxd) on a pool made by result_pool_new;
calls with different records may run on any number of threads at once. Those that grow an array
return False if there is no memory, and leave the record as it was.
"""

from libc.stdint cimport int32_t
from speechrnt._pools cimport sr_pool, sr_pool_options

# Times are seconds from the beginning of the stream; tokens are those of the record.
cdef struct SegmentRecord:
    double start
    double end
    double avg_logprob
    double no_speech_prob
    double compression_ratio
    int32_t first_token
    int32_t n_tokens
    int32_t seek          # where the window begins that it was decoded in, in mel frames

# Bytes in use and allocated. The allocation outlives the lease.
cdef struct ResultArray:
    char *data
    size_t size
    size_t capacity

cdef struct ResultRecord:
    ResultArray text      # UTF-8
    ResultArray tokens    # int32_t
    ResultArray segments  # SegmentRecord
    double start          # of the audio, in seconds from the beginning of the stream
    double end
    double queue_s        # how long the request waited, and how long it was worked on
    double compute_s
    float confidence      # from 0 to 1; NaN if it is not known
    bint is_final
    char[16] language     # code, ending in a zero byte; empty if it is not known

# `options` apart from object_size and destroy, which are set here.
cdef int result_pool_new(sr_pool_options *options, sr_pool **pool) noexcept nogil

# What every lease starts with, and then, at its end, the arrays that grew out of proportion.
cdef void result_clear(ResultRecord *record) noexcept nogil
cdef void result_shrink(ResultRecord *record) noexcept nogil

cdef bint result_set_text(ResultRecord *record, const char *text, size_t size) noexcept nogil
cdef bint result_set_tokens(
    ResultRecord *record, const int32_t *tokens, size_t n_tokens,
) noexcept nogil
cdef bint result_add_segment(ResultRecord *record, const SegmentRecord *segment) noexcept nogil

# More text, more tokens, and the segment that they are; its tokens are set here.
cdef bint result_append(
    ResultRecord *record, const char *text, size_t size, const int32_t *tokens, size_t n_tokens,
    SegmentRecord *segment,
) noexcept nogil
