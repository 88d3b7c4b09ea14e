/* A pool of objects of one size, for code without the GIL: no lock and no malloc while warm.

   Slots are numbered. Their generations and links lie in one table that lives as long as the pool,
   so reading them through a stale handle is safe; their memory lies in chunks that come and go.
   Idle slots are in one of two places:

   - The depot, a Treiber stack ("Systems programming: coping with parallelism", IBM RJ 5118, 1986)
     linked by slot number. Its top carries a count of changes in the upper half, so that a top seen
     twice means that nothing beneath it moved in between, and a whole chain is taken by one
     compare-and-swap. A push releases, a pop acquires: what the last user wrote is visible to the
     next one.
   - A thread's magazine (Bonwick and Adams, "Magazines and vmem", USENIX 2001), which only its
     thread touches, refilled from and emptied into the depot by halves. Nobody can take from the
     magazine of another thread: trim raises `flushes`, and each thread empties its own at its next
     release or, unasked, at its exit.

   The mutex guards growth, trimming and the list of magazines. Lock order: registry, then pool.

   A child of fork has one thread. Both locks are taken before the fork and released after it, and
   the child puts into the depot whatever the generations say is idle.

   Included by _pools.pyx only, which owns the one copy of the registry. */

#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <pthread.h>
#include <vector>

#include "_pool_common.h"

namespace speechrnt_pools {

constexpr std::uint32_t kMagazineSlots = 32;
constexpr std::size_t kMaxObject = std::size_t{1} << 30;
constexpr std::size_t kChunkBytes = 64 * 1024;

struct Slot {
    std::atomic<std::uint32_t> generation;
    std::atomic<std::uint32_t> below;  // in the depot: number of the slot beneath, plus one
};

/* Read by statistics, written by its owner only: plain loads and stores, no read-modify-write. */
class Counter {
  public:
    void add_one() { value_.store(get() + 1, std::memory_order_relaxed); }
    std::uint64_t get() const { return value_.load(std::memory_order_relaxed); }

  private:
    std::atomic<std::uint64_t> value_{0};
};

struct alignas(64) Magazine {
    std::uint32_t slots[kMagazineSlots];
    std::uint32_t count = 0;
    std::uint32_t flushes = 0;  // of the pool, when this was last emptied
    Counter acquired;
    Counter released;
    bool owned = true;
};

struct Chunk {
    char *memory = nullptr;
    std::uint32_t idle = 0;    // scratch of trim
    double idle_since = -1.0;  // when maintenance first saw all of it idle; negative if it is not
};

struct FreeMemory {
    void operator()(void *memory) const { std::free(memory); }
};

}  // namespace speechrnt_pools

struct sr_pool {
    std::uint64_t serial;  // never reused, unlike the tag
    std::uint32_t tag;
    std::uint32_t magazine_slots;  // 0: the pool is too small to leave any in a thread
    std::uint32_t chunk_shift;
    std::uint32_t initial;
    std::uint32_t soft;
    std::uint32_t hard;
    std::uint32_t overflow_limit;
    std::size_t stride;
    void (*destroy)(void *object);
    std::unique_ptr<speechrnt_pools::Slot[], speechrnt_pools::FreeMemory> slots;
    std::vector<speechrnt_pools::Chunk> chunks;

    alignas(64) std::atomic<std::uint64_t> depot{0};  // changes << 32 | number of the top, plus one
    std::atomic<std::uint32_t> outside{0};            // slots that have memory and are not in the depot
    std::atomic<std::uint32_t> epoch_peak{0};
    std::atomic<std::uint32_t> peak{0};
    std::atomic<std::uint64_t> direct_acquired{0};  // by threads without a magazine
    std::atomic<std::uint64_t> direct_released{0};

    alignas(64) std::atomic<std::uint32_t> flushes{0};
    mutable std::mutex mutex;
    std::vector<std::unique_ptr<speechrnt_pools::Magazine>> magazines;
    std::vector<void *> overflow;                // objects beyond `hard`, null where vacant
    std::vector<std::uint32_t> vacant_overflow;  // indices into `overflow`
    std::uint32_t resident = 0;                  // slots with memory, overflow apart
    std::uint64_t misses = 0;
    std::uint64_t overflows = 0;
    std::uint64_t purges = 0;
    speechrnt_pools::Demand demand;
    double clock = 0;  // as of the last maintenance
    double epoch_start = 0;
};

