/* Two ways to find free blocks that libraries for GPU memory use, on numbers instead of memory.

   ListIndex does as RMM's coalescing_free_list: a list by address; best fit looks at all of it, and
   so does giving back. TreeIndex does as PyTorch's and CuPy's allocators: an ordered set by size and
   address, and links between neighbours. Both begin with one endless block. */

#pragma once

#include <algorithm>
#include <cstdint>
#include <list>
#include <set>
#include <vector>

#include "_tlsf.h"

namespace peers {

constexpr std::uint64_t kGranule = 512;
constexpr std::uint64_t kEndless = std::uint64_t{1} << 45;

inline std::uint64_t whole(std::uint64_t size) {
    return (size + kGranule - 1) / kGranule * kGranule;
}

class ListIndex {
  public:
    struct Block {
        std::uint64_t address;
        std::uint64_t size;
    };
    using Handle = Block;

    ListIndex() { free_.push_back({0, kEndless}); }

    Handle take(std::uint64_t size) {
        const auto best = std::min_element(free_.begin(), free_.end(), [&](auto &a, auto &b) {
            const bool a_fits = a.size >= size;
            const bool b_fits = b.size >= size;
            return a_fits && (!b_fits || a.size < b.size);
        });
        const Block block = {best->address, size};
        if (best->size == size) {
            free_.erase(best);
        } else {
            best->address += size;
            best->size -= size;
        }
        return block;
    }

    void give(const Handle &block) {
        const auto next = std::find_if(free_.begin(), free_.end(), [&](auto &other) {
            return other.address > block.address;
        });
        const auto previous = next == free_.begin() ? free_.end() : std::prev(next);
        const bool before = previous != free_.end() &&
                            previous->address + previous->size == block.address;
        const bool after = next != free_.end() && block.address + block.size == next->address;
        if (before) {
            previous->size += block.size;
            if (after) {
                previous->size += next->size;
                free_.erase(next);
            }
        } else if (after) {
            next->address = block.address;
            next->size += block.size;
        } else {
            free_.insert(next, block);
        }
    }

    static std::uint64_t end(const Handle &block) { return block.address + block.size; }
    std::uint64_t holes() const { return free_.size(); }

  private:
    std::list<Block> free_;
};

class TreeIndex {
  public:
    struct Block {
        std::uint64_t address;
        std::uint64_t size;
        Block *previous;
        Block *next;
        bool free;
    };
    using Handle = Block *;

    TreeIndex() { free_.insert(new Block{0, kEndless, nullptr, nullptr, true}); }
    ~TreeIndex() {
        for (Block *block : free_) {
            delete block;  // those in use are the trace's, which frees all
        }
    }

    Handle take(std::uint64_t size) {
        Block key{0, size, nullptr, nullptr, false};
        const auto found = free_.lower_bound(&key);
        Block *block = *found;
        free_.erase(found);
        block->free = false;
        if (block->size > size) {
            Block *rest = new Block{block->address + size, block->size - size, block, block->next,
                                    true};
            if (rest->next != nullptr) {
                rest->next->previous = rest;
            }
            block->next = rest;
            block->size = size;
            free_.insert(rest);
        }
        return block;
    }

    void give(Handle block) {
        Block *previous = block->previous;
        if (previous != nullptr && previous->free) {
            free_.erase(previous);
            previous->size += block->size;
            unlink(block);
            block = previous;
        }
        Block *next = block->next;
        if (next != nullptr && next->free) {
            free_.erase(next);
            block->size += next->size;
            unlink(next);
        }
        block->free = true;
        free_.insert(block);
    }

    static std::uint64_t end(const Handle &block) { return block->address + block->size; }
    std::uint64_t holes() const { return free_.size(); }

  private:
    struct Less {
        bool operator()(const Block *a, const Block *b) const {
            return a->size != b->size ? a->size < b->size : a->address < b->address;
        }
    };

    static void unlink(Block *block) {
        if (block->previous != nullptr) {
            block->previous->next = block->next;
        }
        if (block->next != nullptr) {
            block->next->previous = block->previous;
        }
        delete block;
    }

    std::set<Block *, Less> free_;
};

class OurIndex {
  public:
    using Handle = std::uint32_t;

    OurIndex() : index_(9) {
        index_.reserve(1);
        index_.settle(index_.add_range(0, kEndless), speechrnt_gpu::State::kFree);
    }
    Handle take(std::uint64_t size) {
        index_.reserve(1);
        return index_.take(size);
    }
    void give(Handle block) { index_.settle(block, speechrnt_gpu::State::kFree); }
    std::uint64_t end(Handle block) const { return index_[block].address + index_[block].size; }
    std::uint64_t holes() const { return index_.free_blocks(); }

  private:
    speechrnt_gpu::Index index_;
};

struct Result {
    std::uint64_t footprint;  // the highest address used
    std::uint64_t peak;       // the most bytes live
    std::uint64_t most_holes;
};

/* Replay a trace; with `observe`, note what it takes, which costs time. */
template <typename Index>
Result replay(const std::int64_t *trace, std::size_t n, bool observe) {
    Index index;
    std::vector<typename Index::Handle> handles;
    std::vector<std::uint64_t> sizes;
    handles.reserve(n);
    sizes.reserve(n);
    Result result = {};
    std::uint64_t live = 0;
    for (std::size_t i = 0; i < n; ++i) {
        if (trace[i] > 0) {
            const std::uint64_t size = whole(trace[i]);
            handles.push_back(index.take(size));
            if (observe) {
                sizes.push_back(size);
                live += size;
                result.footprint = std::max(result.footprint, index.end(handles.back()));
                result.peak = std::max(result.peak, live);
            }
        } else {
            const std::size_t k = static_cast<std::size_t>(-trace[i] - 1);
            index.give(handles[k]);
            live -= observe ? sizes[k] : 0;
        }
        if (observe) {
            result.most_holes = std::max(result.most_holes, index.holes());
        }
    }
    return result;
}

}  // namespace peers
