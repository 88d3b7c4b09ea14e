/* An index of address ranges: two-level segregated fit, with all of its data on the host.

   After Masmano et al., "TLSF: a new dynamic memory allocator for real-time systems" (2004): a
   free block is in the bin of its size, 32 bins to each power of two, and two levels of bitmaps
   find the smallest bin that holds one large enough. Allocation and release take constant time.

   Two things differ. The blocks are described by an array of nodes, as the memory itself cannot be
   read from here; a block is known by its node's number, and nobody needs to find a node by its
   address. And of the request's own bin, whose blocks may be too small by up to a thirty-second,
   up to kScan are looked at for the best fit: that brings the memory needed down to that of an
   exact best fit.

   Ranges may have parts that are not backed by memory. Those are blocks, too, in a list instead of
   a bin. Free neighbours are merged at once, and so are unmapped ones; neighbours are of one range.

   Not thread-safe. */

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace speechrnt_gpu {

constexpr std::uint32_t kNone = 0xffffffff;

enum class State : std::uint8_t {
    kVacant,    // a node without a block
    kFree,      // in a bin
    kUsed,
    kPending,   // freed, but a stream may still use it
    kUnmapped,  // no memory: in the list of such
    kBusy,      // taken out for a while, to be mapped or unmapped
};

struct Block {
    std::uint64_t address;
    std::uint64_t size;
    std::uint64_t requested;
    std::uint32_t previous;  // neighbours in the range, by address
    std::uint32_t next;
    std::uint32_t above;  // neighbours in a bin or another list
    std::uint32_t below;
    std::uint32_t generation;  // grows whenever the block is taken and given back: odd in between
    State state;
};

class Index {
  public:
    static constexpr unsigned kBinBits = 5;
    static constexpr unsigned kBins = 1u << kBinBits;
    static constexpr unsigned kLevels = 64 - kBinBits;
    static constexpr unsigned kScan = 8;

    /* Sizes and addresses are multiples of 2^shift. */
    explicit Index(unsigned shift) : shift_(shift) {
        for (auto &level : bins_) {
            std::fill(level, level + kBins, kNone);
        }
    }

    Block &operator[](std::uint32_t block) { return nodes_[block]; }
    const Block &operator[](std::uint32_t block) const { return nodes_[block]; }
    std::size_t nodes() const { return nodes_.size(); }
    std::uint64_t granule() const { return std::uint64_t{1} << shift_; }

    /* Have this many vacant nodes. No other function needs memory, and each says what it takes. */
    bool reserve(std::size_t nodes, std::size_t limit = kNone) {
        if (n_vacant_ >= nodes) {
            return true;
        }
        if (nodes_.size() + nodes > limit) {
            return false;
        }
        const std::size_t wanted = nodes_.size() + nodes;
        if (wanted > nodes_.capacity()) {
            try {
                nodes_.reserve(std::max(wanted, 2 * nodes_.capacity()));
            } catch (const std::bad_alloc &) {
                return false;
            }
        }
        while (n_vacant_ < nodes) {
            nodes_.push_back(Block{});
            vacate(static_cast<std::uint32_t>(nodes_.size() - 1));
        }
        return true;
    }

    /* Add a range, as one busy block. Takes a node. */
    std::uint32_t add_range(std::uint64_t address, std::uint64_t size) {
        return occupy(address, size);
    }

    /* Drop a range, of which nothing but one busy block is left. */
    void drop_range(std::uint32_t block) { vacate(block); }

    /* Take a block of this size from a free one, from its low end; kNone if there is none. Takes a
       node. */
    std::uint32_t take(std::uint64_t size) {
        const std::uint32_t block = find(size);
        if (block != kNone) {
            remove(block);
            nodes_[block].state = State::kUsed;
            if (nodes_[block].size > size) {
                ++splits_;
                insert(split(block, size), State::kFree);
            }
        }
        return block;
    }

    /* Take [address, address + size) out of a free or unmapped block that contains it, as a busy
       one. Takes two nodes. */
    std::uint32_t carve(std::uint32_t block, std::uint64_t address, std::uint64_t size) {
        const State state = nodes_[block].state;
        remove(block);
        nodes_[block].state = State::kBusy;
        if (address > nodes_[block].address) {
            const std::uint32_t rest = split(block, address - nodes_[block].address);
            insert(block, state);
            block = rest;
        }
        if (nodes_[block].size > size) {
            insert(split(block, size), state);
        }
        nodes_[block].state = State::kBusy;
        return block;
    }

    /* Divide a busy block; what is beyond `size` is busy, too. Takes a node. */
    std::uint32_t divide(std::uint32_t block, std::uint64_t size) {
        const std::uint32_t rest = split(block, size);
        nodes_[rest].state = State::kBusy;
        return rest;
    }

    /* Make a block free or unmapped, and one with its neighbours of that state. */
    std::uint32_t settle(std::uint32_t block, State state) {
        nodes_[block].state = State::kBusy;
        const std::uint32_t next = nodes_[block].next;
        if (next != kNone && nodes_[next].state == state) {
            remove(next);
            absorb_next(block, state);
        }
        const std::uint32_t previous = nodes_[block].previous;
        if (previous != kNone && nodes_[previous].state == state) {
            remove(previous);
            absorb_next(previous, state);
            block = previous;
        }
        insert(block, state);
        return block;
    }

    std::uint64_t free_bytes() const { return free_bytes_; }
    std::uint64_t free_blocks() const { return free_blocks_; }
    std::uint64_t splits() const { return splits_; }
    std::uint64_t merges() const { return merges_; }
    std::uint32_t first_unmapped() const { return unmapped_; }

    std::uint64_t largest_free() const {
        if (levels_ == 0) {
            return 0;
        }
        const unsigned level = 63 - __builtin_clzll(levels_);
        const unsigned bin = 31 - __builtin_clz(maps_[level]);
        std::uint64_t largest = 0;
        for (std::uint32_t i = bins_[level][bin]; i != kNone; i = nodes_[i].below) {
            largest = std::max(largest, nodes_[i].size);
        }
        return largest;
    }

    /* Call visit(block) for each free block of this size or more, smaller bins first; visit must
       not change the index. */
    template <typename Visit>
    void for_each_free(std::uint64_t size, Visit visit) const {
        const Bin first = bin_of(size);
        for (unsigned level = first.level; level < kLevels; ++level) {
            std::uint32_t map = maps_[level];
            if (level == first.level) {
                map &= ~std::uint32_t{0} << first.bin;
            }
            for (; map != 0; map &= map - 1) {
                std::uint32_t i = bins_[level][__builtin_ctz(map)];
                for (; i != kNone; i = nodes_[i].below) {
                    if (nodes_[i].size >= size) {
                        visit(i);
                    }
                }
            }
        }
    }

  private:
    friend struct Audit;  // of the tests

    struct Bin {
        unsigned level;
        unsigned bin;
    };

    /* Sizes below 32 granules have a bin each, in level 0. */
    Bin bin_of(std::uint64_t size) const {
        const std::uint64_t granules = size >> shift_;
        if (granules < kBins) {
            return {0, static_cast<unsigned>(granules)};
        }
        const unsigned log = 63 - __builtin_clzll(granules);
        return {log - kBinBits + 1,
                static_cast<unsigned>(granules >> (log - kBinBits)) & (kBins - 1)};
    }

    std::uint32_t find(std::uint64_t size) const {
        const Bin own = bin_of(size);
        std::uint32_t unseen = kNone;
        std::uint32_t best = best_fit(bins_[own.level][own.bin], size, &unseen);
        if (best != kNone) {
            return best;
        }
        unsigned level = own.level;
        std::uint32_t map = own.bin + 1 < kBins ? maps_[level] & (~std::uint32_t{0} << (own.bin + 1)) : 0;
        if (map == 0) {
            const std::uint64_t levels = level + 1 < 64 ? levels_ & (~std::uint64_t{0} << (level + 1)) : 0;
            if (levels == 0) {
                // Only now, where the alternative is to grow, the rest of the bin.
                while (best == kNone && unseen != kNone) {
                    best = best_fit(unseen, size, &unseen);
                }
                return best;
            }
            level = __builtin_ctzll(levels);
            map = maps_[level];
        }
        return best_fit(bins_[level][__builtin_ctz(map)], size, &unseen);
    }

    /* Of the first kScan blocks from `block` on, the smallest that is large enough. */
    std::uint32_t best_fit(std::uint32_t block, std::uint64_t size, std::uint32_t *unseen) const {
        std::uint32_t best = kNone;
        std::uint64_t best_size = ~std::uint64_t{0};
        for (unsigned n = 0; n < kScan && block != kNone; ++n) {
            const Block &node = nodes_[block];
            if (node.size >= size && node.size < best_size) {
                best = block;
                best_size = node.size;
                if (best_size == size) {
                    break;
                }
            }
            block = node.below;
        }
        *unseen = block;
        return best;
    }

    void insert(std::uint32_t block, State state) {
        Block &node = nodes_[block];
        node.state = state;
        if (state == State::kFree) {
            const Bin bin = bin_of(node.size);
            push(&bins_[bin.level][bin.bin], block);
            maps_[bin.level] |= std::uint32_t{1} << bin.bin;
            levels_ |= std::uint64_t{1} << bin.level;
            free_bytes_ += node.size;
            ++free_blocks_;
        } else if (state == State::kUnmapped) {
            push(&unmapped_, block);
        }
    }

    void remove(std::uint32_t block) {
        Block &node = nodes_[block];
        if (node.state == State::kUnmapped) {
            pop(&unmapped_, block);
            return;
        }
        const Bin bin = bin_of(node.size);
        std::uint32_t *list = &bins_[bin.level][bin.bin];
        pop(list, block);
        free_bytes_ -= node.size;
        --free_blocks_;
        if (*list == kNone) {
            maps_[bin.level] &= ~(std::uint32_t{1} << bin.bin);
            if (maps_[bin.level] == 0) {
                levels_ &= ~(std::uint64_t{1} << bin.level);
            }
        }
    }

    void push(std::uint32_t *list, std::uint32_t block) {
        nodes_[block].above = kNone;
        nodes_[block].below = *list;
        if (*list != kNone) {
            nodes_[*list].above = block;
        }
        *list = block;
    }

    void pop(std::uint32_t *list, std::uint32_t block) {
        const Block &node = nodes_[block];
        (node.above == kNone ? *list : nodes_[node.above].below) = node.below;
        if (node.below != kNone) {
            nodes_[node.below].above = node.above;
        }
    }

    /* Cut what is beyond `size` off a block that is in no list, as a block that is in none. */
    std::uint32_t split(std::uint32_t block, std::uint64_t size) {
        Block &node = nodes_[block];
        const std::uint32_t rest = occupy(node.address + size, node.size - size);
        Block &other = nodes_[rest];
        other.previous = block;
        other.next = node.next;
        if (node.next != kNone) {
            nodes_[node.next].previous = rest;
        }
        node.next = rest;
        node.size = size;
        return rest;
    }

    void absorb_next(std::uint32_t block, State state) {
        Block &node = nodes_[block];
        const std::uint32_t next = node.next;
        node.size += nodes_[next].size;
        node.next = nodes_[next].next;
        if (node.next != kNone) {
            nodes_[node.next].previous = block;
        }
        vacate(next);
        merges_ += state == State::kFree;
    }

    std::uint32_t occupy(std::uint64_t address, std::uint64_t size) {
        const std::uint32_t block = vacant_;
        Block &node = nodes_[block];
        vacant_ = node.below;
        --n_vacant_;
        node.address = address;
        node.size = size;
        node.previous = node.next = kNone;
        node.state = State::kBusy;
        return block;
    }

    void vacate(std::uint32_t block) {
        nodes_[block].state = State::kVacant;
        nodes_[block].below = vacant_;
        vacant_ = block;
        ++n_vacant_;
    }

    unsigned shift_;
    std::vector<Block> nodes_;
    std::uint32_t vacant_ = kNone;
    std::size_t n_vacant_ = 0;
    std::uint32_t unmapped_ = kNone;
    std::uint64_t levels_ = 0;  // which levels have a bin that is not empty, and which bins are not
    std::uint32_t maps_[kLevels] = {};
    std::uint32_t bins_[kLevels][kBins];
    std::uint64_t free_bytes_ = 0;
    std::uint64_t free_blocks_ = 0;
    std::uint64_t splits_ = 0;
    std::uint64_t merges_ = 0;
};

}  // namespace speechrnt_gpu