namespace speechrnt_pools {

/* Pools by tag. Pools are made, threads meet them and leave, all rarely. */
inline std::mutex registry_mutex;
inline sr_pool *registry[kMaxTags];
inline std::uint64_t last_serial = 0;

/* Thread-locals at a fixed distance from the thread pointer, which spares each acquire and release
   the calls that find them. glibc has room for so few bytes in modules loaded late. */
#ifdef __GLIBC__
#define SPEECHRNT_STATIC_TLS [[gnu::tls_model("initial-exec")]]
#else
#define SPEECHRNT_STATIC_TLS
#endif

struct Binding {
    std::uint64_t serial;
    Magazine *magazine;
};

/* A thread's magazines by pool tag. An entry whose serial is not the pool's belongs to a pool that
   is gone. Plain data, so that reading it costs no initialization check. */
SPEECHRNT_STATIC_TLS inline thread_local Binding *bindings = nullptr;
SPEECHRNT_STATIC_TLS inline thread_local std::uint32_t n_bindings = 0;
SPEECHRNT_STATIC_TLS inline thread_local bool thread_exiting = false;

inline void raise_to(std::atomic<std::uint32_t> &maximum, std::uint32_t value) {
    std::uint32_t seen = maximum.load(std::memory_order_relaxed);
    while (seen < value && !maximum.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
    }
}

inline void count_outside(sr_pool *pool, std::uint32_t n) {
    const std::uint32_t now = pool->outside.fetch_add(n, std::memory_order_relaxed) + n;
    raise_to(pool->epoch_peak, now);
    raise_to(pool->peak, now);
}

inline std::uint64_t changed_top(std::uint64_t top, std::uint32_t number) {
    return ((top >> 32) + 1) << 32 | number;
}

/* Put slots, none of which anybody else can reach, into the depot. */
inline void depot_push(sr_pool *pool, const std::uint32_t *slots, std::uint32_t n) {
    for (std::uint32_t i = 1; i < n; ++i) {
        pool->slots[slots[i]].below.store(slots[i - 1] + 1, std::memory_order_relaxed);
    }
    std::uint64_t top = pool->depot.load(std::memory_order_relaxed);
    do {
        pool->slots[slots[0]].below.store(static_cast<std::uint32_t>(top), std::memory_order_relaxed);
    } while (!pool->depot.compare_exchange_weak(top, changed_top(top, slots[n - 1] + 1),
                                                std::memory_order_release,
                                                std::memory_order_relaxed));
}

/* Take up to `wanted` slots. The links may change while they are read; then the top has, too. */
inline std::uint32_t depot_pop(sr_pool *pool, std::uint32_t *slots, std::uint32_t wanted) {
    std::uint64_t top = pool->depot.load(std::memory_order_acquire);
    for (;;) {
        std::uint32_t n = 0;
        std::uint32_t number = static_cast<std::uint32_t>(top);
        while (number != 0 && n < wanted) {
            slots[n++] = number - 1;
            number = pool->slots[number - 1].below.load(std::memory_order_relaxed);
        }
        if (n == 0 || pool->depot.compare_exchange_weak(top, changed_top(top, number),
                                                        std::memory_order_acquire,
                                                        std::memory_order_acquire)) {
            return n;
        }
    }
}

inline void give_back(sr_pool *pool, Magazine *magazine, std::uint32_t keep) {
    const std::uint32_t n = magazine->count - keep;
    if (n == 0) {
        return;
    }
    std::uint32_t moved[kMagazineSlots];
    std::memcpy(moved, magazine->slots + keep, n * sizeof *moved);
    magazine->count = keep;
    depot_push(pool, moved, n);
    pool->outside.fetch_sub(n, std::memory_order_relaxed);
}

inline void disown(sr_pool *pool, Magazine *magazine) {
    give_back(pool, magazine, 0);
    magazine->owned = false;
}

struct AtThreadExit {
    ~AtThreadExit() {
        thread_exiting = true;  // destructors of other thread-locals may still use pools
        const std::lock_guard<std::mutex> registry_guard(registry_mutex);
        for (std::uint32_t tag = 0; tag < n_bindings; ++tag) {
            sr_pool *pool = registry[tag];
            if (pool != nullptr && pool->serial == bindings[tag].serial) {
                const std::lock_guard<std::mutex> pool_guard(pool->mutex);
                disown(pool, bindings[tag].magazine);
            }
        }
        n_bindings = 0;
        std::free(bindings);
    }
};

/* Give this thread a magazine of the pool; null when it has to do without one. */
inline Magazine *bind(sr_pool *pool) {
    if (thread_exiting) {
        return nullptr;
    }
    if (pool->tag >= n_bindings) {
        const std::uint32_t n = pool->tag + 16;
        void *grown = std::realloc(bindings, n * sizeof *bindings);
        if (grown == nullptr) {
            return nullptr;
        }
        bindings = static_cast<Binding *>(grown);
        std::memset(bindings + n_bindings, 0, (n - n_bindings) * sizeof *bindings);
        n_bindings = n;
    }
    static thread_local AtThreadExit at_thread_exit;
    (void)at_thread_exit;
    Magazine *magazine = nullptr;
    const std::lock_guard<std::mutex> guard(pool->mutex);
    for (const auto &candidate : pool->magazines) {
        if (!candidate->owned) {
            magazine = candidate.get();
            break;
        }
    }
    if (magazine == nullptr) {
        try {
            pool->magazines.push_back(std::make_unique<Magazine>());
        } catch (const std::bad_alloc &) {
            return nullptr;
        }
        magazine = pool->magazines.back().get();
    }
    magazine->owned = true;
    magazine->flushes = pool->flushes.load(std::memory_order_relaxed);
    bindings[pool->tag] = {pool->serial, magazine};
    return magazine;
}

inline Magazine *magazine_of(sr_pool *pool) {
    if (pool->magazine_slots == 0) {
        return nullptr;
    }
    if (pool->tag < n_bindings && bindings[pool->tag].serial == pool->serial) {
        return bindings[pool->tag].magazine;
    }
    return bind(pool);
}

inline std::uint32_t chunk_slots(const sr_pool *pool, std::size_t chunk) {
    const std::uint32_t first = static_cast<std::uint32_t>(chunk << pool->chunk_shift);
    return std::min(1u << pool->chunk_shift, pool->hard - first);
}

inline void *object_of(const sr_pool *pool, std::uint32_t index) {
    if (index >= pool->hard) {
        return pool->overflow[index - pool->hard];
    }
    const std::uint32_t mask = (1u << pool->chunk_shift) - 1;
    return pool->chunks[index >> pool->chunk_shift].memory + (index & mask) * pool->stride;
}

inline void *allocate_zeroed(std::size_t bytes) {
    void *memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory != nullptr) {
        std::memset(memory, 0, bytes);
    }
    return memory;
}

