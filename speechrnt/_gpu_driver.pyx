"""The NVIDIA driver, through cuda-bindings; see the declarations, which C code uses.

In Python, this module tells what a device is. It cannot be imported without cuda-bindings.
"""

from cuda.bindings cimport cydriver
from libc.stdint cimport uint64_t
from libc.string cimport memset

import operator

from speechrnt.errors import GpuError, GpuUnavailable, OptionError

__all__ = ["device_count", "device_memory", "device_name"]


# Contexts and devices

cdef int retain_context(int device, void **context) noexcept nogil:
    return cydriver.cuDevicePrimaryCtxRetain(<cydriver.CUcontext *> context, device)


# What must not stay behind is tried twice, as nobody could do anything about it later.

cdef int release_context(int device) noexcept nogil:
    cdef int code = cydriver.cuDevicePrimaryCtxRelease(device)
    return code if code == 0 else <int> cydriver.cuDevicePrimaryCtxRelease(device)


cdef int push_context(void *context) noexcept nogil:
    return cydriver.cuCtxPushCurrent(<cydriver.CUcontext> context)


cdef int pop_context() noexcept nogil:
    cdef cydriver.CUcontext context
    cdef int code = cydriver.cuCtxPopCurrent(&context)
    return code if code == 0 else <int> cydriver.cuCtxPopCurrent(&context)


cdef cydriver.CUmemAllocationProp on_device(int device) noexcept nogil:
    cdef cydriver.CUmemAllocationProp properties
    memset(&properties, 0, sizeof(properties))
    properties.type = cydriver.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = cydriver.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device
    return properties


cdef int describe(int device, size_t *total, size_t *granularity, int *vmm) noexcept nogil:
    cdef int code = cydriver.cuDeviceTotalMem(total, device)
    cdef cydriver.CUmemAllocationProp properties = on_device(device)
    if code == 0:
        code = cydriver.cuDeviceGetAttribute(
            vmm, cydriver.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device
        )
    if code == 0 and vmm[0]:
        code = cydriver.cuMemGetAllocationGranularity(
            granularity, &properties, cydriver.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        )
    return code


# Memory

cdef int reserve(uint64_t *address, size_t size) noexcept nogil:
    return cydriver.cuMemAddressReserve(<cydriver.CUdeviceptr *> address, size, 0, 0, 0)


cdef int unreserve(uint64_t address, size_t size) noexcept nogil:
    return cydriver.cuMemAddressFree(address, size)


cdef int create(int device, uint64_t *physical, size_t size) noexcept nogil:
    cdef cydriver.CUmemAllocationProp properties = on_device(device)
    return cydriver.cuMemCreate(
        <cydriver.CUmemGenericAllocationHandle *> physical, size, &properties, 0
    )


cdef int release(uint64_t physical) noexcept nogil:
    return cydriver.cuMemRelease(physical)


cdef int map_chunk(uint64_t address, size_t size, uint64_t physical) noexcept nogil:
    return cydriver.cuMemMap(address, size, 0, physical, 0)


cdef int allow(int device, uint64_t address, size_t size) noexcept nogil:
    cdef cydriver.CUmemAccessDesc access
    access.location.type = cydriver.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = device
    access.flags = cydriver.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return cydriver.cuMemSetAccess(address, size, &access, 1)


cdef int unmap(uint64_t address, size_t size) noexcept nogil:
    return cydriver.cuMemUnmap(address, size)


cdef int alloc(uint64_t *address, size_t size) noexcept nogil:
    return cydriver.cuMemAlloc(<cydriver.CUdeviceptr *> address, size)


cdef int free(uint64_t address) noexcept nogil:
    return cydriver.cuMemFree(address)


cdef int trim_mempool(int device) noexcept nogil:
    # Memory that was freed on a stream counts as used until the host has seen the stream get there.
    cdef cydriver.CUmemoryPool pool
    cdef int code = cydriver.cuDeviceGetMemPool(&pool, device)
    if code == 0:
        code = cydriver.cuCtxSynchronize()
    if code == 0:
        code = cydriver.cuMemPoolTrimTo(pool, 0)
    return code


cdef int pinned_alloc(void **memory, size_t size) noexcept nogil:
    return cydriver.cuMemHostAlloc(memory, size, cydriver.CU_MEMHOSTALLOC_PORTABLE)


cdef int pinned_free(void *memory) noexcept nogil:
    cdef int code = cydriver.cuMemFreeHost(memory)
    return code if code == 0 else <int> cydriver.cuMemFreeHost(memory)


# Streams, events and copies

cdef int event_create(void **event) noexcept nogil:
    return cydriver.cuEventCreate(
        <cydriver.CUevent *> event, cydriver.CU_EVENT_DISABLE_TIMING
    )


cdef int event_destroy(void *event) noexcept nogil:
    cdef int code = cydriver.cuEventDestroy(<cydriver.CUevent> event)
    return code if code == 0 else <int> cydriver.cuEventDestroy(<cydriver.CUevent> event)


