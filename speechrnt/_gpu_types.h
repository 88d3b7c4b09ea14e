/* The plain types of the pool of GPU memory, shared by its headers and its .pxd. */

#pragma once

#include <stddef.h>
#include <stdint.h>

#include "_pool_types.h"

/* Beyond those of sr_status; values are part of the public C API (capi_gpu.pxd). */
enum sr_gpu_status {
    SR_DRIVER_ERROR = 16, /* the driver refused; the pool can be used further */
    SR_POISONED = 17,     /* the context is dead: nothing can be allocated any more */
    SR_FORKED = 18,       /* the process is a child of the one that made the pool */
};

enum sr_gpu_backing {
    SR_GPU_AUTO = 0,
    SR_GPU_VMM = 1,      /* one reserved address range, into which physical chunks are mapped */
    SR_GPU_SEGMENTS = 2, /* cuMemAlloc */
};

struct sr_gpu_pool;

/* Calls of the driver; each returns a CUresult. Those below `set_current` need the context. */
struct sr_gpu_driver {
    int (*retain_context)(int device, void **context);
    int (*release_context)(int device);
    int (*describe)(int device, size_t *total, size_t *granularity, int *vmm);
    int (*push_context)(void *context);
    int (*pop_context)(void);
    int (*reserve)(uint64_t *address, size_t size);
    int (*unreserve)(uint64_t address, size_t size);
    int (*create)(int device, uint64_t *physical, size_t size);
    int (*release)(uint64_t physical);
    int (*map)(uint64_t address, size_t size, uint64_t physical);
    int (*allow)(int device, uint64_t address, size_t size); /* reads and writes */
    int (*unmap)(uint64_t address, size_t size);
    int (*alloc)(uint64_t *address, size_t size);
    int (*free)(uint64_t address);
    int (*event_create)(void **event);
    int (*event_destroy)(void *event);
    int (*event_record)(void *event, void *stream);
    int (*event_query)(void *event);
    int (*event_synchronize)(void *event);
    int (*stream_synchronize)(void *stream);
    int (*trim_mempool)(int device); /* wait for the device; give back what its mempool idles */
};

/* Sizes in bytes. `limit` 0 is all memory of the device. */
struct sr_gpu_options {
    int device;
    int backing;
    size_t initial;
    size_t limit;
    size_t alignment;
    size_t chunk;
    int defragment;      /* on a miss, before growing */
    int trim_mempool;    /* on a failure of the device, before giving up */
};

struct sr_gpu_block {
    uint64_t handle;
    uint64_t address;
    size_t size; /* what the block takes in the pool: the request, rounded to the alignment */
};

#define SR_GPU_SIZE_CLASSES 48

struct sr_gpu_statistics {
    uint64_t allocations;
    uint64_t frees;
    uint64_t in_use_bytes;
    uint64_t requested_bytes;
    uint64_t pending_bytes; /* freed, but a stream may still use them */
    uint64_t reserved_bytes;
    uint64_t limit_bytes;
    uint64_t peak_bytes;
    uint64_t peak_reserved_bytes;
    uint64_t free_bytes;
    uint64_t largest_free_bytes;
    uint64_t pinned_free_bytes; /* in chunks that are partly used */
    uint64_t blocks;
    uint64_t free_blocks;
    uint64_t chunks;
    uint64_t splits;
    uint64_t merges;
    uint64_t grows;
    uint64_t trims;
    uint64_t defragmentations;
    uint64_t remapped_chunks;
    uint64_t retries; /* steps of the ladder after growth failed */
    uint64_t ooms;
    uint64_t fragmented_ooms; /* although as much was free */
    uint64_t by_size[SR_GPU_SIZE_CLASSES]; /* allocations of 2^i bytes and more */
    int vmm;
    int error; /* the CUresult that poisoned the pool, or 0 */
};

struct sr_gpu_defragmentation {
    uint64_t remapped_chunks;
    uint64_t largest_free_before;
    uint64_t largest_free_after;
};