/* Add a chunk of idle slots; the caller holds the mutex and knows that resident < hard. */
inline bool grow(sr_pool *pool) {
    std::size_t chunk = 0;
    while (pool->chunks[chunk].memory != nullptr) {
        ++chunk;
    }
    const std::uint32_t n = chunk_slots(pool, chunk);
    void *memory = allocate_zeroed(n * pool->stride);
    if (memory == nullptr) {
        return false;
    }
    pool->chunks[chunk] = {static_cast<char *>(memory), 0, -1.0};
    pool->resident += n;
    const std::uint32_t first = static_cast<std::uint32_t>(chunk << pool->chunk_shift);
    for (std::uint32_t i = n; i-- > 0;) {
        const std::uint32_t index = first + i;
        depot_push(pool, &index, 1);
    }
    return true;
}

/* A slot beyond `hard`, with memory of its own; the caller holds the mutex. */
inline sr_status take_overflow(sr_pool *pool, std::uint32_t *index) {
    if (pool->vacant_overflow.empty() && pool->overflow.size() == pool->overflow_limit) {
        return SR_EXHAUSTED;
    }
    void *object = allocate_zeroed(pool->stride);
    if (object == nullptr) {
        return SR_NO_MEMORY;
    }
    std::uint32_t place;
    if (pool->vacant_overflow.empty()) {
        place = static_cast<std::uint32_t>(pool->overflow.size());
        pool->overflow.push_back(object);  // within the capacity reserved at the start
    } else {
        place = pool->vacant_overflow.back();
        pool->vacant_overflow.pop_back();
        pool->overflow[place] = object;
    }
    ++pool->overflows;
    count_outside(pool, 1);
    *index = pool->hard + place;
    return SR_OK;
}