cdef int event_record(void *event, void *stream) noexcept nogil:
    return cydriver.cuEventRecord(<cydriver.CUevent> event, <cydriver.CUstream> stream)


cdef int event_query(void *event) noexcept nogil:
    return cydriver.cuEventQuery(<cydriver.CUevent> event)


cdef int event_synchronize(void *event) noexcept nogil:
    return cydriver.cuEventSynchronize(<cydriver.CUevent> event)


cdef int stream_synchronize(void *stream) noexcept nogil:
    return cydriver.cuStreamSynchronize(<cydriver.CUstream> stream)


cdef int stream_create(void **stream) noexcept nogil:
    # One that does not wait for the legacy default stream, which CTranslate2 uses in one thread.
    return cydriver.cuStreamCreate(<cydriver.CUstream *> stream, cydriver.CU_STREAM_NON_BLOCKING)


cdef int stream_destroy(void *stream) noexcept nogil:
    cdef int code = cydriver.cuStreamDestroy(<cydriver.CUstream> stream)
    return code if code == 0 else <int> cydriver.cuStreamDestroy(<cydriver.CUstream> stream)


cdef int stream_query(void *stream) noexcept nogil:
    return cydriver.cuStreamQuery(<cydriver.CUstream> stream)


cdef int stream_wait(void *stream, void *event) noexcept nogil:
    return cydriver.cuStreamWaitEvent(<cydriver.CUstream> stream, <cydriver.CUevent> event, 0)


cdef int copy_to_device(uint64_t to, const void *source, size_t size, void *stream) noexcept nogil:
    return cydriver.cuMemcpyHtoDAsync(to, source, size, <cydriver.CUstream> stream)


cdef int copy_to_host(void *to, uint64_t source, size_t size, void *stream) noexcept nogil:
    return cydriver.cuMemcpyDtoHAsync(to, source, size, <cydriver.CUstream> stream)


cdef int copy_on_device(uint64_t to, uint64_t source, size_t size, void *stream) noexcept nogil:
    return cydriver.cuMemcpyDtoDAsync(to, source, size, <cydriver.CUstream> stream)


cdef sr_gpu_driver table
table.retain_context = retain_context
table.release_context = release_context
table.describe = describe
table.push_context = push_context
table.pop_context = pop_context
table.reserve = reserve
table.unreserve = unreserve
table.create = create
table.release = release
table.map = map_chunk
table.allow = allow
table.unmap = unmap
table.alloc = alloc
table.free = free
table.event_create = event_create
table.event_destroy = event_destroy
table.event_record = event_record
table.event_query = event_query
table.event_synchronize = event_synchronize
table.stream_synchronize = stream_synchronize
table.trim_mempool = trim_mempool


cdef const sr_gpu_driver *gpu_driver() noexcept nogil:
    return &table


cdef str error_text(int code):
    cdef const char *name = NULL
    cydriver.cuGetErrorName(<cydriver.CUresult> code, &name)
    return f"{name.decode()} ({code})" if name else f"error {code}"


cdef int start_driver() except -1:
    # What cuda-bindings raises when there is no driver depends on its version.
    try:
        code = <int> cydriver.cuInit(0)
    except Exception as error:
        raise GpuUnavailable(f"the NVIDIA driver cannot be loaded: {error}") from error
    if code != 0:
        raise GpuUnavailable(f"the NVIDIA driver cannot be used: {error_text(code)}")
    return 0


cdef int check(int code, str what) except -1:
    if code != 0:
        raise GpuError(f"{what} failed: {error_text(code)}")
    return 0


def device_count():
    """Return the number of GPUs.

    Raises
    ------
    GpuUnavailable
        There is no driver that works.
    """
    cdef int count = 0
    start_driver()
    check(cydriver.cuDeviceGetCount(&count), "counting the GPUs")
    return count


cdef int device_number(object device) except -1:
    count = device_count()
    try:
        number = operator.index(device)
    except TypeError:
        raise OptionError(f"device must be the number of a GPU, not {device!r}") from None
    if not 0 <= number < count:
        raise OptionError(f"device must be from 0 to {count - 1}, not {device}")
    return number


def device_name(device):
    """Return the name of a GPU.

    Raises
    ------
    OptionError
        There is no such device.
    GpuUnavailable
        There is no driver that works.
    """
    cdef char[256] name
    cdef int number = device_number(device)
    check(cydriver.cuDeviceGetName(name, sizeof(name), number), "naming the GPU")
    return name.decode()


def device_memory(device):
    """Return the free and the total memory of a GPU, in bytes.

    Raises
    ------
    OptionError
        There is no such device.
    GpuUnavailable
        There is no driver that works.
    """
    cdef size_t free_bytes = 0
    cdef size_t total_bytes = 0
    cdef void *context = NULL
    cdef int code
    cdef int number = device_number(device)
    check(retain_context(number, &context), "using the GPU")
    code = push_context(context)
    if code == 0:
        code = cydriver.cuMemGetInfo(&free_bytes, &total_bytes)
        pop_context()
    release_context(number)
    check(code, "asking for the GPU's memory")
    return free_bytes, total_bytes
