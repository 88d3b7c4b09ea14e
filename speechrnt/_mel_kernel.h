/* Log-mel kernel: tables, stitching of the signal's edges, and the choice of instruction set.

   The arithmetic is in _mel_lanes.h, which this header includes once per instruction set. A SIMD
   lane is a frame: consecutive frames go through one transform side by side and nothing ever
   crosses lanes, so a frame's bits depend neither on its lane nor on its neighbours.

   The 400-point transform is a Good-Thomas prime-factor one, 400 = 16 x 25. With sample
   n = 25 n1 + 16 n2 (mod 400) the factors need no twiddles between them, and bin k is the pair
   (k mod 16, k mod 25). I. J. Good, "The interaction algorithm and practical Fourier analysis",
   J. Roy. Statist. Soc. B 20 (1958).

   Included by _mel.pyx only; other modules cimport _mel.pxd. */

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace speechrnt_mel {

constexpr int kFftSize = 400;
constexpr int kHop = 160;
constexpr int kReach = kFftSize / 2;  // frame i covers samples [kHop i - kReach, kHop i + kReach)
constexpr int kBins = kFftSize / 2 + 1;
constexpr int kMaxMels = 128;
constexpr double kSampleRate = 16000.0;

constexpr int kBlockFrames = 16;
constexpr int kBlockHops = kBlockFrames + 2;  // the last window ends inside the second next hop
constexpr int kBlockSamples = kBlockHops * kHop;
constexpr int kHopRow = 20;  // kBlockHops rounded up to whole 4 x 4 tiles

/* The samples the caller has: `head` holds those in [head_start, pcm_start), kept from earlier
   pushes, and `pcm` those in [pcm_start, pcm_end), at any alignment. Sample -j mirrors sample j;
   what lies after pcm_end is silence. head_start is 0 while a frame may reach before sample 0. */
struct Signal {
    const float *head;
    std::ptrdiff_t head_start;
    const char *pcm;
    std::ptrdiff_t pcm_start;
    std::ptrdiff_t pcm_end;
};

/* One row per mel channel, `stride` bytes apart, of float or IEEE half elements. */
struct Rows {
    char *data;
    std::ptrdiff_t stride;
    bool half;
};

/* Stored value = scale * log10(power) + offset. */
struct Affine {
    float scale;
    float offset;
};

/* Triangular filters: channel c weighs bins [first[c], first[c] + width[c]). */
struct MelBank {
    int channels;
    int first[kMaxMels];
    int width[kMaxMels];
    float weights[2 * kBins];  // a bin lies under two triangles at most
};

struct Tables {
    /* Row n2 serves the 16-point transform over n1: where sample n lies in the transposed block,
       and the window at n. */
    int taps[25][16];
    float window[25][16];
    float twiddle_re[5][5], twiddle_im[5][5];  // exp(2 pi i r c / 25)
    MelBank bank80, bank128;
};

inline Tables tables;

/* The bin that holds |X[k]| for k = k1 mod 16 = k2 mod 25; the input is real, so |X[400 - k]| too. */
constexpr int bin_of(int k1, int k2) {
    // 225 is 1 mod 16 and 0 mod 25; 176 is 0 mod 16 and 1 mod 25.
    const int k = (225 * k1 + 176 * k2) % kFftSize;
    return k < kBins ? k : kFftSize - k;
}

/* Slaney's mel scale: linear to 1 kHz, logarithmic above (M. Slaney, "Auditory Toolbox", 1998). */
inline double mel_to_hz(double mel) {
    const double hz_per_mel = 200.0 / 3;
    const double linear_mels = 1000.0 / hz_per_mel;
    if (mel < linear_mels) return hz_per_mel * mel;
    return 1000.0 * std::exp(std::log(6.4) / 27.0 * (mel - linear_mels));
}

inline void fill_bank(MelBank &bank, int channels) {
    const double max_mel = 45.245640471924965;  // 8 kHz
    double hz[kMaxMels + 2];
    for (int i = 0; i < channels + 2; ++i) hz[i] = mel_to_hz(max_mel * i / (channels + 1));
    bank.channels = channels;
    float *weights = bank.weights;
    for (int c = 0; c < channels; ++c) {
        const double area_norm = 2.0 / (hz[c + 2] - hz[c]);
        bank.width[c] = 0;
        for (int bin = 0; bin < kBins; ++bin) {
            const double bin_hz = bin * kSampleRate / kFftSize;
            const double rise = (bin_hz - hz[c]) / (hz[c + 1] - hz[c]);
            const double fall = (hz[c + 2] - bin_hz) / (hz[c + 2] - hz[c + 1]);
            const double weight = rise < fall ? rise : fall;
            if (weight <= 0.0) continue;
            if (bank.width[c] == 0) bank.first[c] = bin;
            bank.width[c] += 1;
            *weights++ = static_cast<float>(weight * area_norm);
        }
    }
}

inline void fill_tables() {
    const double turn = 2.0 * std::acos(-1.0);
    for (int n2 = 0; n2 < 25; ++n2) {
        for (int n1 = 0; n1 < 16; ++n1) {
            const int n = (25 * n1 + 16 * n2) % kFftSize;
            tables.taps[n2][n1] = n % kHop * kHopRow + n / kHop;
            tables.window[n2][n1] =
                static_cast<float>(0.5 - 0.5 * std::cos(turn * n / kFftSize));  // periodic Hann
        }
    }
    for (int r = 0; r < 5; ++r) {
        for (int c = 0; c < 5; ++c) {
            tables.twiddle_re[r][c] = static_cast<float>(std::cos(turn * r * c / 25));
            tables.twiddle_im[r][c] = static_cast<float>(std::sin(turn * r * c / 25));
        }
    }
    fill_bank(tables.bank80, 80);
    fill_bank(tables.bank128, 128);
}

}  // namespace speechrnt_mel