inline void drop_overflow(sr_pool *pool, std::uint32_t index) {
    const std::lock_guard<std::mutex> guard(pool->mutex);
    void *object = pool->overflow[index - pool->hard];
    if (pool->destroy != nullptr) {
        pool->destroy(object);
    }
    std::free(object);
    pool->overflow[index - pool->hard] = nullptr;
    pool->vacant_overflow.push_back(index - pool->hard);
    pool->outside.fetch_sub(1, std::memory_order_relaxed);
}

/* Take up to `wanted` slots out of the depot, growing the pool if it is empty. */
inline sr_status take_from_depot(sr_pool *pool, std::uint32_t *slots, std::uint32_t wanted,
                              std::uint32_t *taken) {
    *taken = depot_pop(pool, slots, wanted);
    if (*taken == 0) {
        const std::lock_guard<std::mutex> guard(pool->mutex);
        *taken = depot_pop(pool, slots, wanted);  // another thread grew or trimmed it meanwhile
        if (*taken == 0) {
            if (pool->resident == pool->hard) {
                // Ask the other threads for what their magazines hold, for the next time.
                pool->flushes.fetch_add(1, std::memory_order_relaxed);
                *taken = 1;
                return take_overflow(pool, slots);
            }
            if (!grow(pool)) {
                return SR_NO_MEMORY;
            }
            ++pool->misses;
            *taken = depot_pop(pool, slots, wanted);
        }
    }
    count_outside(pool, *taken);
    return SR_OK;
}

inline std::uint64_t lease(sr_pool *pool, std::uint32_t index) {
    // A plain store: the generation of an idle slot is even, which no release changes.
    std::atomic<std::uint32_t> &generation = pool->slots[index].generation;
    const std::uint32_t next = generation.load(std::memory_order_relaxed) + 1;
    generation.store(next, std::memory_order_relaxed);
    return make_handle(next, pool->tag, index);
}

inline sr_status pool_acquire(sr_pool *pool, std::uint64_t *handle, void **object) {
    Magazine *magazine = magazine_of(pool);
    std::uint32_t index;
    if (magazine != nullptr) {
        if (magazine->count == 0) {
            std::uint32_t slots[kMagazineSlots];
            std::uint32_t n;
            const sr_status status = take_from_depot(pool, slots, (pool->magazine_slots + 1) / 2, &n);
            if (status != SR_OK) {
                return status;
            }
            for (std::uint32_t i = 0; i < n; ++i) {
                magazine->slots[n - 1 - i] = slots[i];  // the depot's top is used first
            }
            magazine->count = n;
        }
        index = magazine->slots[--magazine->count];
        magazine->acquired.add_one();
    } else {
        std::uint32_t n;
        const sr_status status = take_from_depot(pool, &index, 1, &n);
        if (status != SR_OK) {
            return status;
        }
        pool->direct_acquired.fetch_add(1, std::memory_order_relaxed);
    }
    *handle = lease(pool, index);
    *object = object_of(pool, index);
    return SR_OK;
}

