/* What the pools share: handles, status codes and the demand that sets how much stays idle.

   Included by _pools.pyx and _audio_pool.pyx only; other modules cimport their .pxd. */

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "_pool_types.h"

namespace speechrnt_pools {

/* A handle is generation << 32 | pool tag << kIndexBits | slot index. The generation of a slot is
   odd while it is leased and grows by one with each acquire and each release, so that a handle is
   good once, 0 never is one, and one that was kept is found out until the slot has been leased
   2^31 times more. The tag tells the handles of one pool from those of another. */
constexpr unsigned kIndexBits = 20;
constexpr std::uint32_t kMaxSlots = 1u << kIndexBits;
constexpr std::uint32_t kMaxTags = 1u << (32 - kIndexBits);

inline std::uint64_t make_handle(std::uint32_t generation, std::uint32_t tag, std::uint32_t index) {
    return std::uint64_t{generation} << 32 | tag << kIndexBits | index;
}
inline std::uint32_t handle_generation(std::uint64_t handle) {
    return static_cast<std::uint32_t>(handle >> 32);
}
inline std::uint32_t handle_tag(std::uint64_t handle) {
    return static_cast<std::uint32_t>(handle) >> kIndexBits;
}
inline std::uint32_t handle_index(std::uint64_t handle) {
    return static_cast<std::uint32_t>(handle) & (kMaxSlots - 1);
}

/* The largest number in use during each of the last ten epochs, and during the current one. */
class Demand {
  public:
    void observe(std::uint32_t in_use) { peak_ = std::max(peak_, in_use); }

    void close_epoch(std::uint32_t in_use) {
        recent_[next_] = peak_;
        next_ = (next_ + 1) % kEpochs;
        peak_ = in_use;
    }

    /* What to keep: the recent peak and a quarter more, which absorbs an ordinary burst. */
    std::uint32_t wanted() const {
        const std::uint32_t peak = std::max(peak_, *std::max_element(recent_, recent_ + kEpochs));
        return peak + (peak + 3) / 4;
    }

  private:
    static constexpr int kEpochs = 10;
    std::uint32_t peak_ = 0;
    std::uint32_t recent_[kEpochs] = {};
    int next_ = 0;
};

}  // namespace speechrnt_pools
