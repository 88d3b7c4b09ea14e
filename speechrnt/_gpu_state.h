/* What a pool of GPU memory consists of, and how it takes errors of the driver.

   Two mutexes. `mutex` guards everything but what is listed under `growing`; under it nothing waits
   for the device. `growing` serialises what is slow: mapping and unmapping, waiting, giving up.
   Whoever holds it takes `mutex` for each look at the index, and releases it before each call of
   the driver that may take longer than recording an event; the blocks that he works on meanwhile
   are busy. The order is: growing, then mutex. Neither is waited for while the GIL is held, as
   cuda-bindings takes the GIL when it reports that a function of the driver is missing. */

#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <pthread.h>
#include <unordered_map>
#include <vector>

#include "_gpu_types.h"
#include "_tlsf.h"

namespace speechrnt_gpu {

/* A handle is generation << 32 | pool tag << kIndexBits | block, as in _pool_common.h: good for one
   free, never 0, and told from those of other pools. */
constexpr unsigned kIndexBits = 22;
constexpr std::size_t kMaxBlocks = std::size_t{1} << kIndexBits;
constexpr std::uint32_t kMaxTags = 1u << (32 - kIndexBits);
constexpr std::uint64_t kMaxSize = std::uint64_t{1} << 46;

constexpr int kSuccess = 0;
constexpr int kOutOfMemory = 2;
constexpr int kNotInitialized = 3;
constexpr int kDeinitialized = 4;
constexpr int kNotReady = 600;

/* Codes after which each call in the context fails until the process ends: what was on the device
   is lost, and nothing must be freed. Of NOT_INITIALIZED and DEINITIALIZED, the second is usual when
   a process exits. */
inline bool is_sticky(int code) {
    switch (code) {
    case kNotInitialized:
    case kDeinitialized:
    case 214:  // ECC_UNCORRECTABLE
    case 220:  // NVLINK_UNCORRECTABLE
    case 226:  // CONTAINED
    case 700:  // ILLEGAL_ADDRESS
    case 702:  // LAUNCH_TIMEOUT
    case 709:  // CONTEXT_IS_DESTROYED
    case 710:  // ASSERT
    case 714:  // HARDWARE_STACK_ERROR
    case 715:  // ILLEGAL_INSTRUCTION
    case 716:  // MISALIGNED_ADDRESS
    case 717:  // INVALID_ADDRESS_SPACE
    case 718:  // INVALID_PC
    case 719:  // LAUNCH_FAILED
    case 721:  // TENSOR_LEAK
    case 999:  // UNKNOWN
        return true;
    default:
        return false;
    }
}

/* What the driver last said to this thread, for messages. */
struct Failure {
    int code;
    const char *call;
};
inline thread_local Failure last_failure;

/* Grows in each child of a fork, where the driver cannot be used. */
inline std::atomic<unsigned> fork_epoch{0};
inline std::atomic<std::uint32_t> last_tag{0};

inline void handle_fork() {
    pthread_atfork(nullptr, nullptr, [] { fork_epoch.fetch_add(1, std::memory_order_relaxed); });
}

/* Blocks freed on a stream, in a list by `below`, and an event behind the last of them. */
struct Batch {
    std::uint32_t first = kNone;
    unsigned count = 0;
    void *event = nullptr;
};

struct StreamFrees {
    Batch open;  // without an event yet
    std::deque<Batch> closed;
};

/* Whole chunks of one free block. */
struct Run {
    std::uint32_t block;
    std::uint64_t address;
    std::uint64_t size;
    bool unmapped;
};

struct Segment {
    std::uint64_t allocated;  // what cuMemAlloc returned, to be freed
    std::uint64_t size;
    std::uint64_t address;  // aligned
};

}  // namespace speechrnt_gpu

struct sr_gpu_pool {
    sr_gpu_pool(const sr_gpu_options &wanted, const sr_gpu_driver &calls, unsigned shift)
        : options(wanted), driver(calls), index(shift) {}

    sr_gpu_options options;
    const sr_gpu_driver driver;
    void *context = nullptr;
    bool vmm = false;
    std::uint32_t tag = 0;
    unsigned epoch = 0;
    std::atomic<bool> closed{false};
    std::atomic<int> error{0};  // the code that poisoned the pool

    std::mutex mutex;
    speechrnt_gpu::Index index;
    std::unordered_map<void *, speechrnt_gpu::StreamFrees> streams;
    std::vector<void *> events;  // idle; has room for all that were made
    std::size_t n_events = 0;
    sr_gpu_statistics counts{};

    std::mutex growing;  // and what is read and written under it only:
    std::uint64_t base = 0;
    std::uint64_t range_size = 0;
    std::vector<std::uint64_t> physical;  // of each place for a chunk, or 0
    std::vector<std::uint64_t> orphans;   // neither mapped nor released: to be tried again
    std::vector<std::uint64_t> carried;   // on their way between two places
    std::vector<speechrnt_gpu::Run> runs;
    std::vector<speechrnt_gpu::Segment> segments;
};

namespace speechrnt_gpu {

using Lock = std::unique_lock<std::mutex>;

/* Turn a code of the driver into a status. */
inline int judge(sr_gpu_pool *pool, int code, const char *call) {
    if (code == kSuccess) {
        return SR_OK;
    }
    last_failure = {code, call};
    if (is_sticky(code)) {
        int none = 0;
        pool->error.compare_exchange_strong(none, code);
        return SR_POISONED;
    }
    if (code == kOutOfMemory) {
        return SR_NO_MEMORY;
    }
    return SR_DRIVER_ERROR;
}

#define SR_CALL(pool, function, ...) \
    speechrnt_gpu::judge(pool, (pool)->driver.function(__VA_ARGS__), #function)

inline bool forked(const sr_gpu_pool *pool) {
    return pool->epoch != fork_epoch.load(std::memory_order_relaxed);
}

/* Whether the pool can lend. */
inline int usable(const sr_gpu_pool *pool) {
    if (forked(pool)) {
        return SR_FORKED;
    }
    if (pool->error.load(std::memory_order_relaxed) != 0) {
        return SR_POISONED;
    }
    if (pool->closed.load(std::memory_order_relaxed)) {
        return SR_CLOSED;
    }
    return SR_OK;
}

/* While it lives, the pool's context is this thread's current one. */
class Current {
  public:
    explicit Current(sr_gpu_pool *pool)
        : pool_(pool), status_(SR_CALL(pool, push_context, pool->context)) {}
    ~Current() {
        if (status_ == SR_OK) {
            pool_->driver.pop_context();
        }
    }
    Current(const Current &) = delete;
    Current &operator=(const Current &) = delete;
    int status() const { return status_; }

  private:
    sr_gpu_pool *pool_;
    int status_;
};

inline std::uint64_t round_up(std::uint64_t size, std::uint64_t unit) {
    return (size + unit - 1) / unit * unit;
}

inline void count_reserved(sr_gpu_pool *pool, std::uint64_t more, std::uint64_t less) {
    sr_gpu_statistics &counts = pool->counts;
    counts.reserved_bytes += more - less;
    counts.peak_reserved_bytes = std::max(counts.peak_reserved_bytes, counts.reserved_bytes);
}

}  // namespace speechrnt_gpu
