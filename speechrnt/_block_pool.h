/* A pool of large blocks in size classes, for code without the GIL.

   All blocks lie in one range of addresses made of huge pages (_span_pool.h), side by side and
   across the borders of the pages: the first touch of 30 s of audio is then one page fault or two,
   not 469, and takes the memory of 30 s, not that of one more page. Idle blocks of a class are a
   stack, because the block used last is the one most likely still in the caches; the bottom of the
   stack is what clean-up takes. There are no per-thread caches, which would strand megabytes per
   thread.

   Classes are few, since each keeps idle what its own demand explains.

   One mutex per pool, held for list surgery only: memory is taken, advised upon and given up
   outside it. Lock order: pool, then range. Pools are listed for fork, which takes their locks and
   releases them on both sides.

   Included by _audio_pool.pyx only, which owns the one list of pools. */

#pragma once

#include <cerrno>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <Python.h>
#include <vector>

#include "_pool_common.h"
#include "_span_pool.h"

namespace speechrnt_pools {

using speechrnt_memory::SpanPool;

constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr std::size_t kSmallClasses[] = {kMiB / 16, kMiB / 4, kMiB};
constexpr std::uint32_t kNSmall = 3;  // then come multiples of kWindow
constexpr std::size_t kWindow = 15 * kMiB / 8;
constexpr std::size_t kMaxBlock = 2048 * kMiB;
constexpr std::uint32_t kNClasses = kNSmall + (kMaxBlock - 1) / kWindow + 1;
constexpr std::uint32_t kMaxBlocks = kMaxSlots / 2;  // as many again may be overflow
constexpr std::uint32_t kNoBlock = kMaxSlots;

enum class BlockState : std::uint8_t {
    kVacant,   // a slot without memory
    kIdle,     // on the stack of its class
    kCleaned,  // counted as idle, but off the stack while its pages are populated or purged
    kLeased,
    kKept,  // the lease has ended, but arrays still refer to the memory
};

/* Python objects that show a block, which mean nothing here. */
struct Views {
    PyObject *array;
    PyObject *base;
};

struct Block {
    char *memory;
    std::size_t capacity;
    Views views;  // the leaseholder's, kept for the next one
    double idle_since;
    std::uint32_t generation;
    std::uint32_t above;  // neighbours on the stack, or in `below` the next vacant slot
    std::uint32_t below;
    std::uint32_t size_class;
    BlockState state;
    bool overflow;
    bool purged;  // idle, and its pages are given to the system
};

struct SizeClass {
    std::size_t capacity = 0;
    std::uint32_t top = kNoBlock;
    std::uint32_t bottom = kNoBlock;
    std::uint32_t idle = 0;
    std::uint32_t in_use = 0;
    std::uint32_t floor = 0;  // blocks that clean-up leaves
    Demand demand;
};

}  // namespace speechrnt_pools

struct sr_audio_pool {
    std::uint32_t tag;
    sr_audio_options options;
    sr_memory memory;
    bool own_memory;  // from `range`, so that its pages may be advised upon
    speechrnt_memory::SpanPool range;
    std::unique_ptr<speechrnt_pools::Block[], decltype(&std::free)> blocks{nullptr, &std::free};
    std::mutex mutex;
    std::vector<speechrnt_pools::SizeClass> classes;
    std::uint32_t n_blocks = 0;  // slots used so far, and those of them that are vacant:
    std::uint32_t vacant = speechrnt_pools::kNoBlock;
    std::uint32_t n_overflow = 0;  // of these numbers and sizes, overflow is counted apart
    std::size_t overflow_bytes = 0;
    sr_audio_statistics counts{};
    double clock = 0;  // as of the last maintenance
    double epoch_start = 0;
    bool closed = false;
    sr_audio_pool *next_pool = nullptr;
};