/* End a lease. Of several calls with one handle, one succeeds, wherever they run. */
inline sr_status end_lease(sr_pool *pool, std::uint64_t handle) {
    const std::uint32_t index = handle_index(handle);
    if (handle_tag(handle) != pool->tag || index >= pool->hard + pool->overflow_limit) {
        return SR_FOREIGN;
    }
    std::uint32_t generation = handle_generation(handle);
    // Relaxed: what was written to the object is published by the depot, or read by this thread.
    if (generation % 2 == 0 || !pool->slots[index].generation.compare_exchange_strong(
                                   generation, generation + 1, std::memory_order_relaxed)) {
        return SR_STALE;
    }
    return SR_OK;
}

inline sr_status pool_release(sr_pool *pool, std::uint64_t handle) {
    const sr_status status = end_lease(pool, handle);
    if (status != SR_OK) {
        return status;
    }
    const std::uint32_t index = handle_index(handle);
    Magazine *magazine = magazine_of(pool);
    if (magazine != nullptr) {
        magazine->released.add_one();
    } else {
        pool->direct_released.fetch_add(1, std::memory_order_relaxed);
    }
    if (index >= pool->hard) {
        drop_overflow(pool, index);
    } else if (magazine == nullptr) {
        depot_push(pool, &index, 1);
        pool->outside.fetch_sub(1, std::memory_order_relaxed);
    } else {
        if (magazine->count == pool->magazine_slots) {
            give_back(pool, magazine, pool->magazine_slots / 2);
        }
        magazine->slots[magazine->count++] = index;
        const std::uint32_t flushes = pool->flushes.load(std::memory_order_relaxed);
        if (magazine->flushes != flushes) {
            magazine->flushes = flushes;
            give_back(pool, magazine, 0);
        }
    }
    return SR_OK;
}

/* The object of a live lease, or null. */
inline void *pool_object(const sr_pool *pool, std::uint64_t handle) {
    const std::uint32_t index = handle_index(handle);
    if (handle_tag(handle) != pool->tag || index >= pool->hard + pool->overflow_limit ||
        handle_generation(handle) % 2 == 0 ||
        pool->slots[index].generation.load(std::memory_order_relaxed) !=
            handle_generation(handle)) {
        return nullptr;
    }
    return object_of(pool, index);
}

inline void free_chunk(sr_pool *pool, std::size_t chunk) {
    char *memory = pool->chunks[chunk].memory;
    if (pool->destroy != nullptr) {
        for (std::uint32_t i = 0; i < chunk_slots(pool, chunk); ++i) {
            pool->destroy(memory + i * pool->stride);
        }
    }
    std::free(memory);
    pool->chunks[chunk] = {};
}

inline void free_all_chunks(sr_pool *pool) {
    for (std::size_t i = 0; i < pool->chunks.size(); ++i) {
        if (pool->chunks[i].memory != nullptr) {
            free_chunk(pool, i);
        }
    }
}

/* Free chunks that have been wholly idle since `idle_before`, while more than `keep` slots have
   memory. The caller holds the mutex; acquires that find the depot empty meanwhile wait for it. */
inline void free_idle_chunks(sr_pool *pool, std::uint32_t keep, double now, double idle_before) {
    std::uint64_t top = pool->depot.load(std::memory_order_acquire);
    while (!pool->depot.compare_exchange_weak(top, changed_top(top, 0), std::memory_order_acquire,
                                              std::memory_order_acquire)) {
    }
    const auto below = [pool](std::uint32_t number) {
        return pool->slots[number - 1].below.load(std::memory_order_relaxed);
    };
    const std::uint32_t first = static_cast<std::uint32_t>(top);
    for (Chunk &chunk : pool->chunks) {
        chunk.idle = 0;
    }
    for (std::uint32_t number = first; number != 0; number = below(number)) {
        ++pool->chunks[(number - 1) >> pool->chunk_shift].idle;
    }
    for (std::size_t i = pool->chunks.size(); i-- > 0;) {
        Chunk &chunk = pool->chunks[i];
        const std::uint32_t size = chunk_slots(pool, i);
        if (chunk.memory == nullptr || chunk.idle != size) {
            chunk.idle_since = -1.0;
            continue;
        }
        if (chunk.idle_since < 0) {
            chunk.idle_since = now;
        }
        if (pool->resident >= keep + size && chunk.idle_since <= idle_before) {
            free_chunk(pool, i);
            pool->resident -= size;
            ++pool->purges;
        }
    }
    std::uint32_t number = first;
    while (number != 0) {
        const std::uint32_t index = number - 1;
        number = below(number);
        if (pool->chunks[index >> pool->chunk_shift].memory != nullptr) {
            depot_push(pool, &index, 1);
        }
    }
}

