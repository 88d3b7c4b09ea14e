"""The NVIDIA driver, through cuda-bindings, as functions of plain types.

Each returns a CUresult, and none raises or takes the GIL, once `start_driver` has succeeded: it is
the first call that loads the driver. Streams, events and contexts are pointers, device memory and
physical memory 64-bit numbers.
"""

from libc.stdint cimport uint64_t

cdef extern from "_gpu_types.h":
    struct sr_gpu_driver:
        int (*retain_context)(int device, void **context) noexcept nogil
        int (*release_context)(int device) noexcept nogil
        int (*describe)(int device, size_t *total, size_t *granularity, int *vmm) noexcept nogil
        int (*push_context)(void *context) noexcept nogil
        int (*pop_context)() noexcept nogil
        int (*reserve)(uint64_t *address, size_t size) noexcept nogil
        int (*unreserve)(uint64_t address, size_t size) noexcept nogil
        int (*create)(int device, uint64_t *physical, size_t size) noexcept nogil
        int (*release)(uint64_t physical) noexcept nogil
        int (*map)(uint64_t address, size_t size, uint64_t physical) noexcept nogil
        int (*allow)(int device, uint64_t address, size_t size) noexcept nogil
        int (*unmap)(uint64_t address, size_t size) noexcept nogil
        int (*alloc)(uint64_t *address, size_t size) noexcept nogil
        int (*free)(uint64_t address) noexcept nogil
        int (*event_create)(void **event) noexcept nogil
        int (*event_destroy)(void *event) noexcept nogil
        int (*event_record)(void *event, void *stream) noexcept nogil
        int (*event_query)(void *event) noexcept nogil
        int (*event_synchronize)(void *event) noexcept nogil
        int (*stream_synchronize)(void *stream) noexcept nogil
        int (*trim_mempool)(int device) noexcept nogil

# All that the pool needs.
cdef const sr_gpu_driver *gpu_driver() noexcept nogil

# Load and initialise the driver; GpuUnavailable if that cannot be done.
cdef int start_driver() except -1

# The number of a device that exists; OptionError for others. Starts the driver.
cdef int device_number(object device) except -1

# "CUDA_ERROR_OUT_OF_MEMORY (2)"
cdef str error_text(int code)

cdef int stream_create(void **stream) noexcept nogil
cdef int stream_destroy(void *stream) noexcept nogil
cdef int stream_query(void *stream) noexcept nogil
cdef int stream_wait(void *stream, void *event) noexcept nogil
cdef int copy_to_device(uint64_t to, const void *source, size_t size, void *stream) noexcept nogil
cdef int copy_to_host(void *to, uint64_t source, size_t size, void *stream) noexcept nogil
cdef int copy_on_device(uint64_t to, uint64_t source, size_t size, void *stream) noexcept nogil
cdef int pinned_alloc(void **memory, size_t size) noexcept nogil
cdef int pinned_free(void *memory) noexcept nogil
