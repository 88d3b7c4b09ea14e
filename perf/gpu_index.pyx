# cython: boundscheck=False, wraparound=False
"""Replays traces with ways to find free blocks, and with a whole pool; see bench_gpu.py."""

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc
from speechrnt._gpu_pool cimport (
    gpu_memory_alloc, gpu_memory_free, gpu_memory_free_on, gpu_pool_of, sr_gpu_block, sr_gpu_pool,
)

import time

cdef extern from "gpu_index_peers.h" namespace "peers" nogil:
    cppclass ListIndex:
        pass
    cppclass TreeIndex:
        pass
    cppclass OurIndex:
        pass

    struct Result:
        uint64_t footprint
        uint64_t peak
        uint64_t most_holes

    Result replay_list "peers::replay<peers::ListIndex>"(const int64_t *, size_t, bint)
    Result replay_tree "peers::replay<peers::TreeIndex>"(const int64_t *, size_t, bint)
    Result replay_ours "peers::replay<peers::OurIndex>"(const int64_t *, size_t, bint)


def replay(str peer, const int64_t[::1] trace, bint observe=False):
    """Replay a trace; returns seconds per operation and, if observed, what it took."""
    cdef Result result
    started = time.perf_counter()
    if peer == "list":
        result = replay_list(&trace[0], trace.shape[0], observe)
    elif peer == "tree":
        result = replay_tree(&trace[0], trace.shape[0], observe)
    else:
        result = replay_ours(&trace[0], trace.shape[0], observe)
    return (time.perf_counter() - started) / trace.shape[0], result


def replay_pool(pool, const int64_t[::1] trace, bint on_stream=False):
    """Replay a trace with a GpuMemoryPool; returns seconds per operation and failures."""
    cdef sr_gpu_pool *native = gpu_pool_of(pool)
    cdef size_t n = trace.shape[0]
    cdef uint64_t *handles = <uint64_t *> malloc(n * sizeof(uint64_t))
    cdef size_t made = 0
    cdef size_t failures = 0
    cdef size_t i
    cdef sr_gpu_block block
    if handles == NULL:
        raise MemoryError
    started = time.perf_counter()
    with nogil:
        for i in range(n):
            if trace[i] > 0:
                block.handle = 0
                failures += gpu_memory_alloc(native, trace[i], &block) != 0
                handles[made] = block.handle
                made += 1
            elif on_stream:
                failures += gpu_memory_free_on(native, handles[-trace[i] - 1], NULL) != 0
            else:
                failures += gpu_memory_free(native, handles[-trace[i] - 1]) != 0
    seconds = (time.perf_counter() - started) / n
    free(handles)
    return seconds, failures