inline void flush_magazines(sr_pool *pool) {
    pool->flushes.fetch_add(1, std::memory_order_relaxed);
    Magazine *own = magazine_of(pool);
    if (own != nullptr) {
        give_back(pool, own, 0);
    }
}

/* Free all that is idle down to the initial size. */
inline void pool_trim(sr_pool *pool) {
    flush_magazines(pool);
    const std::lock_guard<std::mutex> guard(pool->mutex);
    free_idle_chunks(pool, pool->initial, pool->clock, pool->clock);
    for (Chunk &chunk : pool->chunks) {
        chunk.idle_since = -1.0;
    }
}

/* What a background task does about once per epoch: free what the recent demand does not need and
   maintenance has seen idle for free_after seconds. */
inline void pool_maintain(sr_pool *pool, double now, double epoch, double free_after) {
    flush_magazines(pool);
    const std::lock_guard<std::mutex> guard(pool->mutex);
    now = pool->clock = std::max(pool->clock, now);
    pool->demand.observe(pool->epoch_peak.load(std::memory_order_relaxed));
    if (now - pool->epoch_start >= epoch) {
        const std::uint32_t outside = pool->outside.load(std::memory_order_relaxed);
        pool->epoch_peak.store(outside, std::memory_order_relaxed);
        pool->demand.close_epoch(outside);
        pool->epoch_start = now;
    }
    const std::uint32_t keep = std::max(pool->initial, std::min(pool->soft, pool->demand.wanted()));
    free_idle_chunks(pool, keep, now, now - free_after);
}

inline std::uint64_t pool_in_use(const sr_pool *pool, std::uint64_t *acquired) {
    std::uint64_t released = pool->direct_released.load(std::memory_order_relaxed);
    *acquired = 0;
    for (const auto &magazine : pool->magazines) {
        released += magazine->released.get();
    }
    for (const auto &magazine : pool->magazines) {
        *acquired += magazine->acquired.get();
    }
    *acquired += pool->direct_acquired.load(std::memory_order_relaxed);
    // The counters of running threads are read one after the other, not at one moment.
    return *acquired - std::min(*acquired, released);
}

inline void pool_statistics(const sr_pool *pool, sr_pool_statistics *result) {
    const std::lock_guard<std::mutex> guard(pool->mutex);
    const std::size_t overflow = pool->overflow.size() - pool->vacant_overflow.size();
    result->in_use = pool_in_use(pool, &result->acquired);
    result->idle = pool->resident + overflow - std::min(pool->resident + overflow, result->in_use);
    result->misses = pool->misses;
    result->overflows = pool->overflows;
    result->purges = pool->purges;
    result->peak = pool->peak.load(std::memory_order_relaxed);
    result->reserved_bytes = (pool->resident + overflow) * pool->stride;
}

/* The smallest number of threads whose full magazines hold a whole pool. */
constexpr std::uint32_t kMagazinesPerPool = 32;

