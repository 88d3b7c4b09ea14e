/* A test double of the NVIDIA driver, libcuda.so.1, in host memory.

   Device memory is memory of this process, so its contents can be checked; what is not allocated
   or not mapped faults when it is touched. All calls are counted and logged, any of them can be
   made to fail, and what a stream was given to do can be held back until a test lets it go.
   Functions named double_* are the tests' side of it.

   It is as strict as the driver where a mistake of a caller would matter: no context, a child of
   a fork, a range that is not mapped, a wrong alignment, memory given back while a stream still has
   to use it (counted as a hazard).

   One mutex guards everything. cuda-bindings needs of the library no more than
   cuGetProcAddress_v2, by which it asks for some 500 names; those not in the table do not exist. */

#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cuda.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_DEVICES 4
#define GRANULARITY ((size_t)2 << 20)
#define POOL_STEP ((size_t)32 << 20)
#define LOG_SIZE 65536
#define MAX_NAMES 128

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

/* Calls, their log and their faults */

struct call_count {
    const char *function; /* as __func__ has it */
    char name[64];        /* without the version that cuda.h gives some: cuMemAlloc_v2 */
    unsigned long count;
};

static struct call_count counts[MAX_NAMES];
static const char *call_log[LOG_SIZE];
static unsigned long total_calls;
static const char *fault_name;
static char fault_name_buffer[64];
static unsigned long fault_countdown, fault_times;
static int fault_code;
static int sticky_code;
static int initialised, deinitialised;
static pid_t owner;

static CUresult enter(const char *function) {
    pthread_mutex_lock(&mutex);
    struct call_count *call = counts;
    while (call->function != function && call->function != NULL) {
        ++call;
    }
    if (call->function == NULL) {
        call->function = function;
        snprintf(call->name, sizeof call->name, "%s", function);
        char *version = strstr(call->name, "_v");
        if (version != NULL) {
            *version = 0;
        }
    }
    ++call->count;
    const char *name = call->name;
    call_log[total_calls++ % LOG_SIZE] = name;
    if (deinitialised) {
        return CUDA_ERROR_DEINITIALIZED;
    }
    if (initialised && getpid() != owner) {
        return CUDA_ERROR_NOT_INITIALIZED;
    }
    if (sticky_code) {
        return (CUresult)sticky_code;
    }
    if (fault_times && (fault_name == NULL || strcmp(fault_name, name) == 0)) {
        if (fault_countdown > 1) {
            --fault_countdown;
        } else {
            --fault_times;
            return (CUresult)fault_code;
        }
    }
    return CUDA_SUCCESS;
}

static CUresult leave(CUresult result) {
    pthread_mutex_unlock(&mutex);
    return result;
}

#define ENTER_ALWAYS()                      \
    do {                                    \
        CUresult entered = enter(__func__); \
        if (entered)                        \
            return leave(entered);          \
    } while (0)
#define REQUIRE(condition, code) \
    do {                         \
        if (!(condition))        \
            return leave(code);  \
    } while (0)
#define ENTER()                                             \
    do {                                                    \
        ENTER_ALWAYS();                                     \
        REQUIRE(initialised, CUDA_ERROR_NOT_INITIALIZED);   \
    } while (0)
#define ENTER_IN_CONTEXT()                                   \
    do {                                                     \
        ENTER();                                             \
        REQUIRE(current != NULL, CUDA_ERROR_INVALID_CONTEXT); \
    } while (0)

/* Devices and contexts */

struct CUmemPoolHandle_st {
    int device;
    int is_default;
    int destroyed;
    size_t max_size;
    cuuint64_t threshold, used, used_high, reserved, reserved_high;
    int flags[3]; /* reuse policies, as set */
};

struct operation {
    enum { COPY, FILL, RECORD, WAIT, FREE_ASYNC } kind;
    struct operation *next;
    char *to;
    const char *from;
    char *snapshot; /* of a source that may change before the stream gets there */
    size_t size;
    int width;
    unsigned value;
    CUevent event;
    unsigned long record;
};

struct CUstream_st {
    struct CUstream_st *next;
    int device;
    int held;
    struct operation *first, *last;
};

struct CUctx_st {
    int device;
};

struct device {
    size_t capacity, used;
    int vmm, pools;
    unsigned retained;
    struct CUctx_st context;
    struct CUstream_st default_stream;
    struct CUmemPoolHandle_st default_pool;
    CUmemoryPool pool;
};

static struct device devices[MAX_DEVICES];

/* A test may have made the device smaller than what is in use. */
static size_t available_on(const struct device *device) {
    return device->used < device->capacity ? device->capacity - device->used : 0;
}
static int device_count = 1;
static __thread CUcontext stack[16];
static __thread int depth;
#define current (depth ? stack[depth - 1] : NULL)
#define HERE (&devices[current->device])

static unsigned long hazards;

/* What exists. Lists are short: tests look at correctness, not at the speed of the double. */

struct range {
    struct range *next;
    char *address;
    size_t size;
    int device;
    enum { PLAIN, PINNED, REGISTERED, RESERVED, MAPPED, POOLED } kind;
    int accessible;
    struct physical *physical;
    CUmemoryPool pool;
};

struct physical {
    int fd;
    int device;
    size_t size;
    unsigned mappings;
    int released;
};

struct CUevent_st {
    unsigned long recorded, done;
    CUstream stream;
};

static struct range *ranges;
static struct CUstream_st *streams;
static unsigned long n_physical, n_events, n_pools;

static struct range *add_range(char *address, size_t size, int kind) {
    struct range *range = calloc(1, sizeof *range);
    range->address = address;
    range->size = size;
    range->kind = kind;
    range->device = current ? current->device : 0;
    range->next = ranges;
    ranges = range;
    return range;
}

