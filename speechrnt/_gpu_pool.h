/* A pool of GPU memory, for code without the GIL.

   `_tlsf.h` finds blocks, `_gpu_backing.h` gets the memory, and `_gpu_state.h` tells which mutex
   guards what. Here is what users call.

   Two ways to free. `gpu_free` is for memory that no stream has work for any more: the block is
   free at once. `gpu_free_on` is for memory that a stream may still use: the block is pending, and
   free once an event on that stream has passed; until then an allocation for the same stream may
   have it. There is one event for up to kBatch blocks, recorded behind the last of them, as
   recording costs twenty times what an allocation does.

   A miss climbs a ladder: take what streams are done with; move free chunks together; grow; wait
   for what streams still use; make the device's mempool, which CTranslate2 allocates from, give
   back what it idles; fail. */

#pragma once

#include <cstring>

#include "_gpu_backing.h"

namespace speechrnt_gpu {

constexpr unsigned kBatch = 16;
constexpr unsigned kReuseScan = 16;
constexpr int kRetry = -1;

/* Blocks that streams may still use */

inline void retire(sr_gpu_pool *pool, std::uint32_t block) {
    while (block != kNone) {
        const std::uint32_t next = pool->index[block].below;
        pool->counts.pending_bytes -= pool->index[block].size;
        pool->index.settle(block, State::kFree);
        block = next;
    }
}

/* Close a batch that has blocks: record an event behind them. Needs the context. */
inline int close_batch(sr_gpu_pool *pool, void *stream, StreamFrees *frees) {
    void *event = nullptr;
    int status = SR_OK;
    bool placed = false;
    try {
        frees->closed.emplace_back();  // first, so that nothing can fail after the record
        placed = true;
        if (!pool->events.empty()) {
            event = pool->events.back();
            pool->events.pop_back();
        } else {
            pool->events.reserve(pool->n_events + 1);
            status = SR_CALL(pool, event_create, &event);
            pool->n_events += status == SR_OK;
        }
    } catch (const std::bad_alloc &) {
        status = SR_NO_MEMORY;
    }
    if (status == SR_OK) {
        status = SR_CALL(pool, event_record, event, stream);
    }
    if (status == SR_OK) {
        frees->closed.back() = frees->open;
        frees->closed.back().event = event;
        frees->open = Batch{};
        return SR_OK;
    }
    if (placed) {
        frees->closed.pop_back();
    }
    if (event != nullptr) {
        pool->events.push_back(event);
    }
    // Without an event, the slow way.
    status = SR_CALL(pool, stream_synchronize, stream);
    if (status == SR_OK) {
        retire(pool, frees->open.first);
        frees->open = Batch{};
    }
    return status;
}

inline int drain_stream(sr_gpu_pool *pool, StreamFrees *frees) {
    while (!frees->closed.empty()) {
        const Batch batch = frees->closed.front();
        const int code = pool->driver.event_query(batch.event);
        if (code == kNotReady) {
            break;
        }
        const int status = judge(pool, code, "event_query");
        if (status != SR_OK) {
            return status;
        }
        frees->closed.pop_front();
        pool->events.push_back(batch.event);
        retire(pool, batch.first);
    }
    return SR_OK;
}

/* Take all that streams are done with. Needs the context. */
inline int drain(sr_gpu_pool *pool) {
    for (auto entry = pool->streams.begin(); entry != pool->streams.end();) {
        StreamFrees *frees = &entry->second;
        int status = SR_OK;
        if (frees->open.count != 0) {
            status = close_batch(pool, entry->first, frees);
        }
        if (status == SR_OK) {
            status = drain_stream(pool, frees);
        }
        if (status == SR_POISONED) {
            return status;
        }
        const bool done = frees->open.count == 0 && frees->closed.empty();
        entry = done ? pool->streams.erase(entry) : std::next(entry);
    }
    return SR_OK;
}

/* Wait for all that streams use now. Needs `growing` and the context. */
inline int wait_for_streams(sr_gpu_pool *pool, Lock *lock) {
    drain(pool);
    std::vector<void *> last;
    try {
        for (const auto &entry : pool->streams) {
            if (!entry.second.closed.empty()) {
                last.push_back(entry.second.closed.back().event);
            }
        }
    } catch (const std::bad_alloc &) {
        return SR_NO_MEMORY;
    }
    int status = SR_OK;
    lock->unlock();
    // An event may be recorded anew meanwhile: then this waits for longer than it has to.
    for (void *event : last) {
        const int result = SR_CALL(pool, event_synchronize, event);
        status = result == SR_OK ? status : result;
    }
    lock->lock();
    drain(pool);
    return status;
}

/* A block that was freed on this stream and is not much larger than what is wanted. */
inline std::uint32_t reuse(sr_gpu_pool *pool, void *stream, std::uint64_t size) {
    const auto entry = pool->streams.find(stream);
    if (entry == pool->streams.end()) {
        return kNone;
    }
    unsigned scanned = 0;
    const auto look_in = [&](Batch *batch) {
        std::uint32_t above = kNone;
        for (std::uint32_t i = batch->first; i != kNone && scanned < kReuseScan; ++scanned) {
            Block &block = pool->index[i];
            if (block.size >= size && block.size <= size + size / 8) {
                (above == kNone ? batch->first : pool->index[above].below) = block.below;
                --batch->count;
                pool->counts.pending_bytes -= block.size;
                block.state = State::kUsed;
                return i;
            }
            above = i;
            i = block.below;
        }
        return kNone;
    };
    std::uint32_t found = look_in(&entry->second.open);
    auto &closed = entry->second.closed;
    for (auto batch = closed.rbegin(); found == kNone && batch != closed.rend(); ++batch) {
        if (scanned >= kReuseScan) {
            break;
        }
        found = look_in(&*batch);
    }
    return found;
}

/* Lend and take back */

inline void claim(sr_gpu_pool *pool, std::uint32_t number, std::size_t requested,
                  sr_gpu_block *result) {
    Block &block = pool->index[number];
    sr_gpu_statistics &counts = pool->counts;
    ++block.generation;
    block.requested = requested;
    ++counts.allocations;
    counts.requested_bytes += requested;
    counts.in_use_bytes += block.size;
    counts.peak_bytes = std::max(counts.peak_bytes, counts.in_use_bytes);
    const int size_class = 63 - __builtin_clzll(requested);
    ++counts.by_size[std::min(size_class, SR_GPU_SIZE_CLASSES - 1)];
    result->handle = std::uint64_t{block.generation} << 32 |
                     std::uint64_t{pool->tag} << kIndexBits | number;
    result->address = block.address;
    result->size = block.size;
}

/* The request in whole granules, or 0 if nothing can have that size. */
inline std::uint64_t granules(const sr_gpu_pool *pool, std::size_t size) {
    return size == 0 || size > kMaxSize ? 0 : round_up(size, pool->index.granule());
}

/* From what is free; kRetry if there is none large enough. */
inline int take(sr_gpu_pool *pool, std::size_t size, bool on_stream, void *stream,
                sr_gpu_block *result) {
    const std::uint64_t rounded = granules(pool, size);
    if (!pool->index.reserve(1, kMaxBlocks)) {
        return SR_NO_MEMORY;
    }
    std::uint32_t block = pool->index.take(rounded);
    if (block == kNone && on_stream) {
        block = reuse(pool, stream, rounded);
    }
    if (block == kNone) {
        return kRetry;
    }
    claim(pool, block, size, result);
    return SR_OK;
}

/* Allocate if that takes neither waiting nor the driver; otherwise kRetry, for gpu_alloc. */
inline int gpu_try_alloc(sr_gpu_pool *pool, std::size_t size, bool on_stream, void *stream,
                         sr_gpu_block *result) {
    if (usable(pool) != SR_OK || granules(pool, size) == 0) {
        return kRetry;
    }
    const Lock lock(pool->mutex, std::try_to_lock);
    return lock.owns_lock() ? take(pool, size, on_stream, stream, result) : kRetry;
}

inline int climb(sr_gpu_pool *pool, std::size_t size, bool on_stream, void *stream,
                 sr_gpu_block *result) {
    const std::lock_guard<std::mutex> guard(pool->growing);
    const Current current(pool);
    if (current.status() != SR_OK) {
        return current.status();
    }
    const std::uint64_t rounded = granules(pool, size);
    Lock lock(pool->mutex);
    // Another thread may have grown the pool meanwhile.
    int taken = take(pool, size, on_stream, stream, result);
    if (taken == kRetry && pool->counts.pending_bytes != 0) {
        drain(pool);
        taken = take(pool, size, on_stream, stream, result);
    }
    if (taken != kRetry) {
        return taken;
    }
    int status = SR_OK;
    const auto grow = [&] {
        do {
            status = extend(pool, &lock, rounded, pool->options.defragment);
            // If that failed, what others freed meanwhile may do. If it worked, others may have
            // taken of the free neighbours that it counted on: then they got what they wanted.
            taken = take(pool, size, on_stream, stream, result);
        } while (taken == kRetry && status == SR_OK);
    };
    const auto exhausted = [&] {
        return taken == kRetry && (status == SR_EXHAUSTED || status == SR_NO_MEMORY);
    };
    grow();
    if (exhausted() && pool->counts.pending_bytes != 0) {
        ++pool->counts.retries;
        if (wait_for_streams(pool, &lock) == SR_OK) {
            taken = take(pool, size, on_stream, stream, result);
            if (taken == kRetry) {
                grow();
            }
        }
    }
    if (taken == kRetry && status == SR_NO_MEMORY && pool->options.trim_mempool) {
        ++pool->counts.retries;
        lock.unlock();
        const int trimmed = SR_CALL(pool, trim_mempool, pool->options.device);
        lock.lock();
        if (trimmed == SR_OK) {
            grow();
        }
    }
    if (exhausted()) {
        ++pool->counts.ooms;
        pool->counts.fragmented_ooms += pool->index.free_bytes() >= rounded;
    }
    return taken == kRetry ? status : taken;
}

inline int gpu_alloc(sr_gpu_pool *pool, std::size_t size, bool on_stream, void *stream,
                     sr_gpu_block *result) {
    int status = usable(pool);
    if (status != SR_OK) {
        return status;
    }
    if (granules(pool, size) == 0) {
        return SR_INVALID;
    }
    {
        const std::lock_guard<std::mutex> guard(pool->mutex);
        status = take(pool, size, on_stream, stream, result);
    }
    return status == kRetry ? climb(pool, size, on_stream, stream, result) : status;
}

/* Check a handle; the caller has the mutex. */
inline int find(const sr_gpu_pool *pool, std::uint64_t handle, std::uint32_t *number) {
    *number = static_cast<std::uint32_t>(handle) & (kMaxBlocks - 1);
    const std::uint32_t tag = static_cast<std::uint32_t>(handle) >> kIndexBits;
    if (tag != pool->tag || *number >= pool->index.nodes()) {
        return SR_FOREIGN;
    }
    const Block &block = pool->index[*number];
    return block.state == State::kUsed && block.generation == handle >> 32 ? SR_OK : SR_STALE;
}

inline void unclaim(sr_gpu_pool *pool, std::uint32_t number) {
    Block &block = pool->index[number];
    ++block.generation;
    ++pool->counts.frees;
    pool->counts.requested_bytes -= block.requested;
    pool->counts.in_use_bytes -= block.size;
}

inline int free_locked(sr_gpu_pool *pool, std::uint64_t handle) {
    std::uint32_t number;
    const int status = find(pool, handle, &number);
    if (status == SR_OK) {
        unclaim(pool, number);
        pool->index.settle(number, State::kFree);
    }
    return status;
}

/* Free a block that no stream has work for any more. In a forked child, nothing happens. */
inline int gpu_free(sr_gpu_pool *pool, std::uint64_t handle) {
    if (forked(pool)) {
        return SR_OK;
    }
    const std::lock_guard<std::mutex> guard(pool->mutex);
    return free_locked(pool, handle);
}

/* The same if that takes no waiting; otherwise kRetry. */
inline int gpu_try_free(sr_gpu_pool *pool, std::uint64_t handle) {
    if (forked(pool)) {
        return SR_OK;
    }
    const Lock lock(pool->mutex, std::try_to_lock);
    return lock.owns_lock() ? free_locked(pool, handle) : kRetry;
}

/* Free a block once the stream has done what it was given so far. The stream must live on until
   gpu_flush, if it does not live as long as the pool. */
inline int gpu_free_on(sr_gpu_pool *pool, std::uint64_t handle, void *stream) {
    if (forked(pool)) {
        return SR_OK;
    }
    const std::lock_guard<std::mutex> guard(pool->mutex);
    if (pool->error.load(std::memory_order_relaxed) != 0) {
        return free_locked(pool, handle);
    }
    std::uint32_t number;
    int status = find(pool, handle, &number);
    if (status != SR_OK) {
        return status;
    }
    StreamFrees *frees = nullptr;
    try {
        frees = &pool->streams[stream];
    } catch (const std::bad_alloc &) {
        // Without a list, the slow way.
        const Current current(pool);
        status = current.status();
        if (status == SR_OK) {
            status = SR_CALL(pool, stream_synchronize, stream);
        }
        return status == SR_OK ? free_locked(pool, handle) : status;
    }
    unclaim(pool, number);
    Block &block = pool->index[number];
    block.state = State::kPending;
    block.below = frees->open.first;
    frees->open.first = number;
    pool->counts.pending_bytes += block.size;
    if (++frees->open.count >= kBatch) {
        const Current current(pool);
        // If it fails, the blocks stay pending, and a later look tries again.
        if (current.status() == SR_OK && close_batch(pool, stream, frees) == SR_OK) {
            drain_stream(pool, frees);
        }
    }
    return SR_OK;
}

/* Have nothing pending that needs the stream alive. The driver may give its address to another
   stream, which must not be lent what this one may still use: so its batches go on under a key that
   no stream has, the last one's event. */
inline int gpu_flush(sr_gpu_pool *pool, void *stream) {
    if (forked(pool)) {
        return SR_FORKED;
    }
    const std::lock_guard<std::mutex> guard(pool->mutex);
    const auto entry = pool->streams.find(stream);
    if (entry == pool->streams.end()) {
        return SR_OK;
    }
    if (entry->second.open.count != 0) {
        const Current current(pool);
        const int status = current.status() == SR_OK ? close_batch(pool, stream, &entry->second)
                                                     : current.status();
        if (status != SR_OK) {
            return status;
        }
    }
    auto node = pool->streams.extract(entry);
    if (!node.mapped().closed.empty()) {
        node.key() = node.mapped().closed.back().event;
        // Whoever had the event before has been passed, and is empty.
        pool->streams.erase(node.key());
        pool->streams.insert(std::move(node));
    }
    return SR_OK;
}

/* The address of a live block, or 0. */
inline std::uint64_t gpu_address(sr_gpu_pool *pool, std::uint64_t handle) {
    if (forked(pool)) {
        return 0;
    }
    const std::lock_guard<std::mutex> guard(pool->mutex);
    std::uint32_t number;
    return find(pool, handle, &number) == SR_OK ? pool->index[number].address : 0;
}

/* Upkeep */

/* Call work(&lock) with both mutexes and the context, after a drain. */
template <typename Work>
int with_growing(sr_gpu_pool *pool, Work work) {
    if (forked(pool)) {
        return SR_FORKED;
    }
    if (pool->error.load(std::memory_order_relaxed) != 0) {
        return SR_POISONED;
    }
    const std::lock_guard<std::mutex> guard(pool->growing);
    const Current current(pool);
    if (current.status() != SR_OK) {
        return current.status();
    }
    Lock lock(pool->mutex);
    drain(pool);
    return work(&lock);
}

inline int gpu_defragment(sr_gpu_pool *pool, sr_gpu_defragmentation *result) {
    *result = {};
    return with_growing(pool, [&](Lock *lock) {
        const std::uint64_t remapped = pool->counts.remapped_chunks;
        result->largest_free_before = pool->index.largest_free();
        const int status = pool->vmm ? defragment_range(pool, lock) : SR_OK;
        result->largest_free_after = pool->index.largest_free();
        result->remapped_chunks = pool->counts.remapped_chunks - remapped;
        return status;
    });
}

/* Give chunks back that are wholly free, while more than `keep` bytes are reserved. */
inline int gpu_trim(sr_gpu_pool *pool, std::size_t keep, std::uint64_t *released) {
    *released = 0;
    return with_growing(pool, [&](Lock *lock) {
        const std::uint64_t before = pool->counts.reserved_bytes;
        const int status = trim(pool, lock, keep);
        *released = before - std::min(before, pool->counts.reserved_bytes);
        return status;
    });
}

/* Wait for the streams, give back all that is free, and lend no more. */
inline int gpu_close(sr_gpu_pool *pool) {
    pool->closed.store(true, std::memory_order_relaxed);
    return with_growing(pool, [&](Lock *lock) {
        const int waited = wait_for_streams(pool, lock);
        const int trimmed = trim(pool, lock, 0);
        const int leftovers = release_leftovers(pool);
        return waited != SR_OK ? waited : trimmed != SR_OK ? trimmed : leftovers;
    });
}

inline int gpu_statistics(sr_gpu_pool *pool, sr_gpu_statistics *result) {
    if (forked(pool)) {
        return SR_FORKED;
    }
    const std::lock_guard<std::mutex> guard(pool->mutex);
    const Index &index = pool->index;
    *result = pool->counts;
    result->limit_bytes = pool->options.limit;
    result->free_bytes = index.free_bytes();
    result->largest_free_bytes = index.largest_free();
    result->pinned_free_bytes = index.free_bytes() - whole_chunk_bytes(pool);
    result->blocks = pool->counts.allocations - pool->counts.frees;
    result->free_blocks = index.free_blocks();
    result->chunks = pool->vmm ? pool->counts.reserved_bytes / pool->options.chunk
                               : pool->segments.size();
    result->splits = index.splits();
    result->merges = index.merges();
    result->vmm = pool->vmm;
    result->error = pool->error.load(std::memory_order_relaxed);
    return SR_OK;
}

/* Whether the pool can lend: SR_OK, SR_FORKED, SR_POISONED or SR_CLOSED. */
inline int gpu_state(const sr_gpu_pool *pool) { return usable(pool); }

/* What calls of others in the pool's context are to do with: the context, and how to take codes. */
inline void *gpu_context(const sr_gpu_pool *pool) { return pool->context; }
inline int gpu_judge(sr_gpu_pool *pool, int code, const char *call) {
    return judge(pool, code, call);
}

/* Birth and death */

/* Whether all that the pool had on the device is lost anyway. */
inline bool dead(const sr_gpu_pool *pool) {
    return pool->error.load(std::memory_order_relaxed) != 0;
}

/* Give everything back that the driver gave; with the context. Can be tried again. */
inline int dismantle(sr_gpu_pool *pool) {
    int status = SR_OK;
    {
        Lock lock(pool->mutex);
        status = wait_for_streams(pool, &lock);
    }
    const std::uint64_t chunk = pool->options.chunk;
    for (std::size_t i = 0; i < pool->physical.size(); ++i) {
        bool unmapped;
        if (pool->physical[i] != 0) {
            release_range(pool, pool->base + i * chunk, chunk, &unmapped, &status);
        }
    }
    const auto note = [&](int result) { status = result == SR_OK ? status : result; };
    note(release_leftovers(pool));
    for (std::size_t i = pool->segments.size(); i-- > 0;) {
        const int result = SR_CALL(pool, free, pool->segments[i].allocated);
        note(result);
        if (result == SR_OK) {
            pool->segments[i] = pool->segments.back();
            pool->segments.pop_back();
        }
    }
    if (status == SR_OK && pool->range_size != 0) {
        note(SR_CALL(pool, unreserve, pool->base, pool->range_size));
        pool->range_size = status == SR_OK ? 0 : pool->range_size;
    }
    while (status == SR_OK && !pool->events.empty()) {
        note(SR_CALL(pool, event_destroy, pool->events.back()));
        if (status == SR_OK) {
            pool->events.pop_back();
        }
    }
    return status;
}

/* Destroy a pool that no other thread is using; SR_IN_USE, and nothing, while a block is. When the
   driver refuses something, the pool stays, and the next call goes on from there. In a forked child
   nothing happens: another thread of the parent may have held its mutexes. */
inline int gpu_pool_free(sr_gpu_pool *pool) {
    if (forked(pool)) {
        return SR_OK;
    }
    if (!dead(pool)) {
        if (pool->counts.allocations != pool->counts.frees) {
            return SR_IN_USE;
        }
        if (pool->context != nullptr) {
            int status;
            {
                const Current current(pool);
                status = current.status() == SR_OK ? dismantle(pool) : current.status();
            }
            if (status == SR_OK) {
                status = SR_CALL(pool, release_context, pool->options.device);
            }
            if (status != SR_OK && !dead(pool)) {
                return status;
            }
        }
    }
    delete pool;
    return SR_OK;
}

inline bool is_power_of_two(std::uint64_t n) { return n != 0 && (n & (n - 1)) == 0; }

/* Reserve the range of addresses, as one unmapped block, and room to work on it. */
inline int prepare_range(sr_gpu_pool *pool) {
    const std::size_t chunk = pool->options.chunk;
    const std::size_t places = 2 * ((pool->options.limit + chunk - 1) / chunk);
    try {
        pool->physical.assign(places, 0);
        pool->orphans.reserve(places);
        pool->carried.reserve(places);
        pool->runs.reserve(places);
    } catch (const std::bad_alloc &) {
        return SR_NO_MEMORY;
    }
    if (!pool->index.reserve(2, kMaxBlocks)) {
        return SR_NO_MEMORY;
    }
    const int status = SR_CALL(pool, reserve, &pool->base, places * chunk);
    if (status == SR_OK) {
        pool->range_size = places * chunk;
        pool->index.settle(pool->index.add_range(pool->base, pool->range_size), State::kUnmapped);
    }
    return status;
}

inline int prepare(sr_gpu_pool *pool) {
    sr_gpu_options &options = pool->options;
    std::size_t total = 0;
    std::size_t granularity = 0;
    int vmm = 0;
    int status = SR_CALL(pool, describe, options.device, &total, &granularity, &vmm);
    if (status != SR_OK) {
        return status;
    }
    pool->vmm = options.backing == SR_GPU_VMM || (options.backing == SR_GPU_AUTO && vmm);
    options.limit = options.limit == 0 ? total : options.limit;
    options.chunk = round_up(options.chunk, pool->vmm ? granularity : pool->index.granule());
    if (pool->vmm) {
        // Chunks make up what is reserved, so the limit is of whole ones.
        options.limit = options.limit / options.chunk * options.chunk;
    }
    if (options.limit == 0 || options.initial > options.limit) {
        return SR_INVALID;
    }
    if (pool->vmm && !vmm) {
        last_failure = {801, "describe"};  // NOT_SUPPORTED
        return SR_DRIVER_ERROR;
    }
    status = pool->vmm ? prepare_range(pool) : SR_OK;
    if (status == SR_OK && options.initial != 0) {
        Lock lock(pool->mutex);
        status = extend(pool, &lock, round_up(options.initial, pool->index.granule()), false);
    }
    return status;
}

/* Make a pool. The calls of the driver must stay valid for as long as it lives. */
inline int gpu_pool_new(const sr_gpu_options &options, const sr_gpu_driver &driver,
                        sr_gpu_pool **result) {
    if (!is_power_of_two(options.alignment) || options.alignment < 256 ||
        options.alignment > (std::size_t{2} << 20) || options.chunk < options.alignment ||
        options.chunk > kMaxSize || options.limit > kMaxSize || options.initial > kMaxSize) {
        return SR_INVALID;
    }
    std::unique_ptr<sr_gpu_pool> pool;
    try {
        pool = std::make_unique<sr_gpu_pool>(options, driver, __builtin_ctzll(options.alignment));
    } catch (const std::bad_alloc &) {
        return SR_NO_MEMORY;
    }
    pool->tag = last_tag.fetch_add(1, std::memory_order_relaxed) % kMaxTags;
    pool->epoch = fork_epoch.load(std::memory_order_relaxed);
    int status = SR_CALL(pool.get(), retain_context, options.device, &pool->context);
    if (status != SR_OK) {
        return status;
    }
    {
        const Current current(pool.get());
        status = current.status() == SR_OK ? prepare(pool.get()) : current.status();
    }
    if (status != SR_OK) {
        const Failure why = last_failure;
        // Twice: giving back may fail as well, and the second attempt goes on from there.
        sr_gpu_pool *failed = pool.release();
        if (gpu_pool_free(failed) != SR_OK) {
            gpu_pool_free(failed);
        }
        last_failure = why;
        return status;
    }
    *result = pool.release();
    return SR_OK;
}

}  // namespace speechrnt_gpu
