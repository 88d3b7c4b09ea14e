"""Recorded series of allocations and frees, for benchmarks and tests of the GPU memory pool.

A trace is an array of int64: a positive number allocates so many bytes, and -k frees what the k-th
allocation of the trace made, counting from 1.
"""

import random

import numpy as np

MIB = 2**20
BYTES_PER_S = 16000 * 4  # of float32 audio
FRAME = 80 * 2  # a float16 log-mel frame, of which there are 100 per second


def random_trace(n_allocations, max_size, limit=16000 * MIB, seed=0):
    """RMM's benchmark random_allocations: uniform sizes, 73 % of the steps allocate.

    After https://github.com/rapidsai/rmm, cpp/benchmarks/random_allocations.
    """
    rng = random.Random(seed)
    trace, live, allocated, made = [], [], 0, 0
    while made < n_allocations:
        size = rng.randint(1, max_size)
        if not live or (rng.random() < 0.73 and allocated + size <= limit):
            made += 1
            allocated += size
            live.append((made, size))
            trace.append(size)
        else:
            at = rng.randrange(len(live))
            live[at], live[-1] = live[-1], live[at]
            number, size = live.pop()
            allocated -= size
            trace.append(-number)
    return np.array(trace, np.int64)


def speech_trace(streams, n_operations, seed=0):
    """Do as a server with live streams: windows of audio that grow, features, work space.

    Each stream hears an utterance of 1 to 28 s. Every half second of it brings a larger window and
    its features in place of the last ones, besides work space for one call; at the end all goes.
    """
    rng = random.Random(seed)
    trace = []
    made = 0
    state = [None] * streams

    def allocate(size):
        nonlocal made
        made += 1
        trace.append(int(size))
        return made

    while len(trace) < n_operations:
        i = rng.randrange(streams)
        if state[i] is None:
            state[i] = [0.0, rng.uniform(1, 28), []]
        heard, length, blocks = state[i]
        heard = min(heard + 0.5 * rng.uniform(0.9, 1.1), length)
        new = [allocate(heard * BYTES_PER_S), allocate(int(heard * 100) * FRAME)]
        work = allocate(rng.choice([64 * 1024, 480_000, 960_000, 1_920_000]))
        trace.extend(-block for block in blocks)
        trace.append(-work)
        if heard < length:
            state[i] = [heard, length, new]
        else:
            trace.extend(-block for block in new)
            state[i] = None
    return np.array(trace, np.int64)