static struct range *find_range(const char *address, int kind) {
    for (struct range *range = ranges; range != NULL; range = range->next) {
        if (range->address == address && (int)range->kind == kind) {
            return range;
        }
    }
    return NULL;
}

static void drop_range(struct range *range) {
    struct range **link = &ranges;
    while (*link != range) {
        link = &(*link)->next;
    }
    *link = range->next;
    free(range);
}

static int is_pinned(const char *address, size_t size) {
    for (struct range *range = ranges; range != NULL; range = range->next) {
        if ((range->kind == PINNED || range->kind == REGISTERED) && address >= range->address &&
            address + size <= range->address + range->size) {
            return 1;
        }
    }
    return 0;
}

/* Whether all of the device memory may be touched; it may lie across several mappings. */
static int is_device(const char *address, size_t size) {
    const char *end = address + size;
    while (address < end) {
        struct range *range = ranges;
        for (; range != NULL; range = range->next) {
            if ((range->kind == PLAIN || range->kind == POOLED ||
                 (range->kind == MAPPED && range->accessible)) &&
                address >= range->address && address < range->address + range->size) {
                break;
            }
        }
        if (range == NULL) {
            return 0;
        }
        address = range->address + range->size;
    }
    return 1;
}

static void check_hazard(const char *address, size_t size) {
    for (int d = 0; d <= device_count; ++d) {
        CUstream stream = d < device_count ? &devices[d].default_stream : streams;
        while (stream != NULL) {
            for (struct operation *o = stream->first; o != NULL; o = o->next) {
                if ((o->to && o->to < address + size && address < o->to + o->size) ||
                    (o->from && o->from < address + size && address < o->from + o->size)) {
                    ++hazards;
                }
            }
            stream = d < device_count ? NULL : stream->next;
        }
    }
}

/* Mempools. What one has reserved and does not use can serve any size. */

static size_t rounded(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

static CUresult pool_take(CUmemoryPool pool, size_t size) {
    const size_t used = pool->used + size;
    if (used > pool->reserved) {
        const size_t reserved = rounded(used, POOL_STEP);
        struct device *device = &devices[pool->device];
        if ((pool->max_size && reserved > rounded(pool->max_size, POOL_STEP)) ||
            reserved - pool->reserved > available_on(device)) {
            return CUDA_ERROR_OUT_OF_MEMORY;
        }
        device->used += reserved - pool->reserved;
        pool->reserved = reserved;
    }
    pool->used = used;
    pool->used_high = used > pool->used_high ? used : pool->used_high;
    pool->reserved_high =
        pool->reserved > pool->reserved_high ? pool->reserved : pool->reserved_high;
    return CUDA_SUCCESS;
}

static void pool_shrink(CUmemoryPool pool, size_t keep) {
    size_t wanted = rounded(pool->used, POOL_STEP);
    wanted = wanted > keep ? wanted : keep;
    if (pool->reserved > wanted) {
        devices[pool->device].used -= pool->reserved - wanted;
        pool->reserved = wanted;
    }
}

static void pool_drop_if_unused(CUmemoryPool pool) {
    if (pool->destroyed && pool->used == 0) {
        pool_shrink(pool, 0);
        --n_pools;
        free(pool);
    }
}

static void after_synchronize(int device) {
    CUmemoryPool pools[] = {&devices[device].default_pool, devices[device].pool};
    for (int i = 0; i < 2; ++i) {
        pool_shrink(pools[i], pools[i]->threshold);
    }
}

static void give_back(char *address) {
    struct range *range = find_range(address, POOLED);
    CUmemoryPool pool = range->pool;
    check_hazard(range->address, range->size);
    munmap(range->address, range->size);
    pool->used -= range->size;
    drop_range(range);
    pool_drop_if_unused(pool);
}

/* Streams */

static CUstream stream_of(CUstream stream) {
    return stream == NULL || stream == CU_STREAM_LEGACY || stream == CU_STREAM_PER_THREAD
               ? &HERE->default_stream
               : stream;
}

static int is_stream(CUstream stream) {
    for (CUstream s = streams; s != NULL; s = s->next) {
        if (s == stream) {
            return 1;
        }
    }
    return stream == NULL || stream == CU_STREAM_LEGACY || stream == CU_STREAM_PER_THREAD;
}

static void run_until(CUevent event, unsigned long record);

static void run_one(CUstream stream) {
    struct operation *o = stream->first;
    stream->first = o->next;
    if (stream->first == NULL) {
        stream->last = NULL;
    }
    switch (o->kind) {
    case COPY:
        memmove(o->to, o->from ? o->from : o->snapshot, o->size);
        break;
    case FILL:
        for (size_t i = 0; i < o->size; i += o->width) {
            memcpy(o->to + i, &o->value, o->width);
        }
        break;
    case RECORD:
        o->event->done = o->record;
        break;
    case WAIT:
        run_until(o->event, o->record);
        break;
    case FREE_ASYNC:
        o->size = 0;
        give_back(o->to);
        break;
    }
    free(o->snapshot);
    free(o);
}

static void run_all(CUstream stream) {
    while (stream->first != NULL) {
        run_one(stream);
    }
}

/* The device gets there on its own, whatever is held: time passes while the host waits. */
static void run_until(CUevent event, unsigned long record) {
    while (event->done < record && event->stream != NULL && event->stream->first != NULL) {
        run_one(event->stream);
    }
}

static void submit(CUstream stream, struct operation operation) {
    struct operation *o = malloc(sizeof *o);
    *o = operation;
    o->next = NULL;
    if (stream->last) {
        stream->last->next = o;
    } else {
        stream->first = o;
    }
    stream->last = o;
    if (!stream->held) {
        run_all(stream);
    }
}

static void run_device(int device) {
    run_all(&devices[device].default_stream);
    for (CUstream stream = streams; stream != NULL; stream = stream->next) {
        if (stream->device == device) {
            run_all(stream);
        }
    }
}

/* The driver: initialisation and devices */

static void configure_device(int index) {
    struct device *device = &devices[index];
    memset(device, 0, sizeof *device);
    device->capacity = (size_t)8 << 30;
    device->vmm = device->pools = 1;
    device->context.device = index;
    device->default_stream.device = index;
    device->default_pool.device = index;
    device->default_pool.is_default = 1;
    device->pool = &device->default_pool;
}

static void deinitialise(void) { deinitialised = 1; }

CUresult cuInit(unsigned flags) {
    (void)flags;
    ENTER_ALWAYS();
    REQUIRE(device_count, CUDA_ERROR_NO_DEVICE);
    if (!initialised) {
        initialised = 1;
        owner = getpid();
        atexit(deinitialise);
        for (int i = 0; i < MAX_DEVICES; ++i) {
            if (devices[i].capacity == 0) {
                configure_device(i);
            }
        }
    }
    return leave(CUDA_SUCCESS);
}

CUresult cuDriverGetVersion(int *version) {
    ENTER_ALWAYS();
    *version = CUDA_VERSION;
    return leave(CUDA_SUCCESS);
}

CUresult cuDeviceGetCount(int *count) {
    ENTER();
    *count = device_count;
    return leave(CUDA_SUCCESS);
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    ENTER();
    REQUIRE(ordinal >= 0 && ordinal < device_count, CUDA_ERROR_INVALID_DEVICE);
    *device = ordinal;
    return leave(CUDA_SUCCESS);
}

#define REQUIRE_DEVICE(device) \
    REQUIRE((device) >= 0 && (device) < device_count, CUDA_ERROR_INVALID_DEVICE)

CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
    ENTER();
    REQUIRE_DEVICE(device);
    snprintf(name, size, "Test Double %d", device);
    return leave(CUDA_SUCCESS);
}

CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device) {
    ENTER();
    REQUIRE_DEVICE(device);
    *bytes = devices[device].capacity;
    return leave(CUDA_SUCCESS);
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    ENTER();
    REQUIRE_DEVICE(device);
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
        *value = devices[device].vmm;
        break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
        *value = devices[device].pools;
        break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
        *value = 9;
        break;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
        *value = 1;
        break;
    default:
        *value = 0;
    }
    return leave(CUDA_SUCCESS);
}

CUresult cuGetErrorName(CUresult error, const char **name) {
    static const struct {
        CUresult code;
        const char *name;
    } names[] = {
        {CUDA_SUCCESS, "CUDA_SUCCESS"},
        {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
        {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
        {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"},
        {CUDA_ERROR_DEINITIALIZED, "CUDA_ERROR_DEINITIALIZED"},
        {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE"},
        {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
        {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
        {CUDA_ERROR_ECC_UNCORRECTABLE, "CUDA_ERROR_ECC_UNCORRECTABLE"},
        {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
        {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
        {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY"},
        {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
        {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED"},
        {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED"},
        {CUDA_ERROR_UNKNOWN, "CUDA_ERROR_UNKNOWN"},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; ++i) {
        if (names[i].code == error) {
            *name = names[i].name;
            return CUDA_SUCCESS;
        }
    }
    *name = NULL;
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    (void)error;
    *text = "an error of the test double";
    return CUDA_SUCCESS;
}

/* Contexts */

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    ENTER();
    REQUIRE_DEVICE(device);
    ++devices[device].retained;
    *context = &devices[device].context;
    return leave(CUDA_SUCCESS);
}

CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
    ENTER();
    REQUIRE_DEVICE(device);
    REQUIRE(devices[device].retained > 0, CUDA_ERROR_INVALID_CONTEXT);
    --devices[device].retained;
    return leave(CUDA_SUCCESS);
}

CUresult cuCtxGetCurrent(CUcontext *context) {
    ENTER();
    *context = current;
    return leave(CUDA_SUCCESS);
}

CUresult cuCtxSetCurrent(CUcontext context) {
    ENTER();
    REQUIRE(context == NULL || devices[context->device].retained, CUDA_ERROR_INVALID_CONTEXT);
    if (depth == 0) {
        depth = context != NULL;
    }
    if (context == NULL) {
        depth -= depth > 0;
    } else {
        stack[depth - 1] = context;
    }
    return leave(CUDA_SUCCESS);
}

CUresult cuCtxPushCurrent(CUcontext context) {
    ENTER();
    REQUIRE(context != NULL && devices[context->device].retained, CUDA_ERROR_INVALID_CONTEXT);
    REQUIRE(depth < 16, CUDA_ERROR_UNKNOWN);
    stack[depth++] = context;
    return leave(CUDA_SUCCESS);
}

CUresult cuCtxPopCurrent(CUcontext *context) {
    ENTER();
    REQUIRE(depth > 0, CUDA_ERROR_INVALID_CONTEXT);
    --depth;
    if (context != NULL) {
        *context = stack[depth];
    }
    return leave(CUDA_SUCCESS);
}

CUresult cuCtxGetDevice(CUdevice *device) {
    ENTER_IN_CONTEXT();
    *device = current->device;
    return leave(CUDA_SUCCESS);
}

CUresult cuCtxSynchronize(void) {
    ENTER_IN_CONTEXT();
    run_device(current->device);
    after_synchronize(current->device);
    return leave(CUDA_SUCCESS);
}

/* Plain memory */

static char *map(size_t size) {
    void *address = mmap(NULL, size, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return address == MAP_FAILED ? NULL : address;
}

CUresult cuMemGetInfo(size_t *available, size_t *total) {
    ENTER_IN_CONTEXT();
    *available = available_on(HERE);
    *total = HERE->capacity;
    return leave(CUDA_SUCCESS);
}

CUresult cuMemAlloc(CUdeviceptr *pointer, size_t size) {
    ENTER_IN_CONTEXT();
    REQUIRE(size > 0, CUDA_ERROR_INVALID_VALUE);
    const size_t whole = rounded(size, 4096);
    REQUIRE(whole <= available_on(HERE), CUDA_ERROR_OUT_OF_MEMORY);
    char *address = map(whole);
    REQUIRE(address != NULL, CUDA_ERROR_OUT_OF_MEMORY);
    HERE->used += whole;
    add_range(address, whole, PLAIN);
    *pointer = (CUdeviceptr)address;
    return leave(CUDA_SUCCESS);
}

CUresult cuMemFree(CUdeviceptr pointer) {
    ENTER_IN_CONTEXT();
    if (pointer == 0) {
        return leave(CUDA_SUCCESS);
    }
    struct range *range = find_range((char *)pointer, PLAIN);
    REQUIRE(range != NULL, CUDA_ERROR_INVALID_VALUE);
    run_device(range->device); /* as the driver does */
    munmap(range->address, range->size);
    devices[range->device].used -= range->size;
    drop_range(range);
    return leave(CUDA_SUCCESS);
}

/* Pinned host memory */

CUresult cuMemHostAlloc(void **pointer, size_t size, unsigned flags) {
    (void)flags;
    ENTER_IN_CONTEXT();
    REQUIRE(size > 0, CUDA_ERROR_INVALID_VALUE);
    const size_t whole = rounded(size, 4096);
    *pointer = map(whole);
    REQUIRE(*pointer != NULL, CUDA_ERROR_OUT_OF_MEMORY);
    add_range(*pointer, whole, PINNED);
    return leave(CUDA_SUCCESS);
}

CUresult cuMemFreeHost(void *pointer) {
    ENTER_IN_CONTEXT();
    struct range *range = find_range(pointer, PINNED);
    REQUIRE(range != NULL, CUDA_ERROR_INVALID_VALUE);
    check_hazard(range->address, range->size);
    munmap(range->address, range->size);
    drop_range(range);
    return leave(CUDA_SUCCESS);
}

CUresult cuMemHostRegister(void *pointer, size_t size, unsigned flags) {
    (void)flags;
    ENTER_IN_CONTEXT();
    REQUIRE(size > 0, CUDA_ERROR_INVALID_VALUE);
    add_range(pointer, size, REGISTERED);
    return leave(CUDA_SUCCESS);
}

CUresult cuMemHostUnregister(void *pointer) {
    ENTER_IN_CONTEXT();
    struct range *range = find_range(pointer, REGISTERED);
    REQUIRE(range != NULL, CUDA_ERROR_INVALID_VALUE);
    drop_range(range);
    return leave(CUDA_SUCCESS);
}

/* Virtual memory management */

CUresult cuMemGetAllocationGranularity(size_t *granularity, const CUmemAllocationProp *prop,
                                       CUmemAllocationGranularity_flags option) {
    (void)option;
    ENTER();
    REQUIRE_DEVICE(prop->location.id);
    *granularity = GRANULARITY;
    return leave(CUDA_SUCCESS);
}

CUresult cuMemAddressReserve(CUdeviceptr *pointer, size_t size, size_t alignment, CUdeviceptr hint,
                             unsigned long long flags) {
    (void)hint;
    (void)flags;
    ENTER();
    REQUIRE(size > 0 && size % GRANULARITY == 0, CUDA_ERROR_INVALID_VALUE);
    REQUIRE((alignment & (alignment - 1)) == 0, CUDA_ERROR_INVALID_VALUE);
    alignment = alignment > GRANULARITY ? alignment : GRANULARITY;
    char *address = mmap(NULL, size + alignment, PROT_NONE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    REQUIRE(address != MAP_FAILED, CUDA_ERROR_OUT_OF_MEMORY);
    const size_t head = -(size_t)address & (alignment - 1);
    if (head) {
        munmap(address, head);
    }
    munmap(address + head + size, alignment - head);
    add_range(address + head, size, RESERVED);
    *pointer = (CUdeviceptr)(address + head);
    return leave(CUDA_SUCCESS);
}

CUresult cuMemAddressFree(CUdeviceptr pointer, size_t size) {
    ENTER();
    struct range *range = find_range((char *)pointer, RESERVED);
    REQUIRE(range != NULL && range->size == size, CUDA_ERROR_INVALID_VALUE);
    for (struct range *r = ranges; r != NULL; r = r->next) {
        REQUIRE(r->kind != MAPPED || r->address < range->address ||
                    r->address >= range->address + size,
                CUDA_ERROR_INVALID_VALUE);
    }
    munmap(range->address, size);
    drop_range(range);
    return leave(CUDA_SUCCESS);
}

CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size,
                     const CUmemAllocationProp *prop, unsigned long long flags) {
    (void)flags;
    ENTER();
    REQUIRE(size > 0 && size % GRANULARITY == 0, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(prop->type == CU_MEM_ALLOCATION_TYPE_PINNED &&
                prop->location.type == CU_MEM_LOCATION_TYPE_DEVICE,
            CUDA_ERROR_INVALID_VALUE);
    REQUIRE_DEVICE(prop->location.id);
    struct device *device = &devices[prop->location.id];
    REQUIRE(device->vmm, CUDA_ERROR_NOT_SUPPORTED);
    REQUIRE(size <= available_on(device), CUDA_ERROR_OUT_OF_MEMORY);
    const int fd = memfd_create("device memory", MFD_CLOEXEC);
    REQUIRE(fd >= 0 && ftruncate(fd, size) == 0, CUDA_ERROR_OUT_OF_MEMORY);
    struct physical *physical = calloc(1, sizeof *physical);
    physical->fd = fd;
    physical->device = prop->location.id;
    physical->size = size;
    device->used += size;
    ++n_physical;
    *handle = (CUmemGenericAllocationHandle)physical;
    return leave(CUDA_SUCCESS);
}

static void drop_physical_if_unused(struct physical *physical) {
    if (physical->released && physical->mappings == 0) {
        devices[physical->device].used -= physical->size;
        --n_physical;
        close(physical->fd);
        free(physical);
    }
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    ENTER();
    struct physical *physical = (struct physical *)handle;
    REQUIRE(physical != NULL && !physical->released, CUDA_ERROR_INVALID_VALUE);
    physical->released = 1;
    drop_physical_if_unused(physical);
    return leave(CUDA_SUCCESS);
}

CUresult cuMemMap(CUdeviceptr pointer, size_t size, size_t offset,
                  CUmemGenericAllocationHandle handle, unsigned long long flags) {
    (void)flags;
    ENTER();
    struct physical *physical = (struct physical *)handle;
    char *address = (char *)pointer;
    REQUIRE(offset == 0 && size == physical->size && pointer % GRANULARITY == 0,
            CUDA_ERROR_INVALID_VALUE);
    int reserved = 0;
    for (struct range *range = ranges; range != NULL; range = range->next) {
        const int apart = address + size <= range->address || range->address + range->size <= address;
        REQUIRE(range->kind != MAPPED || apart, CUDA_ERROR_INVALID_VALUE);
        reserved |= range->kind == RESERVED && address >= range->address &&
                    address + size <= range->address + range->size;
    }
    REQUIRE(reserved, CUDA_ERROR_INVALID_VALUE);
    void *mapped = mmap(address, size, PROT_NONE, MAP_SHARED | MAP_FIXED, physical->fd, 0);
    REQUIRE(mapped == address, CUDA_ERROR_OUT_OF_MEMORY);
    ++physical->mappings;
    add_range(address, size, MAPPED)->physical = physical;
    return leave(CUDA_SUCCESS);
}

/* Calls do for each mapping of the range, which must consist of whole ones; 0 if it does not. */
static int over_mappings(char *address, size_t size, void (*apply)(struct range *)) {
    char *end = address + size;
    for (int pass = 0; pass < 2; ++pass) {
        for (char *at = address; at < end;) {
            struct range *range = find_range(at, MAPPED);
            if (range == NULL || at + range->size > end) {
                return 0;
            }
            at += range->size;
            if (pass == 1) {
                apply(range);
            }
        }
    }
    return 1;
}

static void make_accessible(struct range *range) {
    mprotect(range->address, range->size, PROT_READ | PROT_WRITE);
    range->accessible = 1;
}

static void unmap(struct range *range) {
    check_hazard(range->address, range->size);
    mmap(range->address, range->size, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    --range->physical->mappings;
    drop_physical_if_unused(range->physical);
    drop_range(range);
}

CUresult cuMemSetAccess(CUdeviceptr pointer, size_t size, const CUmemAccessDesc *access,
                        size_t count) {
    ENTER();
    REQUIRE(count == 1 && access->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
            CUDA_ERROR_INVALID_VALUE);
    REQUIRE(over_mappings((char *)pointer, size, make_accessible), CUDA_ERROR_INVALID_VALUE);
    return leave(CUDA_SUCCESS);
}

CUresult cuMemUnmap(CUdeviceptr pointer, size_t size) {
    ENTER();
    REQUIRE(over_mappings((char *)pointer, size, unmap), CUDA_ERROR_INVALID_VALUE);
    return leave(CUDA_SUCCESS);
}

/* Streams and events */

CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
    (void)flags;
    ENTER_IN_CONTEXT();
    *stream = calloc(1, sizeof **stream);
    (*stream)->device = current->device;
    (*stream)->next = streams;
    streams = *stream;
    return leave(CUDA_SUCCESS);
}

CUresult cuStreamDestroy(CUstream stream) {
    ENTER_IN_CONTEXT();
    CUstream *link = &streams;
    while (*link != NULL && *link != stream) {
        link = &(*link)->next;
    }
    REQUIRE(*link != NULL, CUDA_ERROR_INVALID_HANDLE);
    run_all(stream);
    *link = stream->next;
    free(stream);
    return leave(CUDA_SUCCESS);
}

CUresult cuStreamSynchronize(CUstream stream) {
    ENTER_IN_CONTEXT();
    REQUIRE(is_stream(stream), CUDA_ERROR_INVALID_HANDLE);
    stream = stream_of(stream);
    run_all(stream);
    after_synchronize(stream->device);
    return leave(CUDA_SUCCESS);
}

CUresult cuStreamQuery(CUstream stream) {
    ENTER_IN_CONTEXT();
    REQUIRE(is_stream(stream), CUDA_ERROR_INVALID_HANDLE);
    return leave(stream_of(stream)->first ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS);
}

CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
    (void)flags;
    ENTER_IN_CONTEXT();
    REQUIRE(is_stream(stream), CUDA_ERROR_INVALID_HANDLE);
    submit(stream_of(stream),
           (struct operation){.kind = WAIT, .event = event, .record = event->recorded});
    return leave(CUDA_SUCCESS);
}

CUresult cuEventCreate(CUevent *event, unsigned flags) {
    (void)flags;
    ENTER_IN_CONTEXT();
    *event = calloc(1, sizeof **event);
    ++n_events;
    return leave(CUDA_SUCCESS);
}

CUresult cuEventDestroy(CUevent event) {
    ENTER_IN_CONTEXT();
    run_until(event, event->recorded);
    --n_events;
    free(event);
    return leave(CUDA_SUCCESS);
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
    ENTER_IN_CONTEXT();
    REQUIRE(is_stream(stream), CUDA_ERROR_INVALID_HANDLE);
    run_until(event, event->recorded); /* one outstanding record an event is all that we keep */
    event->stream = stream_of(stream);
    ++event->recorded;
    submit(event->stream,
           (struct operation){.kind = RECORD, .event = event, .record = event->recorded});
    return leave(CUDA_SUCCESS);
}

CUresult cuEventQuery(CUevent event) {
    ENTER_IN_CONTEXT();
    return leave(event->done < event->recorded ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS);
}

CUresult cuEventSynchronize(CUevent event) {
    ENTER_IN_CONTEXT();
    run_until(event, event->recorded);
    after_synchronize(current->device);
    return leave(CUDA_SUCCESS);
}

/* Copies. Memory that is not pinned is read before the call returns, as the driver stages it. */

static CUresult copy(CUstream stream, char *to, const char *from, size_t size, int to_device,
                     int from_device) {
    if ((to_device && !is_device(to, size)) || (from_device && !is_device(from, size))) {
        sticky_code = CUDA_ERROR_ILLEGAL_ADDRESS;
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    struct operation operation = {.kind = COPY, .to = to, .from = from, .size = size};
    if (!from_device && !is_pinned(from, size)) {
        operation.snapshot = malloc(size);
        memcpy(operation.snapshot, from, size);
        operation.from = NULL;
    }
    submit(stream, operation);
    if (!to_device && !is_pinned(to, size)) {
        run_all(stream);
    }
    return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t size) {
    ENTER_IN_CONTEXT();
    CUresult result = copy(&HERE->default_stream, (char *)to, from, size, 1, 0);
    run_all(&HERE->default_stream);
    return leave(result);
}

CUresult cuMemcpyDtoH(void *to, CUdeviceptr from, size_t size) {
    ENTER_IN_CONTEXT();
    CUresult result = copy(&HERE->default_stream, to, (char *)from, size, 0, 1);
    run_all(&HERE->default_stream);
    return leave(result);
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
    ENTER_IN_CONTEXT();
    REQUIRE(is_stream(stream), CUDA_ERROR_INVALID_HANDLE);
    return leave(copy(stream_of(stream), (char *)to, from, size, 1, 0));
}

CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t size, CUstream stream) {
    ENTER_IN_CONTEXT();
    REQUIRE(is_stream(stream), CUDA_ERROR_INVALID_HANDLE);
    return leave(copy(stream_of(stream), to, (char *)from, size, 0, 1));
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
    ENTER_IN_CONTEXT();
    REQUIRE(is_stream(stream), CUDA_ERROR_INVALID_HANDLE);
    return leave(copy(stream_of(stream), (char *)to, (char *)from, size, 1, 1));
}

static CUresult fill(CUstream stream, CUdeviceptr to, unsigned value, int width, size_t size) {
    if (!is_device((char *)to, size)) {
        sticky_code = CUDA_ERROR_ILLEGAL_ADDRESS;
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    submit(stream, (struct operation){
                       .kind = FILL, .to = (char *)to, .size = size, .width = width, .value = value});
    return CUDA_SUCCESS;
}

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
    ENTER_IN_CONTEXT();
    REQUIRE(is_stream(stream), CUDA_ERROR_INVALID_HANDLE);
    return leave(fill(stream_of(stream), to, value, 1, count));
}

CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
    ENTER_IN_CONTEXT();
    REQUIRE(is_stream(stream), CUDA_ERROR_INVALID_HANDLE);
    return leave(fill(stream_of(stream), to, value, 4, 4 * count));
}

/* Stream-ordered memory */

CUresult cuDeviceGetDefaultMemPool(CUmemoryPool *pool, CUdevice device) {
    ENTER();
    REQUIRE_DEVICE(device);
    REQUIRE(devices[device].pools, CUDA_ERROR_NOT_SUPPORTED);
    *pool = &devices[device].default_pool;
    return leave(CUDA_SUCCESS);
}

CUresult cuDeviceGetMemPool(CUmemoryPool *pool, CUdevice device) {
    ENTER();
    REQUIRE_DEVICE(device);
    REQUIRE(devices[device].pools, CUDA_ERROR_NOT_SUPPORTED);
    *pool = devices[device].pool;
    return leave(CUDA_SUCCESS);
}

CUresult cuDeviceSetMemPool(CUdevice device, CUmemoryPool pool) {
    ENTER();
    REQUIRE_DEVICE(device);
    REQUIRE(pool->device == device, CUDA_ERROR_INVALID_VALUE);
    devices[device].pool = pool;
    return leave(CUDA_SUCCESS);
}

CUresult cuMemPoolCreate(CUmemoryPool *pool, const CUmemPoolProps *props) {
    ENTER();
    REQUIRE(props->allocType == CU_MEM_ALLOCATION_TYPE_PINNED &&
                props->location.type == CU_MEM_LOCATION_TYPE_DEVICE,
            CUDA_ERROR_INVALID_VALUE);
    REQUIRE_DEVICE(props->location.id);
    REQUIRE(devices[props->location.id].pools, CUDA_ERROR_NOT_SUPPORTED);
    *pool = calloc(1, sizeof **pool);
    (*pool)->device = props->location.id;
    (*pool)->max_size = props->maxSize;
    ++n_pools;
    return leave(CUDA_SUCCESS);
}

CUresult cuMemPoolDestroy(CUmemoryPool pool) {
    ENTER();
    REQUIRE(!pool->is_default && !pool->destroyed, CUDA_ERROR_INVALID_VALUE);
    if (devices[pool->device].pool == pool) {
        devices[pool->device].pool = &devices[pool->device].default_pool;
    }
    pool->destroyed = 1;
    pool_drop_if_unused(pool);
    return leave(CUDA_SUCCESS);
}

CUresult cuMemPoolTrimTo(CUmemoryPool pool, size_t keep) {
    ENTER();
    pool_shrink(pool, keep);
    return leave(CUDA_SUCCESS);
}

CUresult cuMemPoolSetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute, void *value) {
    ENTER();
    switch (attribute) {
    case CU_MEMPOOL_ATTR_RELEASE_THRESHOLD:
        pool->threshold = *(cuuint64_t *)value;
        break;
    case CU_MEMPOOL_ATTR_USED_MEM_HIGH:
        REQUIRE(*(cuuint64_t *)value == 0, CUDA_ERROR_INVALID_VALUE);
        pool->used_high = pool->used;
        break;
    case CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH:
        REQUIRE(*(cuuint64_t *)value == 0, CUDA_ERROR_INVALID_VALUE);
        pool->reserved_high = pool->reserved;
        break;
    case CU_MEMPOOL_ATTR_REUSE_FOLLOW_EVENT_DEPENDENCIES:
    case CU_MEMPOOL_ATTR_REUSE_ALLOW_OPPORTUNISTIC:
    case CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES:
        pool->flags[attribute - CU_MEMPOOL_ATTR_REUSE_FOLLOW_EVENT_DEPENDENCIES] = *(int *)value;
        break;
    default:
        return leave(CUDA_ERROR_INVALID_VALUE);
    }
    return leave(CUDA_SUCCESS);
}

CUresult cuMemPoolGetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute, void *value) {
    ENTER();
    cuuint64_t *result = value;
    switch (attribute) {
    case CU_MEMPOOL_ATTR_RELEASE_THRESHOLD:
        *result = pool->threshold;
        break;
    case CU_MEMPOOL_ATTR_USED_MEM_CURRENT:
        *result = pool->used;
        break;
    case CU_MEMPOOL_ATTR_USED_MEM_HIGH:
        *result = pool->used_high;
        break;
    case CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT:
        *result = pool->reserved;
        break;
    case CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH:
        *result = pool->reserved_high;
        break;
    case CU_MEMPOOL_ATTR_REUSE_FOLLOW_EVENT_DEPENDENCIES:
    case CU_MEMPOOL_ATTR_REUSE_ALLOW_OPPORTUNISTIC:
    case CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES:
        *(int *)value = pool->flags[attribute - CU_MEMPOOL_ATTR_REUSE_FOLLOW_EVENT_DEPENDENCIES];
        break;
    default:
        return leave(CUDA_ERROR_INVALID_VALUE);
    }
    return leave(CUDA_SUCCESS);
}

static CUresult take_pooled(CUdeviceptr *pointer, size_t size, CUmemoryPool pool) {
    const size_t whole = rounded(size, 4096);
    if (size == 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    const CUresult result = pool_take(pool, whole);
    if (result) {
        return result;
    }
    char *address = map(whole);
    struct range *range = add_range(address, whole, POOLED);
    range->device = pool->device;
    range->pool = pool;
    *pointer = (CUdeviceptr)address;
    return CUDA_SUCCESS;
}

CUresult cuMemAllocAsync(CUdeviceptr *pointer, size_t size, CUstream stream) {
    ENTER_IN_CONTEXT();
    REQUIRE(is_stream(stream), CUDA_ERROR_INVALID_HANDLE);
    return leave(take_pooled(pointer, size, devices[stream_of(stream)->device].pool));
}

CUresult cuMemAllocFromPoolAsync(CUdeviceptr *pointer, size_t size, CUmemoryPool pool,
                                 CUstream stream) {
    ENTER_IN_CONTEXT();
    REQUIRE(is_stream(stream), CUDA_ERROR_INVALID_HANDLE);
    return leave(take_pooled(pointer, size, pool));
}

CUresult cuMemFreeAsync(CUdeviceptr pointer, CUstream stream) {
    ENTER_IN_CONTEXT();
    REQUIRE(is_stream(stream), CUDA_ERROR_INVALID_HANDLE);
    REQUIRE(find_range((char *)pointer, POOLED) != NULL, CUDA_ERROR_INVALID_VALUE);
    submit(stream_of(stream), (struct operation){.kind = FREE_ASYNC, .to = (char *)pointer});
    return leave(CUDA_SUCCESS);
}

/* By name */

#define ENTRY(name) {#name, (void *)name}
static const struct {
    const char *name;
    void *function;
} table[] = {
    ENTRY(cuInit),
    ENTRY(cuDriverGetVersion),
    ENTRY(cuDeviceGetCount),
    ENTRY(cuDeviceGet),
    ENTRY(cuDeviceGetName),
    ENTRY(cuDeviceTotalMem),
    ENTRY(cuDeviceGetAttribute),
    ENTRY(cuGetErrorName),
    ENTRY(cuGetErrorString),
    ENTRY(cuDevicePrimaryCtxRetain),
    ENTRY(cuDevicePrimaryCtxRelease),
    ENTRY(cuCtxGetCurrent),
    ENTRY(cuCtxSetCurrent),
    ENTRY(cuCtxPushCurrent),
    ENTRY(cuCtxPopCurrent),
    ENTRY(cuCtxGetDevice),
    ENTRY(cuCtxSynchronize),
    ENTRY(cuMemGetInfo),
    ENTRY(cuMemAlloc),
    ENTRY(cuMemFree),
    ENTRY(cuMemHostAlloc),
    ENTRY(cuMemFreeHost),
    ENTRY(cuMemHostRegister),
    ENTRY(cuMemHostUnregister),
    ENTRY(cuMemGetAllocationGranularity),
    ENTRY(cuMemAddressReserve),
    ENTRY(cuMemAddressFree),
    ENTRY(cuMemCreate),
    ENTRY(cuMemRelease),
    ENTRY(cuMemMap),
    ENTRY(cuMemSetAccess),
    ENTRY(cuMemUnmap),
    ENTRY(cuStreamCreate),
    ENTRY(cuStreamDestroy),
    ENTRY(cuStreamSynchronize),
    ENTRY(cuStreamQuery),
    ENTRY(cuStreamWaitEvent),
    ENTRY(cuEventCreate),
    ENTRY(cuEventDestroy),
    ENTRY(cuEventRecord),
    ENTRY(cuEventQuery),
    ENTRY(cuEventSynchronize),
    ENTRY(cuMemcpyHtoD),
    ENTRY(cuMemcpyDtoH),
    ENTRY(cuMemcpyHtoDAsync),
    ENTRY(cuMemcpyDtoHAsync),
    ENTRY(cuMemcpyDtoDAsync),
    ENTRY(cuMemsetD8Async),
    ENTRY(cuMemsetD32Async),
    ENTRY(cuDeviceGetDefaultMemPool),
    ENTRY(cuDeviceGetMemPool),
    ENTRY(cuDeviceSetMemPool),
    ENTRY(cuMemPoolCreate),
    ENTRY(cuMemPoolDestroy),
    ENTRY(cuMemPoolTrimTo),
    ENTRY(cuMemPoolSetAttribute),
    ENTRY(cuMemPoolGetAttribute),
    ENTRY(cuMemAllocAsync),
    ENTRY(cuMemAllocFromPoolAsync),
    ENTRY(cuMemFreeAsync),
    ENTRY(cuGetProcAddress),
};

CUresult cuGetProcAddress(const char *symbol, void **function, int version, cuuint64_t flags,
                          CUdriverProcAddressQueryResult *status) {
    (void)version;
    (void)flags;
    *function = NULL;
    for (size_t i = 0; i < sizeof table / sizeof *table; ++i) {
        if (strcmp(symbol, table[i].name) == 0) {
            *function = table[i].function;
        }
    }
    if (status != NULL) {
        *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    }
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

/* The tests' side */

/* Set up a device; before cuInit if its number is to count. */
EXPORT void double_configure(int count, int device, size_t capacity, int vmm, int pools) {
    pthread_mutex_lock(&mutex);
    device_count = count;
    if (count) {
        if (devices[device].capacity == 0) {
            configure_device(device);
        }
        devices[device].capacity = capacity;
        devices[device].vmm = vmm;
        devices[device].pools = pools;
    }
    pthread_mutex_unlock(&mutex);
}

/* Fail the n-th call from now, counting from 1, of one function or, with null, of any, and the
   calls after it up to `times` in all. With 0 times, nothing fails any more. */
EXPORT void double_fail(const char *name, unsigned long n, int code, unsigned long times) {
    pthread_mutex_lock(&mutex);
    if (name != NULL) {
        snprintf(fault_name_buffer, sizeof fault_name_buffer, "%s", name);
    }
    fault_name = name != NULL ? fault_name_buffer : NULL;
    fault_countdown = n;
    fault_code = code;
    fault_times = times;
    pthread_mutex_unlock(&mutex);
}

/* Whether an injected fault is still to come. */
EXPORT int double_fault_pending(void) { return fault_times != 0; }

/* From now on every call fails with this code, as with a dead context; 0 ends it. */
EXPORT void double_break(int code) { sticky_code = code; }
EXPORT void double_deinitialise(int yes) { deinitialised = yes; }

EXPORT unsigned long double_calls(const char *name) {
    pthread_mutex_lock(&mutex);
    unsigned long result = name == NULL ? total_calls : 0;
    for (struct call_count *c = counts; name != NULL && c->function != NULL; ++c) {
        if (strcmp(c->name, name) == 0) {
            result = c->count;
        }
    }
    pthread_mutex_unlock(&mutex);
    return result;
}

/* The name of the i-th call, counting from 0; null if it is not known any more. */
EXPORT const char *double_call(unsigned long i) {
    return i < total_calls && i + LOG_SIZE >= total_calls ? call_log[i % LOG_SIZE] : NULL;
}

EXPORT size_t double_used(int device) { return devices[device].used; }
EXPORT unsigned long double_hazards(void) { return hazards; }
EXPORT unsigned double_retained(int device) { return devices[device].retained; }

EXPORT unsigned long double_live(const char *what) {
    static const char *kinds[] = {"plain",    "pinned", "registered",
                                  "reserved", "mapped", "pooled"};
    unsigned long result = 0;
    pthread_mutex_lock(&mutex);
    if (strcmp(what, "physical") == 0) {
        result = n_physical;
    } else if (strcmp(what, "event") == 0) {
        result = n_events;
    } else if (strcmp(what, "pool") == 0) {
        result = n_pools;
    } else if (strcmp(what, "stream") == 0) {
        for (CUstream stream = streams; stream != NULL; stream = stream->next) {
            ++result;
        }
    } else {
        for (struct range *range = ranges; range != NULL; range = range->next) {
            result += strcmp(kinds[range->kind], what) == 0;
        }
    }
    pthread_mutex_unlock(&mutex);
    return result;
}

/* Hold back what the stream is given to do, or let it go. Null is device 0's default stream; one
   that was destroyed meanwhile does not matter. */
EXPORT void double_hold(CUstream stream, int held) {
    pthread_mutex_lock(&mutex);
    if (is_stream(stream)) {
        stream = stream != NULL ? stream : &devices[0].default_stream;
        stream->held = held;
        if (!held) {
            run_all(stream);
        }
    }
    pthread_mutex_unlock(&mutex);
}
