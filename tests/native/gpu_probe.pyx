"""Looks inside a GpuMemoryPool: whether its index and its backing agree with themselves."""

from speechrnt._gpu_pool cimport gpu_pool_of, sr_gpu_pool

cdef extern from *:
    """
    #include <string>
    #include "_gpu_pool.h"

    namespace speechrnt_gpu {

    #define SR_EXPECT(condition) \\
        if (!(condition)) return #condition

    struct Audit {
        /* Null, or what does not hold. */
        static const char *check(sr_gpu_pool *pool) {
            const std::lock_guard<std::mutex> guard(pool->mutex);
            const Index &index = pool->index;
            std::uint64_t bytes[6] = {};
            std::uint64_t blocks[6] = {};
            for (std::uint32_t i = 0; i < index.nodes(); ++i) {
                const Block &block = index[i];
                const int state = static_cast<int>(block.state);
                ++blocks[state];
                if (block.state == State::kVacant) {
                    SR_EXPECT(block.generation % 2 == 0);
                    continue;
                }
                bytes[state] += block.size;
                SR_EXPECT(block.size != 0 && block.size % index.granule() == 0);
                SR_EXPECT((block.generation % 2 == 1) == (block.state == State::kUsed));
                if (block.next != kNone) {
                    const Block &next = index[block.next];
                    SR_EXPECT(next.previous == i);
                    SR_EXPECT(next.address == block.address + block.size);
                    SR_EXPECT(next.state != block.state || (block.state != State::kFree &&
                                                            block.state != State::kUnmapped));
                }
                if (block.previous != kNone) {
                    SR_EXPECT(index[block.previous].next == i);
                }
            }
            std::uint64_t listed = 0;
            for (unsigned level = 0; level < Index::kLevels; ++level) {
                for (unsigned bin = 0; bin < Index::kBins; ++bin) {
                    const bool any = index.bins_[level][bin] != kNone;
                    SR_EXPECT(any == (index.maps_[level] >> bin & 1));
                    std::uint32_t above = kNone;
                    for (std::uint32_t i = index.bins_[level][bin]; i != kNone;
                         i = index[i].below) {
                        const auto own = index.bin_of(index[i].size);
                        SR_EXPECT(index[i].state == State::kFree && index[i].above == above);
                        SR_EXPECT(own.level == level && own.bin == bin);
                        above = i;
                        ++listed;
                    }
                }
                SR_EXPECT((index.maps_[level] != 0) == (index.levels_ >> level & 1));
            }
            SR_EXPECT(listed == blocks[static_cast<int>(State::kFree)]);
            SR_EXPECT(listed == index.free_blocks_);
            SR_EXPECT(index.free_bytes_ == bytes[static_cast<int>(State::kFree)]);
            std::uint64_t unmapped = 0;
            for (std::uint32_t i = index.unmapped_; i != kNone; i = index[i].below) {
                SR_EXPECT(index[i].state == State::kUnmapped);
                ++unmapped;
            }
            SR_EXPECT(unmapped == blocks[static_cast<int>(State::kUnmapped)]);
            SR_EXPECT(index.n_vacant_ == blocks[static_cast<int>(State::kVacant)]);
            SR_EXPECT(blocks[static_cast<int>(State::kBusy)] == 0);

            const sr_gpu_statistics &counts = pool->counts;
            SR_EXPECT(counts.in_use_bytes == bytes[static_cast<int>(State::kUsed)]);
            SR_EXPECT(counts.pending_bytes == bytes[static_cast<int>(State::kPending)]);
            SR_EXPECT(counts.allocations - counts.frees == blocks[static_cast<int>(State::kUsed)]);
            SR_EXPECT(counts.reserved_bytes ==
                      counts.in_use_bytes + counts.pending_bytes + index.free_bytes_);
            if (!pool->vmm) {
                std::uint64_t segments = 0;
                for (const Segment &segment : pool->segments) {
                    segments += segment.size;
                }
                SR_EXPECT(segments == counts.reserved_bytes);
                return nullptr;
            }
            std::uint64_t mapped = 0;
            for (const std::uint64_t physical : pool->physical) {
                mapped += physical != 0 ? pool->options.chunk : 0;
            }
            SR_EXPECT(mapped == counts.reserved_bytes && pool->orphans.empty());
            for (std::uint32_t i = 0; i < index.nodes(); ++i) {
                const Block &block = index[i];
                for (std::uint64_t at = block.address;
                     block.state != State::kVacant && at < block.address + block.size;
                     at += std::min<std::uint64_t>(block.size, pool->options.chunk)) {
                    SR_EXPECT((*physical_at(pool, at) == 0) == (block.state == State::kUnmapped));
                }
            }
            return nullptr;
        }
    };

    }
    """
    const char *c_audit "speechrnt_gpu::Audit::check"(sr_gpu_pool *pool) nogil


def audit(pool):
    """Return None, or the condition that does not hold. No other thread may use the pool."""
    cdef const char *failure = c_audit(gpu_pool_of(pool))
    return None if failure == NULL else failure.decode()