namespace speechrnt_pools {

inline std::mutex pools_mutex;
inline sr_audio_pool *first_pool = nullptr;
inline std::uint32_t last_tag = 0;

/* What the range counts as the time, which is no concern of it here: maintenance decides what is
   idle for too long, and gives it up. */
constexpr std::uint32_t kNoTime = 1;

inline char *obtain(sr_audio_pool *pool, std::size_t size) {
    return static_cast<char *>(pool->own_memory
                                   ? pool->range.allocate(size, kNoTime)
                                   : pool->memory.alloc(pool->memory.ctx, size, 64));
}

inline void return_memory(sr_audio_pool *pool, char *memory, std::size_t size) {
    if (pool->own_memory) {
        pool->range.deallocate(memory, kNoTime);
    } else {
        pool->memory.free(pool->memory.ctx, memory, size);
    }
}

/* After `return_memory`: let the system have the pages that nothing is on any more. */
inline void release_pages(sr_audio_pool *pool) {
    if (pool->own_memory) {
        pool->range.trim(0, kNoTime);
    }
}

inline void give_up(sr_audio_pool *pool, char *memory, std::size_t size) {
    return_memory(pool, memory, size);
    release_pages(pool);
}

/* Have the system back the pages now and not at the first touch. */
inline void populate(const sr_audio_pool *pool, char *memory, std::size_t size) {
    if (!pool->own_memory) {
        return;
    }
#ifdef MADV_POPULATE_WRITE
    if (madvise(memory, size, MADV_POPULATE_WRITE) == 0) {
        return;  // Linux 5.14
    }
#endif
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    for (std::size_t i = 0; i < size; i += page) {
        static_cast<volatile char *>(memory)[i] = 0;
    }
}

inline std::uint32_t class_of(std::size_t size) {
    for (std::uint32_t i = 0; i < kNSmall; ++i) {
        if (size <= kSmallClasses[i]) {
            return i;
        }
    }
    return kNSmall + static_cast<std::uint32_t>((size - 1) / kWindow);
}

inline std::size_t class_capacity(std::uint32_t size_class) {
    return size_class < kNSmall ? kSmallClasses[size_class] : (size_class - kNSmall + 1) * kWindow;
}

inline void push(sr_audio_pool *pool, std::uint32_t index) {
    Block &block = pool->blocks[index];
    SizeClass &stack = pool->classes[block.size_class];
    block.state = BlockState::kIdle;
    block.above = kNoBlock;
    block.below = stack.top;
    (stack.top == kNoBlock ? stack.bottom : pool->blocks[stack.top].above) = index;
    stack.top = index;
}

inline void push_under(sr_audio_pool *pool, std::uint32_t index) {
    Block &block = pool->blocks[index];
    SizeClass &stack = pool->classes[block.size_class];
    block.state = BlockState::kIdle;
    block.below = kNoBlock;
    block.above = stack.bottom;
    (stack.bottom == kNoBlock ? stack.top : pool->blocks[stack.bottom].below) = index;
    stack.bottom = index;
}

inline void unlink(sr_audio_pool *pool, std::uint32_t index) {
    Block &block = pool->blocks[index];
    SizeClass &stack = pool->classes[block.size_class];
    (block.above == kNoBlock ? stack.top : pool->blocks[block.above].below) = block.below;
    (block.below == kNoBlock ? stack.bottom : pool->blocks[block.below].above) = block.above;
}

inline void vacate(sr_audio_pool *pool, std::uint32_t index) {
    Block &block = pool->blocks[index];
    block.memory = nullptr;
    block.state = BlockState::kVacant;
    block.below = pool->vacant;
    pool->vacant = index;
}

inline std::uint32_t take_vacant(sr_audio_pool *pool) {
    if (pool->vacant == kNoBlock) {
        return pool->n_blocks++;
    }
    const std::uint32_t index = pool->vacant;
    pool->vacant = pool->blocks[index].below;
    return index;
}

inline void count_idle(sr_audio_pool *pool, const Block &block) {
    ++pool->classes[block.size_class].idle;
    ++pool->counts.idle;
    pool->counts.idle_bytes += block.capacity;
}

inline void uncount_idle(sr_audio_pool *pool, const Block &block) {
    --pool->classes[block.size_class].idle;
    --pool->counts.idle;
    pool->counts.idle_bytes -= block.capacity;
}

/* Memory taken out of the pool under the lock, to be given up after it. The list lies in that
   memory itself. */
struct Doomed {
    Doomed *next;
    std::size_t size;
};

inline Doomed *doom_idle(sr_audio_pool *pool, std::uint32_t index, Doomed *next) {
    const Block &block = pool->blocks[index];
    Doomed *doomed = new (block.memory) Doomed{next, block.capacity};
    unlink(pool, index);
    uncount_idle(pool, block);
    vacate(pool, index);
    ++pool->counts.purges;
    return doomed;
}

inline void give_up_all(sr_audio_pool *pool, Doomed *doomed) {
    if (doomed == nullptr) {
        return;
    }
    while (doomed != nullptr) {
        Doomed *next = doomed->next;
        return_memory(pool, reinterpret_cast<char *>(doomed), doomed->size);
        doomed = next;
    }
    release_pages(pool);
}

/* Whether a new block of `size` fits the limits beside all that is in use. */
inline bool fits(const sr_audio_pool *pool, std::size_t size) {
    const sr_audio_statistics &now = pool->counts;
    return now.in_use - pool->n_overflow < pool->options.hard &&
           now.in_use_bytes - pool->overflow_bytes + size <= pool->options.hard_bytes;
}

/* Whether it fits beside all that is idle, too. */
inline bool has_room(const sr_audio_pool *pool, std::size_t size) {
    const sr_audio_statistics &now = pool->counts;
    return now.in_use - pool->n_overflow + now.idle < pool->options.hard &&
           now.in_use_bytes - pool->overflow_bytes + now.idle_bytes + size <=
               pool->options.hard_bytes;
}

/* Take idle blocks out until a new one of `size` fits the limits, the largest classes first. Those
   that maintenance has in hand cannot be taken. */
inline Doomed *make_room(sr_audio_pool *pool, std::size_t size) {
    Doomed *doomed = nullptr;
    std::size_t i = pool->classes.size();
    while (!has_room(pool, size)) {
        while (i > 0 && pool->classes[i - 1].bottom == kNoBlock) {
            --i;
        }
        if (i == 0) {
            break;
        }
        doomed = doom_idle(pool, pool->classes[i - 1].bottom, doomed);
    }
    return doomed;
}

inline void count_lease(sr_audio_pool *pool, const Block &block) {
    SizeClass &stack = pool->classes[block.size_class];
    sr_audio_statistics &counts = pool->counts;
    stack.demand.observe(++stack.in_use);
    counts.peak = std::max(counts.peak, ++counts.in_use);
    counts.in_use_bytes += block.capacity;
}

inline void uncount_lease(sr_audio_pool *pool, const Block &block) {
    --pool->classes[block.size_class].in_use;
    --pool->counts.in_use;
    pool->counts.in_use_bytes -= block.capacity;
    if (block.overflow) {
        --pool->n_overflow;
        pool->overflow_bytes -= block.capacity;
    }
}

/* Lease a slot for a new block of class `size_class`; the caller fills in its memory. */
inline sr_status open_slot(sr_audio_pool *pool, std::uint32_t size_class, Doomed **doomed,
                        std::uint32_t *index) {
    const std::size_t size = pool->classes[size_class].capacity;
    const sr_audio_options &options = pool->options;
    if (pool->closed) {
        return SR_CLOSED;
    }
    if (fits(pool, size)) {
        *doomed = make_room(pool, size);
    }
    const bool overflow = !has_room(pool, size);
    if (overflow && (!options.overflow || pool->n_overflow >= options.hard ||
                     pool->overflow_bytes + size > options.hard_bytes)) {
        return SR_EXHAUSTED;
    }
    *index = take_vacant(pool);
    Block &block = pool->blocks[*index];
    block.capacity = size;
    block.size_class = size_class;
    block.overflow = overflow;
    block.state = BlockState::kLeased;
    if (overflow) {
        ++pool->n_overflow;
        pool->overflow_bytes += size;
    }
    count_lease(pool, block);
    return SR_OK;
}

/* Lease a block of at least `size` bytes. Its contents are whatever they are. */
inline sr_status block_acquire(sr_audio_pool *pool, std::size_t size, std::uint64_t *handle,
                            void **memory) {
    if (size == 0 || size > kMaxBlock) {
        return SR_INVALID;
    }
    const std::uint32_t size_class = class_of(size);
    Doomed *doomed = nullptr;
    std::uint32_t index;
    bool hit;
    sr_status status = SR_OK;
    {
        const std::lock_guard<std::mutex> guard(pool->mutex);
        index = pool->classes[size_class].top;
        hit = index != kNoBlock && !pool->closed;
        if (hit) {
            unlink(pool, index);
            Block &block = pool->blocks[index];
            block.state = BlockState::kLeased;
            block.purged = false;
            uncount_idle(pool, block);
            count_lease(pool, block);
            ++block.generation;
            ++pool->counts.acquired;
        } else {
            status = open_slot(pool, size_class, &doomed, &index);
        }
    }
    give_up_all(pool, doomed);
    if (status != SR_OK) {
        return status;
    }
    Block &block = pool->blocks[index];  // leased: others only look at it, with the lock
    if (!hit) {
        block.memory = obtain(pool, block.capacity);
        const std::lock_guard<std::mutex> guard(pool->mutex);
        if (block.memory == nullptr) {
            uncount_lease(pool, block);
            vacate(pool, index);
            return SR_NO_MEMORY;
        }
        ++block.generation;
        ++pool->counts.acquired;
        ++(block.overflow ? pool->counts.overflows : pool->counts.misses);
    }
    *handle = make_handle(block.generation, pool->tag, index);
    *memory = block.memory;
    return SR_OK;
}

/* Check a handle and lock the pool over the block's use. */
inline sr_status find(sr_audio_pool *pool, std::uint64_t handle, std::unique_lock<std::mutex> *lock,
                   std::uint32_t *index) {
    *index = handle_index(handle);
    *lock = std::unique_lock<std::mutex>(pool->mutex);
    if (handle_tag(handle) != pool->tag || *index >= pool->n_blocks) {
        return SR_FOREIGN;
    }
    const Block &block = pool->blocks[*index];
    return block.state == BlockState::kLeased && block.generation == handle_generation(handle)
               ? SR_OK
               : SR_STALE;
}

inline void recycle(sr_audio_pool *pool, std::uint32_t index, std::unique_lock<std::mutex> lock) {
    Block &block = pool->blocks[index];
    uncount_lease(pool, block);
    if (block.overflow || pool->closed) {
        char *memory = block.memory;
        const std::size_t size = block.capacity;
        vacate(pool, index);
        lock.unlock();
        give_up(pool, memory, size);
        return;
    }
    block.idle_since = pool->clock;
    count_idle(pool, block);
    push(pool, index);
}

/* End a lease. With `keep`, the memory stays in use until block_return. */
inline sr_status block_release(sr_audio_pool *pool, std::uint64_t handle, bool keep) {
    std::unique_lock<std::mutex> lock;
    std::uint32_t index;
    const sr_status status = find(pool, handle, &lock, &index);
    if (status != SR_OK) {
        return status;
    }
    ++pool->blocks[index].generation;
    if (keep) {
        pool->blocks[index].state = BlockState::kKept;
        ++pool->counts.kept;
    } else {
        recycle(pool, index, std::move(lock));
    }
    return SR_OK;
}

inline void block_return(sr_audio_pool *pool, std::uint32_t index) {
    recycle(pool, index, std::unique_lock<std::mutex>(pool->mutex));
}

/* Whether the caller's reference is the only one, so that nobody can come by another. Without the
   GIL, that can be told only of objects of this thread, and of others not before Python 3.14. */
inline bool is_sole_reference(PyObject *object) {
#ifndef Py_GIL_DISABLED
    return Py_REFCNT(object) == 1;
#elif PY_VERSION_HEX >= 0x030E0000
    return PyUnstable_Object_IsUniquelyReferenced(object);
#else
    (void)object;
    return false;  // the array is dropped then, and the block is idle once that has happened
#endif
}

/* The views of a block, for the one who leases it. */
inline Views *block_views(sr_audio_pool *pool, std::uint32_t index) {
    return &pool->blocks[index].views;
}

inline std::size_t block_capacity(sr_audio_pool *pool, std::uint32_t index) {
    return pool->blocks[index].capacity;
}

inline std::uint32_t block_slots(sr_audio_pool *pool) {
    const std::lock_guard<std::mutex> guard(pool->mutex);
    return pool->n_blocks;
}

inline void block_statistics(sr_audio_pool *pool, sr_audio_statistics *result) {
    const std::lock_guard<std::mutex> guard(pool->mutex);
    *result = pool->counts;
}

/* The block of a live lease, or null. */
inline void *block_memory(sr_audio_pool *pool, std::uint64_t handle) {
    std::unique_lock<std::mutex> lock;
    std::uint32_t index;
    return find(pool, handle, &lock, &index) == SR_OK ? pool->blocks[index].memory : nullptr;
}

/* Have `count` idle blocks of at least `size` bytes, in memory, that clean-up will leave. */
inline sr_status block_reserve(sr_audio_pool *pool, std::size_t size, std::uint32_t count) {
    if (size == 0 || size > kMaxBlock) {
        return SR_INVALID;
    }
    const std::uint32_t size_class = class_of(size);
    size = pool->classes[size_class].capacity;
    for (;;) {
        std::uint32_t index;
        {
            const std::lock_guard<std::mutex> guard(pool->mutex);
            SizeClass &stack = pool->classes[size_class];
            if (pool->closed) {
                return SR_CLOSED;
            }
            if (stack.idle >= count) {
                stack.floor = std::max(stack.floor, count);
                return SR_OK;
            }
            if (!has_room(pool, stack.capacity)) {
                return SR_EXHAUSTED;
            }
            index = take_vacant(pool);
            Block &block = pool->blocks[index];
            block.capacity = stack.capacity;
            block.size_class = size_class;
            block.overflow = false;
            block.purged = false;
            block.state = BlockState::kCleaned;
            count_idle(pool, block);
        }
        Block &block = pool->blocks[index];
        block.memory = obtain(pool, block.capacity);
        if (block.memory != nullptr) {
            populate(pool, block.memory, block.capacity);
        }
        std::unique_lock<std::mutex> lock(pool->mutex);
        if (block.memory != nullptr && !pool->closed) {
            block.idle_since = pool->clock;
            push(pool, index);
            continue;
        }
        char *memory = block.memory;
        uncount_idle(pool, block);
        vacate(pool, index);
        lock.unlock();
        if (memory == nullptr) {
            return SR_NO_MEMORY;
        }
        give_up(pool, memory, size);
        return SR_CLOSED;
    }
}

/* Clean the `surplus` coldest idle blocks of a class: unmap those idle since before `unmap_before`,
   and let the system have the pages of those idle since before `purge_before` when it needs them. */
inline void clean_class(sr_audio_pool *pool, SizeClass *stack, std::uint32_t surplus,
                        double purge_before, double unmap_before,
                        std::unique_lock<std::mutex> *lock) {
    Doomed *doomed = nullptr;
    std::uint32_t purged = kNoBlock;  // linked by `below`, the coldest last
    std::uint32_t index = stack->bottom;
    for (; surplus > 0 && index != kNoBlock; --surplus) {
        Block &block = pool->blocks[index];
        const std::uint32_t above = block.above;
        if (block.idle_since <= unmap_before) {
            doomed = doom_idle(pool, index, doomed);
        } else if (block.idle_since <= purge_before && !block.purged && pool->own_memory) {
            unlink(pool, index);
            block.state = BlockState::kCleaned;
            block.purged = true;
            block.below = purged;
            purged = index;
            ++pool->counts.purges;
        }
        index = above;
    }
    lock->unlock();
    give_up_all(pool, doomed);
    for (index = purged; index != kNoBlock; index = pool->blocks[index].below) {
        madvise(pool->blocks[index].memory, pool->blocks[index].capacity, MADV_FREE);
    }
    lock->lock();
    while (purged != kNoBlock) {
        index = purged;
        purged = pool->blocks[index].below;
        push_under(pool, index);
    }
}

/* Unmap all that is idle down to the reserved blocks. */
inline void block_trim(sr_audio_pool *pool) {
    std::unique_lock<std::mutex> lock(pool->mutex);
    for (SizeClass &stack : pool->classes) {
        if (stack.idle > stack.floor) {
            clean_class(pool, &stack, stack.idle - stack.floor, pool->clock, pool->clock,
                        &lock);
        }
    }
}

/* Unmap all that is idle, and from now on whatever is released; lend nothing more. */
inline void block_close(sr_audio_pool *pool) {
    {
        const std::lock_guard<std::mutex> guard(pool->mutex);
        pool->closed = true;
        for (SizeClass &stack : pool->classes) {
            stack.floor = 0;
        }
    }
    block_trim(pool);
}

inline bool block_is_closed(sr_audio_pool *pool) {
    const std::lock_guard<std::mutex> guard(pool->mutex);
    return pool->closed;
}

/* What a background task does about once per epoch. */
inline void block_maintain(sr_audio_pool *pool, double now, double epoch, double purge_after,
                           double unmap_after) {
    std::unique_lock<std::mutex> lock(pool->mutex);
    now = pool->clock = std::max(pool->clock, now);
    const bool new_epoch = now - pool->epoch_start >= epoch;
    if (new_epoch) {
        pool->epoch_start = now;
    }
    std::size_t soft_bytes = pool->options.soft_bytes;
    std::uint32_t soft = pool->options.soft;
    for (SizeClass &stack : pool->classes) {
        if (new_epoch) {
            stack.demand.close_epoch(stack.in_use);
        }
        const std::uint32_t wanted = std::max(stack.demand.wanted(), stack.in_use) - stack.in_use;
        std::uint32_t keep = std::min({wanted, stack.idle, soft});
        keep = static_cast<std::uint32_t>(std::min<std::size_t>(keep, soft_bytes / stack.capacity));
        keep = std::max(keep, std::min(stack.idle, stack.floor));
        soft -= std::min(soft, keep);
        soft_bytes -= std::min(soft_bytes, keep * stack.capacity);
        if (stack.idle > keep) {
            clean_class(pool, &stack, stack.idle - keep, now - purge_after, now - unmap_after,
                        &lock);
        }
    }
    if (pool->closed) {  // meanwhile: what was in hand here was not idle then
        lock.unlock();
        block_trim(pool);
    }
}

/* Reserve addresses for several times the limit, since holes may be too small for what comes next,
   but not for more than memory there is. */
inline bool reserve_range(sr_audio_pool *pool) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t physical = static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) * page;
    const std::size_t limit = std::min(pool->options.hard_bytes, physical);
    std::size_t capacity = limit * (pool->options.overflow ? 4 : 2) + kMaxBlock;
    while (!pool->range.reserve(capacity)) {  // where addresses are limited, too
        capacity /= 2;
        if (capacity < 64 * kMiB) {
            return false;
        }
    }
    pool->range.set_limit(capacity);
    return true;
}

