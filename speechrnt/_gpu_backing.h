/* Where a pool of GPU memory gets its memory, and how it rearranges and returns it.

   With virtual memory management, the pool reserves one range of addresses, and maps physical
   chunks of one size into it, one handle each. A place in the range is mapped or not; the index has
   both kinds as blocks. To serve a request, `extend` looks for the place where the fewest chunks,
   together with the free neighbours, make a block that is large enough. It moves wholly free chunks
   there, from the smallest free blocks first, and makes the others. So physical memory that lies
   about in pieces becomes one block again, without moving any address that is in use; only a chunk
   with a used byte in it stays where it is.

   The range is twice the limit: chunks that stay leave gaps between them, and a run of moved chunks
   needs a gap as long as itself.

   Where the device has no virtual memory management, memory comes from cuMemAlloc in segments,
   which can be given back, but not joined.

   Everything here needs `growing` held and the context current; functions that take a lock are
   called with `mutex` held, and release it while they call the driver. When a call fails that gives
   memory back, the memory stays accounted for, and closing the pool tries again. */

#pragma once

#include "_gpu_state.h"

namespace speechrnt_gpu {

/* Virtual memory management */

inline std::uint64_t *physical_at(sr_gpu_pool *pool, std::uint64_t address) {
    return &pool->physical[(address - pool->base) / pool->options.chunk];
}

/* The whole chunks in a free block. */
inline Run whole_chunks(const sr_gpu_pool *pool, std::uint32_t block) {
    const std::uint64_t chunk = pool->options.chunk;
    const Block &node = pool->index[block];
    const std::uint64_t from = pool->base + round_up(node.address - pool->base, chunk);
    const std::uint64_t end = node.address + node.size;
    const std::uint64_t to = pool->base + (end - pool->base) / chunk * chunk;
    return {block, from, to > from ? to - from : 0, false};
}

inline std::uint64_t whole_chunk_bytes(const sr_gpu_pool *pool) {
    std::uint64_t bytes = 0;
    if (pool->vmm) {
        pool->index.for_each_free(pool->options.chunk, [&](std::uint32_t block) {
            bytes += whole_chunks(pool, block).size;
        });
    }
    return bytes;
}

/* Give a chunk back that is not mapped; true if that worked. */
inline bool release_chunk(sr_gpu_pool *pool, std::uint64_t physical, int *status) {
    const int result = SR_CALL(pool, release, physical);
    if (result != SR_OK) {
        *status = result;
        pool->orphans.push_back(physical);
    }
    return result == SR_OK;
}

/* Unmap [address, address + size) and return its chunks; how many bytes were released. */
inline std::uint64_t release_range(sr_gpu_pool *pool, std::uint64_t address, std::uint64_t size,
                                   bool *unmapped, int *status) {
    const int result = SR_CALL(pool, unmap, address, size);
    *unmapped = result == SR_OK;
    if (result != SR_OK) {
        *status = result;
        return 0;
    }
    std::uint64_t released = 0;
    for (std::uint64_t at = address; at < address + size; at += pool->options.chunk) {
        std::uint64_t *physical = physical_at(pool, at);
        released += release_chunk(pool, *physical, status) ? pool->options.chunk : 0;
        *physical = 0;
    }
    return released;
}

/* An unmapped place that chunks may be mapped to, and what it makes with its free neighbours. */
struct Site {
    std::uint32_t block = kNone;
    std::uint64_t address = 0;
    std::uint64_t size = 0;    // of the place, in whole chunks
    std::uint64_t joined = 0;  // with neighbours
    std::uint32_t left = kNone;
    std::uint32_t right = kNone;
};

inline Site make_site(const sr_gpu_pool *pool, std::uint32_t unmapped, std::uint64_t address,
                      std::uint64_t size) {
    const Index &index = pool->index;
    const Block &gap = index[unmapped];
    Site site;
    site.block = unmapped;
    site.address = address;
    site.size = site.joined = size;
    if (address == gap.address && gap.previous != kNone &&
        index[gap.previous].state == State::kFree) {
        site.left = gap.previous;
        site.joined += index[gap.previous].size;
    }
    if (address + size == gap.address + gap.size && gap.next != kNone &&
        index[gap.next].state == State::kFree) {
        site.right = gap.next;
        site.joined += index[gap.next].size;
    }
    return site;
}

/* The two ends of a gap, with this many bytes of chunks at most. */
template <typename Visit>
void for_each_site(const sr_gpu_pool *pool, std::uint32_t gap, std::uint64_t size, Visit visit) {
    const Block &node = pool->index[gap];
    size = std::min(size, node.size);
    if (size != 0) {
        visit(make_site(pool, gap, node.address, size));
        visit(make_site(pool, gap, node.address + node.size - size, size));
    }
}

/* The place for a block of this size that takes the fewest chunks, and of those the lowest. */
inline Site cheapest_site(const sr_gpu_pool *pool, std::uint64_t need) {
    const std::uint64_t chunk = pool->options.chunk;
    Site best;
    const auto consider = [&](const Site &site) {
        if (site.joined >= need && (best.block == kNone || site.size < best.size ||
                                    (site.size == best.size && site.address < best.address))) {
            best = site;
        }
    };
    for (std::uint32_t gap = pool->index.first_unmapped(); gap != kNone;
         gap = pool->index[gap].below) {
        const Block &node = pool->index[gap];
        const Site ends[] = {make_site(pool, gap, node.address, 0),
                             make_site(pool, gap, node.address + node.size, 0)};
        for (const Site &end : ends) {
            const std::uint64_t missing = need - std::min(need - 1, end.joined);
            for_each_site(pool, gap, round_up(missing, chunk), consider);
        }
        consider(make_site(pool, gap, node.address, node.size));
    }
    return best;
}

/* Whole free chunks that are no part of the site's neighbours. */
inline std::uint64_t collect_runs(sr_gpu_pool *pool, const Site &site, std::uint64_t wanted) {
    std::uint64_t bytes = 0;
    pool->runs.clear();
    pool->index.for_each_free(pool->options.chunk, [&](std::uint32_t block) {
        Run run = whole_chunks(pool, block);
        run.size = std::min(run.size, wanted - bytes);
        if (run.size != 0 && block != site.left && block != site.right) {
            bytes += run.size;
            pool->runs.push_back(run);
        }
    });
    return bytes;
}

/* Take what `runs` names out of the free blocks. */
inline void carve_runs(sr_gpu_pool *pool) {
    for (Run &run : pool->runs) {
        run.block = pool->index.carve(run.block, run.address, run.size);
        run.unmapped = false;
    }
}

inline void settle_runs(sr_gpu_pool *pool) {
    for (const Run &run : pool->runs) {
        pool->index.settle(run.block, run.unmapped ? State::kUnmapped : State::kFree);
    }
}

/* Fill the site: with the chunks of `runs`, and with new ones. */
inline int fill_site(sr_gpu_pool *pool, Lock *lock, const Site &site) {
    const std::uint64_t chunk = pool->options.chunk;
    if (!pool->index.reserve(2 * pool->runs.size() + 3, kMaxBlocks)) {
        return SR_NO_MEMORY;
    }
    const std::uint32_t place = pool->index.carve(site.block, site.address, site.size);
    carve_runs(pool);
    std::uint64_t moving = 0;
    for (const Run &run : pool->runs) {
        moving += run.size;
    }
    lock->unlock();

    // First what may well fail, while nothing has changed.
    int status = SR_OK;
    std::uint64_t created = 0;
    std::uint64_t released = 0;
    std::vector<std::uint64_t> &carried = pool->carried;
    carried.clear();
    while (status == SR_OK && moving + created < site.size) {
        std::uint64_t physical = 0;
        status = SR_CALL(pool, create, pool->options.device, &physical, chunk);
        if (status == SR_OK) {
            carried.push_back(physical);
            created += chunk;
        }
    }
    const bool go_on = status == SR_OK;
    for (std::size_t i = 0; go_on && i < pool->runs.size(); ++i) {
        Run &run = pool->runs[i];
        const int result = SR_CALL(pool, unmap, run.address, run.size);
        run.unmapped = result == SR_OK;
        if (result != SR_OK) {
            status = result;
            break;
        }
        for (std::uint64_t at = run.address; at < run.address + run.size; at += chunk) {
            std::uint64_t *physical = physical_at(pool, at);
            carried.push_back(*physical);
            *physical = 0;
        }
    }
    std::uint64_t mapped = 0;
    while (go_on && !carried.empty()) {
        const int result = SR_CALL(pool, map, site.address + mapped, chunk, carried.back());
        if (result != SR_OK) {
            status = result;
            break;
        }
        *physical_at(pool, site.address + mapped) = carried.back();
        carried.pop_back();
        mapped += chunk;
    }
    for (; !carried.empty(); carried.pop_back()) {
        released += release_chunk(pool, carried.back(), &status) ? chunk : 0;
    }
    bool usable_place = mapped != 0;
    bool unmapped_again = false;
    if (mapped != 0) {
        const int result = SR_CALL(pool, allow, pool->options.device, site.address, mapped);
        if (result != SR_OK) {
            usable_place = false;
            released += release_range(pool, site.address, mapped, &unmapped_again, &status);
            status = result;
        }
    }

    lock->lock();
    count_reserved(pool, created, released);
    settle_runs(pool);
    if (mapped != 0 && mapped < site.size) {
        pool->index.settle(pool->index.divide(place, mapped), State::kUnmapped);
    }
    if (usable_place) {
        pool->index.settle(place, State::kFree);
        pool->counts.grows += created != 0;
        pool->counts.remapped_chunks += moving / chunk;
    } else if (mapped == 0 || unmapped_again) {
        pool->index.settle(place, State::kUnmapped);
    }  // otherwise it is mapped and useless, and stays busy until the pool goes
    return status;
}

/* Have a free block of this size: by moving free chunks together, if `move`, and by new chunks. */
inline int extend_range(sr_gpu_pool *pool, Lock *lock, std::uint64_t need, bool move) {
    const Site site = cheapest_site(pool, need);
    if (site.block == kNone) {
        return SR_EXHAUSTED;
    }
    pool->runs.clear();
    const std::uint64_t moving = move ? collect_runs(pool, site, site.size) : 0;
    if (site.size - moving > pool->options.limit - std::min<std::uint64_t>(
            pool->options.limit, pool->counts.reserved_bytes)) {
        return SR_EXHAUSTED;
    }
    pool->counts.defragmentations += moving != 0;
    return fill_site(pool, lock, site);
}

/* Move free chunks to where they make the largest block, if it is larger than what there is. */
inline int defragment_range(sr_gpu_pool *pool, Lock *lock) {
    const std::uint64_t free_chunks = whole_chunk_bytes(pool);
    Site best;
    std::uint64_t largest = pool->index.largest_free();
    for (std::uint32_t gap = pool->index.first_unmapped(); gap != kNone;
         gap = pool->index[gap].below) {
        for_each_site(pool, gap, free_chunks, [&](Site site) {
            // Chunks of the neighbours are not there to be moved.
            std::uint64_t movable = free_chunks;
            for (const std::uint32_t neighbour : {site.left, site.right}) {
                movable -= neighbour == kNone ? 0 : whole_chunks(pool, neighbour).size;
            }
            if (movable < site.size) {
                const Block &node = pool->index[gap];
                const bool low = site.address == node.address;
                site = make_site(pool, gap, low ? node.address : node.address + node.size - movable,
                                 movable);
            }
            if (site.size != 0 && site.joined > largest) {
                largest = site.joined;
                best = site;
            }
        });
    }
    if (best.block == kNone) {
        return SR_OK;
    }
    ++pool->counts.defragmentations;
    collect_runs(pool, best, best.size);
    return fill_site(pool, lock, best);
}

/* Release free chunks, from the highest addresses down, while more than `keep` is reserved. */
inline int trim_range(sr_gpu_pool *pool, Lock *lock, std::uint64_t keep) {
    const std::uint64_t chunk = pool->options.chunk;
    std::uint64_t surplus = pool->counts.reserved_bytes - std::min(keep, pool->counts.reserved_bytes);
    surplus = surplus / chunk * chunk;
    collect_runs(pool, Site{}, pool->range_size);
    std::sort(pool->runs.begin(), pool->runs.end(),
              [](const Run &a, const Run &b) { return a.address > b.address; });
    std::size_t n = 0;
    for (; n < pool->runs.size() && surplus != 0; ++n) {
        Run &run = pool->runs[n];
        const std::uint64_t size = std::min(run.size, surplus);
        run.address += run.size - size;
        run.size = size;
        surplus -= size;
    }
    pool->runs.resize(n);
    if (n == 0) {
        return SR_OK;
    }
    if (!pool->index.reserve(2 * n, kMaxBlocks)) {
        return SR_NO_MEMORY;
    }
    carve_runs(pool);
    lock->unlock();
    int status = SR_OK;
    std::uint64_t released = 0;
    for (Run &run : pool->runs) {
        released += release_range(pool, run.address, run.size, &run.unmapped, &status);
    }
    lock->lock();
    count_reserved(pool, 0, released);
    settle_runs(pool);
    pool->counts.trims += released != 0;
    return status;
}

/* Segments */

inline int free_segment(sr_gpu_pool *pool, Lock *lock, std::uint32_t block) {
    const Block node = pool->index[block];
    pool->index.carve(block, node.address, node.size);
    lock->unlock();
    std::size_t i = 0;
    while (pool->segments[i].address != node.address) {
        ++i;
    }
    const int status = SR_CALL(pool, free, pool->segments[i].allocated);
    lock->lock();
    if (status != SR_OK) {
        pool->index.settle(block, State::kFree);
        return status;
    }
    count_reserved(pool, 0, pool->segments[i].size);
    pool->segments[i] = pool->segments.back();
    pool->segments.pop_back();
    pool->index.drop_range(block);
    return SR_OK;
}

/* Call visit(block) for each segment that is wholly free, smaller ones first. */
template <typename Visit>
void for_each_idle(const sr_gpu_pool *pool, Visit visit) {
    pool->index.for_each_free(pool->index.granule(), [&](std::uint32_t block) {
        const Block &node = pool->index[block];
        if (node.previous == kNone && node.next == kNone) {
            visit(block);
        }
    });
}

/* Release idle segments while more than `most` is reserved, but none without which it would be less
   than `least`. */
inline int trim_segments(sr_gpu_pool *pool, Lock *lock, std::uint64_t most, std::uint64_t least) {
    int status = SR_OK;
    bool any = false;
    while (status == SR_OK && pool->counts.reserved_bytes > most) {
        std::uint32_t idle = kNone;
        for_each_idle(pool, [&](std::uint32_t block) {
            if (idle == kNone && pool->counts.reserved_bytes - pool->index[block].size >= least) {
                idle = block;
            }
        });
        if (idle == kNone) {
            break;
        }
        status = free_segment(pool, lock, idle);
        any |= status == SR_OK;
    }
    pool->counts.trims += any;
    return status;
}

/* cuMemAlloc promises an alignment of 256 bytes only, though it mostly gives more. */
inline int allocate_aligned(sr_gpu_pool *pool, std::uint64_t size, std::uint64_t *allocated) {
    const std::uint64_t granule = pool->index.granule();
    int status = SR_CALL(pool, alloc, allocated, size);
    if (status == SR_OK && *allocated % granule != 0) {
        status = SR_CALL(pool, free, *allocated);
        if (status == SR_OK) {
            status = SR_CALL(pool, alloc, allocated, size + granule - 256);
        }
    }
    return status;
}

inline int add_segment(sr_gpu_pool *pool, Lock *lock, std::uint64_t size) {
    if (!pool->index.reserve(1, kMaxBlocks)) {
        return SR_NO_MEMORY;
    }
    try {
        pool->segments.reserve(pool->segments.size() + 1);
    } catch (const std::bad_alloc &) {
        return SR_NO_MEMORY;
    }
    const std::uint32_t block = pool->index.add_range(0, size);
    lock->unlock();
    std::uint64_t allocated = 0;
    const int status = allocate_aligned(pool, size, &allocated);
    lock->lock();
    if (status != SR_OK) {
        pool->index.drop_range(block);
        return status;
    }
    const std::uint64_t address = round_up(allocated, pool->index.granule());
    pool->segments.push_back({allocated, size, address});
    pool->index[block].address = address;
    pool->index.settle(block, State::kFree);
    count_reserved(pool, size, 0);
    ++pool->counts.grows;
    return SR_OK;
}

inline int extend_segments(sr_gpu_pool *pool, Lock *lock, std::uint64_t need) {
    const std::uint64_t limit = pool->options.limit;
    for (const std::uint64_t size : {round_up(need, pool->options.chunk), need}) {
        if (size > limit) {
            continue;
        }
        const std::uint64_t most = limit - size;
        std::uint64_t idle = 0;
        for_each_idle(pool, [&](std::uint32_t block) { idle += pool->index[block].size; });
        if (pool->counts.reserved_bytes > most && pool->counts.reserved_bytes - idle <= most) {
            trim_segments(pool, lock, most, 0);
        }
        if (pool->counts.reserved_bytes <= most) {
            int status = add_segment(pool, lock, size);
            if (status == SR_NO_MEMORY && trim_segments(pool, lock, 0, 0) == SR_OK) {
                status = add_segment(pool, lock, size);
            }
            if (status != SR_NO_MEMORY || size == need) {
                return status;
            }
        }
    }
    return SR_EXHAUSTED;
}

/* Either */

inline int extend(sr_gpu_pool *pool, Lock *lock, std::uint64_t need, bool move) {
    return pool->vmm ? extend_range(pool, lock, need, move) : extend_segments(pool, lock, need);
}

inline int trim(sr_gpu_pool *pool, Lock *lock, std::uint64_t keep) {
    return pool->vmm ? trim_range(pool, lock, keep) : trim_segments(pool, lock, keep, keep);
}

/* What earlier attempts could not give back, for a pool without free or busy neighbours left. */
inline int release_leftovers(sr_gpu_pool *pool) {
    int status = SR_OK;
    std::uint64_t released = 0;
    for (std::size_t i = pool->orphans.size(); i-- > 0;) {
        const int result = SR_CALL(pool, release, pool->orphans[i]);
        if (result == SR_OK) {
            pool->orphans[i] = pool->orphans.back();
            pool->orphans.pop_back();
            released += pool->options.chunk;
        } else {
            status = result;
        }
    }
    count_reserved(pool, 0, released);
    return status;
}

}  // namespace speechrnt_gpu
