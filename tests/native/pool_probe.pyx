"""What only C code can do with the pools, for tests: calls without the GIL, raw handles."""

cimport cython
from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport int32_t, uint32_t, uint64_t, uintptr_t
from speechrnt.capi cimport (
    SR_OK,
    sr_audio_memory,
    sr_audio_pool,
    sr_audio_pool_acquire,
    sr_audio_pool_get,
    sr_audio_pool_of,
    sr_audio_pool_release,
    sr_pool,
    sr_pool_acquire,
    sr_pool_free,
    sr_pool_get,
    sr_pool_new,
    sr_pool_release,
    sr_pool_trim,
    sr_pool_use,
)

from speechrnt._pools cimport (
    object_pool_acquire,
    object_pool_free,
    object_pool_release,
)
from speechrnt._pools cimport sr_pool as sr_object_pool
from speechrnt._pools cimport sr_pool_options
from speechrnt._result_pool cimport (
    ResultRecord,
    SegmentRecord,
    result_add_segment,
    result_clear,
    result_pool_new,
    result_set_text,
    result_set_tokens,
    result_shrink,
)

import time


cdef extern from "stdlib.h" nogil:
    void *aligned_alloc(size_t alignment, size_t size)
    void free(void *memory)


cdef class Pool:
    cdef sr_pool *pool

    def __cinit__(
        self, size_t object_size, uint32_t limit, uint32_t initial=0, bint overflow=False,
    ):
        cdef int status = sr_pool_new(object_size, initial, limit, overflow, &self.pool)
        if status != SR_OK:
            raise ValueError(status)

    def acquire(self):
        """Return (status, handle, address)."""
        cdef uint64_t handle = 0
        cdef void *item = NULL
        cdef int status = sr_pool_acquire(self.pool, &handle, &item)
        return status, handle, <uintptr_t> item

    def release(self, uint64_t handle):
        return sr_pool_release(self.pool, handle)

    def get(self, uint64_t handle):
        return <uintptr_t> sr_pool_get(self.pool, handle)

    def use(self):
        cdef uint64_t in_use, idle
        sr_pool_use(self.pool, &in_use, &idle)
        return in_use, idle

    def trim(self):
        with nogil:
            sr_pool_trim(self.pool)

    def free(self):
        cdef int status = sr_pool_free(self.pool)
        if status == SR_OK:
            self.pool = NULL
        return status

    def __dealloc__(self):
        if self.pool != NULL:
            sr_pool_free(self.pool)

    def churn(self, uint64_t mark, long rounds):
        """Lease 1 to 64 objects at a time, mark them, and count those that lose the mark."""
        cdef uint64_t[64] handles
        cdef void *item
        cdef long r, errors = 0
        cdef int i, n
        with nogil:
            for r in range(rounds):
                n = 0
                while n < 1 + r * 7 % 64:
                    if sr_pool_acquire(self.pool, &handles[n], &item) != SR_OK:
                        break
                    (<uint64_t *> item)[0] = mark + n
                    n += 1
                for i in range(n):
                    item = sr_pool_get(self.pool, handles[i])
                    errors += item == NULL or (<uint64_t *> item)[0] != mark + i
                    errors += sr_pool_release(self.pool, handles[i]) != SR_OK
                    errors += sr_pool_release(self.pool, handles[i]) == SR_OK
        return errors

    def release_all(self, list handles):
        """Release from without the GIL; return how many calls succeeded."""
        cdef uint64_t handle
        cdef long released = 0
        for handle in handles:
            with nogil:
                released += sr_pool_release(self.pool, handle) == SR_OK
        return released

    def rounds(self, long n):
        """Acquire and release n times; return the seconds it took."""
        cdef uint64_t handle
        cdef void *item
        start = time.perf_counter()
        with nogil:
            for _ in range(n):
                sr_pool_acquire(self.pool, &handle, &item)
                sr_pool_release(self.pool, handle)
        return time.perf_counter() - start


cdef class Results:
    """A pool of results without its Python class."""

    cdef sr_object_pool *pool

    def __cinit__(self):
        cdef sr_pool_options options
        options.initial = 0
        options.soft = options.hard = 4096
        options.overflow = False
        if result_pool_new(&options, &self.pool) != SR_OK:
            raise MemoryError

    def __dealloc__(self):
        object_pool_free(self.pool)

    cdef int use(self) noexcept nogil:
        """Take a result, fill it in, and give it back."""
        cdef uint64_t handle
        cdef ResultRecord *record
        cdef SegmentRecord segment = SegmentRecord(0, 1, -0.5, 0.1, 1.0, 0, 4, 0)
        cdef int32_t[4] tokens = [1, 2, 3, 4]
        if object_pool_acquire(self.pool, &handle, <void **> &record) != SR_OK:
            return -1
        result_clear(record)
        if not (
            result_set_text(record, b"four words of text", 18)
            and result_set_tokens(record, tokens, 4)
            and result_add_segment(record, &segment)
        ):
            return -1
        result_shrink(record)
        return object_pool_release(self.pool, handle)