#define MEL_INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__)

#define MEL_ISA sse2
#define MEL_LANES 4
#define MEL_F16C 0
#include "_mel_lanes.h"
#undef MEL_ISA
#undef MEL_LANES
#undef MEL_F16C

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define MEL_ISA avx2
#define MEL_LANES 8
#define MEL_F16C 1
#include "_mel_lanes.h"
#undef MEL_ISA
#undef MEL_LANES
#undef MEL_F16C
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif
#define MEL_ISA avx512
#define MEL_LANES 16
#define MEL_F16C 1
#include "_mel_lanes.h"
#undef MEL_ISA
#undef MEL_LANES
#undef MEL_F16C
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

#if defined(__aarch64__)
#define MEL_ISA neon
#else
#define MEL_ISA generic
#endif
#define MEL_LANES 4
#define MEL_F16C 0
#include "_mel_lanes.h"

#endif

namespace speechrnt_mel {

struct Isa {
    const char *name;
    bool available;
    float (*block)(const char *samples, int frames, const MelBank &bank, Affine stored,
                   const Rows &out);
    void (*normalize)(const Rows &in, const Rows &out, int channels, std::ptrdiff_t frames,
                      Affine stored, float floor);
    float (*maximum)(const Rows &in, int channels, std::ptrdiff_t frames);
};

#define MEL_ISA_ENTRY(name, available) \
    Isa { #name, available, name::block, name::normalize, name::maximum }

/* Instruction sets of this build, best first; `available` says whether this CPU runs them. F16C is
   not asked for: older compilers cannot, and every CPU with AVX2 has it. */
inline const Isa isas[] = {
#if defined(__x86_64__)
    MEL_ISA_ENTRY(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512dq") &&
                              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")),
    MEL_ISA_ENTRY(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")),
    MEL_ISA_ENTRY(sse2, true),
#elif defined(__aarch64__)
    MEL_ISA_ENTRY(neon, true),
#else
    MEL_ISA_ENTRY(generic, true),
#endif
};

constexpr int kIsas = sizeof(isas) / sizeof(isas[0]);

#undef MEL_ISA_ENTRY

/* Copies samples [start, start + kBlockSamples) of the mirrored and zero-padded signal. */
inline void copy_block(const Signal &signal, std::ptrdiff_t start, float *block) {
    std::memset(block, 0, kBlockSamples * sizeof(float));
    const std::ptrdiff_t stop = start + kBlockSamples;
    for (std::ptrdiff_t i = start; i < 0; ++i) {
        const std::ptrdiff_t mirrored = -i;
        // Frame 0 is final without sample kReach, which would meet the window's zero anyway.
        if (mirrored >= kReach || mirrored >= signal.pcm_end) continue;
        if (mirrored < signal.pcm_start) {
            block[i - start] = signal.head[mirrored - signal.head_start];
        } else {
            std::memcpy(block + (i - start),
                        signal.pcm + (mirrored - signal.pcm_start) * sizeof(float), sizeof(float));
        }
    }
    const std::ptrdiff_t head_from = start > signal.head_start ? start : signal.head_start;
    const std::ptrdiff_t head_to = stop < signal.pcm_start ? stop : signal.pcm_start;
    if (head_from < head_to) {
        std::memcpy(block + (head_from - start), signal.head + (head_from - signal.head_start),
                    (head_to - head_from) * sizeof(float));
    }
    const std::ptrdiff_t pcm_from = start > signal.pcm_start ? start : signal.pcm_start;
    const std::ptrdiff_t pcm_to = stop < signal.pcm_end ? stop : signal.pcm_end;
    if (pcm_from < pcm_to) {
        std::memcpy(block + (pcm_from - start),
                    signal.pcm + (pcm_from - signal.pcm_start) * sizeof(float),
                    (pcm_to - pcm_from) * sizeof(float));
    }
}

/* Writes frames [first, first + count) to columns [0, count) of `out`; returns the largest
   log10(power) among them, -inf if there is none. NaN never is the largest. */
inline float compute(const Isa &isa, const Signal &signal, std::ptrdiff_t first,
                     std::ptrdiff_t count, const MelBank &bank, Affine stored, const Rows &out) {
    const std::ptrdiff_t element = out.half ? 2 : 4;
    float maximum = -INFINITY;
    alignas(64) float stitched[kBlockSamples];
    for (std::ptrdiff_t done = 0; done < count; done += kBlockFrames) {
        const std::ptrdiff_t left = count - done;
        const int frames = left < kBlockFrames ? static_cast<int>(left) : kBlockFrames;
        const std::ptrdiff_t start = (first + done) * kHop - kReach;
        const char *samples = reinterpret_cast<const char *>(stitched);
        if (start >= signal.pcm_start && start + kBlockSamples <= signal.pcm_end) {
            samples = signal.pcm + (start - signal.pcm_start) * sizeof(float);
        } else {
            copy_block(signal, start, stitched);
        }
        const Rows block{out.data + done * element, out.stride, out.half};
        const float block_maximum = isa.block(samples, frames, bank, stored, block);
        maximum = block_maximum > maximum ? block_maximum : maximum;
    }
    return maximum;
}

}  // namespace speechrnt_mel

#undef MEL_INLINE
