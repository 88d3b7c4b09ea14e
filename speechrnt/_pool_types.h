/* The plain types of the pools, shared by their headers and their .pxd. */

#pragma once

#include <stddef.h>
#include <stdint.h>

/* Values are part of the public C API (capi.pxd). */
enum sr_status {
    SR_OK = 0,
    SR_EXHAUSTED = 1, /* at the limit */
    SR_NO_MEMORY = 2, /* the system has none */
    SR_STALE = 3,     /* released already */
    SR_FOREIGN = 4,   /* a handle of another pool, or none at all */
    SR_IN_USE = 5,    /* something is still on loan */
    SR_INVALID = 6,   /* a size or a limit out of range */
    SR_CLOSED = 7,
};

struct sr_pool;
struct sr_audio_pool;

/* A pool of at most `hard` objects of object_size bytes. `initial` of them exist from the start and
   stay; of the others, maintenance leaves what recent demand suggests, `soft` in all at most. At
   `hard`, an acquire fails, or with `overflow` is served for once, as many objects again. `destroy`,
   which may be null, is called once for each object before its memory is freed. */
struct sr_pool_options {
    size_t object_size;
    uint32_t initial;
    uint32_t soft;
    uint32_t hard;
    int overflow;
    void (*destroy)(void *object);
};

struct sr_pool_statistics {
    uint64_t acquired;
    uint64_t misses;
    uint64_t overflows;
    uint64_t purges;
    uint64_t in_use;
    uint64_t idle;
    uint64_t peak;
    uint64_t reserved_bytes;
};

/* Where buffers come from, if not from the system: page-locked memory, for example. Both functions
   are called without a lock of the pool, with or without the GIL, on any thread, and in the child of
   a fork. `alloc` returns memory that the CPU can write, at a multiple of `alignment`, a power of
   two, or null when there is none; `free` gets what `alloc` returned and the size it was asked for.
   `ctx` must stay good until the pool is gone. */
struct sr_memory {
    void *(*alloc)(void *ctx, size_t size, size_t alignment);
    void (*free)(void *ctx, void *memory, size_t size);
    void *ctx;
};

/* Limits in numbers and in bytes; `soft` is what maintenance leaves idle at most. `memory` may be
   null, and is copied. */
struct sr_audio_options {
    uint32_t soft;
    uint32_t hard;
    size_t soft_bytes;
    size_t hard_bytes;
    int overflow;
    const struct sr_memory *memory;
};

struct sr_audio_statistics {
    uint64_t acquired;
    uint64_t misses;
    uint64_t overflows;
    uint64_t purges;
    uint64_t kept;
    uint64_t in_use;
    uint64_t idle;
    uint64_t peak;
    uint64_t in_use_bytes;
    uint64_t idle_bytes;
};