def audio_rounds(object audio_pool, size_t size, long n):
    """The same with an AudioBufferPool."""
    cdef sr_audio_pool *pool = sr_audio_pool_of(audio_pool)
    cdef uint64_t handle
    cdef void *memory
    start = time.perf_counter()
    with nogil:
        for _ in range(n):
            sr_audio_pool_acquire(pool, size, &handle, &memory)
            sr_audio_pool_release(pool, handle)
    return time.perf_counter() - start


def audio_churn(object audio_pool, uint64_t mark, long rounds):
    """As Pool.churn, with buffers of several classes."""
    cdef sr_audio_pool *pool = sr_audio_pool_of(audio_pool)
    cdef uint64_t[8] handles
    cdef void *memory
    cdef long r, errors = 0
    cdef int i, n
    with nogil:
        for r in range(rounds):
            n = 0
            while n < 1 + r % 8:
                if sr_audio_pool_acquire(pool, 1 << (10 + (r + n) % 12), &handles[n], &memory):
                    break
                (<uint64_t *> memory)[0] = mark + n
                n += 1
            for i in range(n):
                memory = sr_audio_pool_get(pool, handles[i])
                errors += memory == NULL or (<uint64_t *> memory)[0] != mark + i
                errors += sr_audio_pool_release(pool, handles[i]) != SR_OK
                errors += sr_audio_pool_release(pool, handles[i]) == SR_OK
    return errors


def audio_release(object audio_pool, uint64_t handle):
    return sr_audio_pool_release(sr_audio_pool_of(audio_pool), handle)


ctypedef long (*Counter)() noexcept nogil


def calls_during(uintptr_t counter, object pool, long n):
    """How far a C function ``long counter(void)`` counts while `pool` goes n rounds."""
    cdef Counter count = <Counter> counter
    cdef uint64_t handle
    cdef void *item
    cdef sr_pool *native
    cdef sr_audio_pool *audio
    cdef long before, after
    cdef int failed = 0
    if isinstance(pool, Pool):
        native = (<Pool> pool).pool
        with nogil:
            before = count()
            for _ in range(n):
                failed |= sr_pool_acquire(native, &handle, &item)
                failed |= sr_pool_release(native, handle)
            after = count()
    elif isinstance(pool, Results):
        with nogil:
            before = count()
            for _ in range(n):
                failed |= (<Results> pool).use()
            after = count()
    else:
        audio = sr_audio_pool_of(pool)
        with nogil:
            before = count()
            for _ in range(n):
                failed |= sr_audio_pool_acquire(audio, 1 << 21, &handle, &item)
                failed |= sr_audio_pool_release(audio, handle)
            after = count()
    assert not failed
    return after - before


cdef struct Counts:
    long allocated
    long freed
    size_t bytes
    bint refused


cdef cython.pymutex lock


cdef void *counted_alloc(void *ctx, size_t size, size_t alignment) noexcept nogil:
    cdef Counts *counts = <Counts *> ctx
    if counts.refused:
        return NULL
    with lock:
        counts.allocated += 1
        counts.bytes += size
    return aligned_alloc(alignment, size)


cdef void counted_free(void *ctx, void *memory, size_t size) noexcept nogil:
    cdef Counts *counts = <Counts *> ctx
    free(memory)
    with lock:
        counts.freed += 1
        counts.bytes -= size


cdef Counts counts
cdef sr_audio_memory counted = sr_audio_memory(counted_alloc, counted_free, &counts)
cdef sr_audio_memory broken = sr_audio_memory(counted_alloc, NULL, &counts)


def counted_memory(name=b"speechrnt.sr_memory", bint whole=True):
    """A capsule for AudioBufferPool's `memory`."""
    return PyCapsule_New(&counted if whole else &broken, name, NULL)


def memory_counts():
    """Calls of both functions, and the bytes that are out."""
    return counts.allocated, counts.freed, counts.bytes


def refuse_memory(bint refused):
    counts.refused = refused