inline bool is_tag_used(std::uint32_t tag) {
    for (const sr_audio_pool *pool = first_pool; pool != nullptr; pool = pool->next_pool) {
        if (pool->tag == tag) {
            return true;
        }
    }
    return false;
}

inline sr_status block_pool_new(const sr_audio_options &options, sr_audio_pool **result) {
    const sr_memory *memory = options.memory;
    if (options.hard == 0 || options.hard > kMaxBlocks ||
        (memory != nullptr && (memory->alloc == nullptr || memory->free == nullptr))) {
        return SR_INVALID;
    }
    std::unique_ptr<sr_audio_pool> pool;
    try {
        pool = std::make_unique<sr_audio_pool>();
        pool->classes.resize(kNClasses);
    } catch (const std::bad_alloc &) {
        return SR_NO_MEMORY;
    }
    pool->options = options;
    pool->own_memory = memory == nullptr;
    if (!pool->own_memory) {
        pool->memory = *memory;
    }
    for (std::uint32_t i = 0; i < pool->classes.size(); ++i) {
        pool->classes[i].capacity = class_capacity(i);
    }
    // Zeroed and paged in on first use.
    pool->blocks.reset(static_cast<Block *>(std::calloc(std::size_t{2} * options.hard, sizeof(Block))));
    if (pool->blocks == nullptr) {
        return SR_NO_MEMORY;
    }
    if (pool->own_memory && !reserve_range(pool.get())) {
        return SR_NO_MEMORY;
    }
    const std::lock_guard<std::mutex> guard(pools_mutex);
    std::uint32_t tries = 0;
    do {
        last_tag = (last_tag + 1) % kMaxTags;
    } while (is_tag_used(last_tag) && ++tries < kMaxTags);
    if (tries == kMaxTags) {
        pool->range.unmap_all();
        return SR_EXHAUSTED;
    }
    pool->tag = last_tag;
    pool->next_pool = first_pool;
    *result = first_pool = pool.release();
    return SR_OK;
}

