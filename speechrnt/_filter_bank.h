/* A filter bank times a spectrum, every sum in ascending order of the bins and with one rounding per
   term. Included by _filter_bank.pyx only.

   A tile of frames is turned so that the frames of a bin lie side by side; then the compiler makes
   the innermost loops vectors, which leaves the order of each sum as it is. */

#pragma once

#include <cstddef>

#if defined(__x86_64__)
/* The baseline has no fused multiply-add. */
#define FILTER_BANK_TARGET __attribute__((target("avx2,fma")))
#else
#define FILTER_BANK_TARGET
#endif

namespace speechrnt_filters {

constexpr std::ptrdiff_t kTile = 16;
constexpr std::ptrdiff_t kMaxChannels = 128;
constexpr std::ptrdiff_t kMaxBins = 256;

inline bool has_fma() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(__aarch64__)
    return true;
#else
    return false;
#endif
}

/* The bins that a filter weighs: [first, past). */
struct Reach {
    std::ptrdiff_t first;
    std::ptrdiff_t past;
};

inline Reach reach_of(const float *weights, std::ptrdiff_t bins) {
    Reach reach{0, bins};
    while (reach.first < reach.past && weights[reach.first] == 0) ++reach.first;
    while (reach.first < reach.past && weights[reach.past - 1] == 0) --reach.past;
    return reach;
}

/* out[c][i] = sum over k of filters[c][k] * spectrum[i][k], for `frames` rows of the spectrum.
   All are contiguous; channels <= kMaxChannels, bins <= kMaxBins. */
FILTER_BANK_TARGET inline void apply(const float *filters, const float *spectrum, float *out,
                                     std::ptrdiff_t channels, std::ptrdiff_t bins,
                                     std::ptrdiff_t frames) {
    Reach reaches[kMaxChannels];
    for (std::ptrdiff_t c = 0; c < channels; ++c) reaches[c] = reach_of(filters + c * bins, bins);
    alignas(64) float tile[kMaxBins][kTile];
    for (std::ptrdiff_t start = 0; start < frames; start += kTile) {
        const std::ptrdiff_t count = frames - start < kTile ? frames - start : kTile;
        for (std::ptrdiff_t i = 0; i < kTile; ++i) {
            // Beyond the end, the last frame is computed again, and not kept.
            const float *row = spectrum + (start + (i < count ? i : count - 1)) * bins;
            for (std::ptrdiff_t k = 0; k < bins; ++k) tile[k][i] = row[k];
        }
        for (std::ptrdiff_t c = 0; c < channels; ++c) {
            const float *weights = filters + c * bins;
            float sums[kTile] = {};
            for (std::ptrdiff_t k = reaches[c].first; k < reaches[c].past; ++k) {
                for (std::ptrdiff_t i = 0; i < kTile; ++i) {
                    sums[i] = __builtin_fmaf(weights[k], tile[k][i], sums[i]);
                }
            }
            float *to = out + c * frames + start;
            for (std::ptrdiff_t i = 0; i < count; ++i) to[i] = sums[i];
        }
    }
}

}  // namespace speechrnt_filters