inline sr_status pool_new(const sr_pool_options &options, sr_pool **result) {
    if (options.object_size == 0 || options.object_size > kMaxObject || options.hard == 0 ||
        options.hard > kMaxSlots / 2 || options.initial > options.hard) {
        return SR_INVALID;
    }
    std::unique_ptr<sr_pool> pool;
    try {
        pool = std::make_unique<sr_pool>();
        pool->stride = (options.object_size + 15) / 16 * 16;
        pool->initial = options.initial;
        pool->soft = options.soft;
        pool->hard = options.hard;
        pool->overflow_limit = options.overflow ? options.hard : 0;
        pool->destroy = options.destroy;
        pool->magazine_slots = std::min(kMagazineSlots, options.hard / kMagazinesPerPool);
        pool->chunk_shift = 0;
        while ((pool->stride << (pool->chunk_shift + 1)) <= kChunkBytes &&
               (1u << pool->chunk_shift) < options.hard) {
            ++pool->chunk_shift;
        }
        pool->chunks.resize(((options.hard - 1) >> pool->chunk_shift) + 1);
        pool->overflow.reserve(pool->overflow_limit);
        pool->vacant_overflow.reserve(pool->overflow_limit);
    } catch (const std::bad_alloc &) {
        return SR_NO_MEMORY;
    }
    // Zeroed and paged in on first use: atomics of integers start as zero bytes on our platforms.
    pool->slots.reset(static_cast<Slot *>(
        std::calloc(std::size_t{options.hard} + pool->overflow_limit, sizeof(Slot))));
    if (pool->slots == nullptr) {
        return SR_NO_MEMORY;
    }
    while (pool->resident < pool->initial) {
        if (!grow(pool.get())) {
            free_all_chunks(pool.get());
            return SR_NO_MEMORY;
        }
    }
    const std::lock_guard<std::mutex> guard(registry_mutex);
    std::uint32_t tag = 0;
    while (tag < kMaxTags && registry[tag] != nullptr) {
        ++tag;
    }
    if (tag == kMaxTags) {
        free_all_chunks(pool.get());
        return SR_EXHAUSTED;
    }
    pool->tag = tag;
    pool->serial = ++last_serial;
    *result = registry[tag] = pool.release();
    return SR_OK;
}

/* Destroy the pool, which no other thread may be using, unless an object is leased. */
inline sr_status pool_free(sr_pool *pool) {
    {
        const std::lock_guard<std::mutex> registry_guard(registry_mutex);
        std::uint64_t acquired;
        if (pool_in_use(pool, &acquired) != 0) {
            return SR_IN_USE;
        }
        registry[pool->tag] = nullptr;
    }
    free_all_chunks(pool);
    delete pool;
    return SR_OK;
}

inline void lock_all_pools() {
    registry_mutex.lock();
    for (sr_pool *pool : registry) {
        if (pool != nullptr) {
            pool->mutex.lock();
        }
    }
}

inline void unlock_all_pools() {
    for (sr_pool *pool : registry) {
        if (pool != nullptr) {
            pool->mutex.unlock();
        }
    }
    registry_mutex.unlock();
}

/* In the child of a fork: the other threads are gone, in the middle of whatever they were doing to
   depot and magazines. The generations alone say what is idle; all else is made anew from them. */
inline void rebuild_after_fork() {
    for (sr_pool *pool : registry) {
        if (pool == nullptr) {
            continue;
        }
        for (const auto &magazine : pool->magazines) {
            magazine->count = 0;  // those of lost threads are never used again
        }
        std::uint32_t in_use = 0;
        const auto is_idle = [pool, &in_use](std::uint32_t index) {
            const bool idle =
                pool->slots[index].generation.load(std::memory_order_relaxed) % 2 == 0;
            in_use += !idle;
            return idle;
        };
        pool->depot.store(0, std::memory_order_relaxed);
        for (std::uint32_t index = 0; index < pool->hard; ++index) {
            if (pool->chunks[index >> pool->chunk_shift].memory != nullptr && is_idle(index)) {
                depot_push(pool, &index, 1);
            }
        }
        for (std::uint32_t i = 0; i < pool->overflow.size(); ++i) {
            is_idle(pool->hard + i);
        }
        pool->outside.store(in_use, std::memory_order_relaxed);
        std::uint64_t acquired;
        pool->direct_acquired.fetch_add(in_use - pool_in_use(pool, &acquired));
    }
    unlock_all_pools();
}

/* Handlers of the system and not of Python, whose hooks may let other threads run between the first
   lock and the fork: a thread that then waits for a pool with the GIL held would wait forever. */
inline void handle_fork() {
    pthread_atfork(lock_all_pools, unlock_all_pools, rebuild_after_fork);
}

}  // namespace speechrnt_pools