/* Destroy the pool, which no other thread may be using, unless a block is in use. */
inline sr_status block_pool_free(sr_audio_pool *pool) {
    {
        const std::lock_guard<std::mutex> guard(pools_mutex);
        if (pool->counts.in_use != 0) {
            return SR_IN_USE;
        }
        sr_audio_pool **link = &first_pool;
        while (*link != pool) {
            link = &(*link)->next_pool;
        }
        *link = pool->next_pool;
    }
    if (pool->own_memory) {
        pool->range.unmap_all();
    } else {
        for (std::uint32_t i = 0; i < pool->n_blocks; ++i) {
            if (pool->blocks[i].memory != nullptr) {
                return_memory(pool, pool->blocks[i].memory, pool->blocks[i].capacity);
            }
        }
    }
    delete pool;
    return SR_OK;
}

inline void lock_all_block_pools() {
    pools_mutex.lock();
    for (sr_audio_pool *pool = first_pool; pool != nullptr; pool = pool->next_pool) {
        pool->mutex.lock();
        pool->range.lock();
    }
}

inline void unlock_all_block_pools() {
    for (sr_audio_pool *pool = first_pool; pool != nullptr; pool = pool->next_pool) {
        pool->range.unlock();
        pool->mutex.unlock();
    }
    pools_mutex.unlock();
}

/* Not Python's hooks: see the function of this name in _object_slab.h. */
inline void handle_fork() {
    pthread_atfork(lock_all_block_pools, unlock_all_block_pools, unlock_all_block_pools);
}

}  // namespace speechrnt_pools
