/* The arithmetic of one block of frames, for one instruction set.

   Included by _mel_kernel.h once per instruction set, inside a region that names it as the
   compilation target, with MEL_ISA (namespace), MEL_LANES (floats per vector) and MEL_F16C (whether
   half conversion is an instruction). Hence no include guard, and hence nothing from outside the
   region is called: a vector wider than the target of the function it appears in is split up before
   inlining. */

namespace speechrnt_mel {
namespace MEL_ISA {

constexpr int kLanes = MEL_LANES;

typedef float lanes __attribute__((vector_size(4 * MEL_LANES)));
typedef std::int32_t ints __attribute__((vector_size(4 * MEL_LANES)));
typedef std::int16_t shorts __attribute__((vector_size(2 * MEL_LANES)));
typedef float any_lanes __attribute__((vector_size(4 * MEL_LANES), aligned(1), may_alias));
typedef std::int16_t any_shorts __attribute__((vector_size(2 * MEL_LANES), aligned(1), may_alias));
typedef float quad __attribute__((vector_size(16)));
typedef float any_quad __attribute__((vector_size(16), aligned(1), may_alias));

struct Complex {
    lanes re, im;
};

MEL_INLINE lanes splat(float value) { return value - lanes{}; }

MEL_INLINE lanes load(const void *from) { return *static_cast<const any_lanes *>(from); }

#if defined(__clang__)
#define MEL_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef std::int32_t quad_mask __attribute__((vector_size(16)));
#define MEL_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, quad_mask{__VA_ARGS__})
#endif

/* hops[j * kHopRow + i] = sample j of hop i, so that sample n of consecutive windows is a run. */
MEL_INLINE void transpose_block(const char *samples, float *hops) {
    for (int hop = 0; hop < kHopRow; hop += 4) {
        const char *row[4];
        for (int r = 0; r < 4; ++r) {
            const int real_hop = hop + r < kBlockHops ? hop + r : kBlockHops - 1;
            row[r] = samples + real_hop * kHop * sizeof(float);
        }
        for (int j = 0; j < kHop; j += 4) {
            const quad a = *reinterpret_cast<const any_quad *>(row[0] + j * sizeof(float));
            const quad b = *reinterpret_cast<const any_quad *>(row[1] + j * sizeof(float));
            const quad c = *reinterpret_cast<const any_quad *>(row[2] + j * sizeof(float));
            const quad d = *reinterpret_cast<const any_quad *>(row[3] + j * sizeof(float));
            const quad ab_low = MEL_SHUFFLE(a, b, 0, 4, 1, 5);
            const quad ab_high = MEL_SHUFFLE(a, b, 2, 6, 3, 7);
            const quad cd_low = MEL_SHUFFLE(c, d, 0, 4, 1, 5);
            const quad cd_high = MEL_SHUFFLE(c, d, 2, 6, 3, 7);
            quad *to = reinterpret_cast<quad *>(hops + j * kHopRow + hop);
            to[0 * (kHopRow / 4)] = MEL_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5);
            to[1 * (kHopRow / 4)] = MEL_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
            to[2 * (kHopRow / 4)] = MEL_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5);
            to[3 * (kHopRow / 4)] = MEL_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
        }
    }
}

#undef MEL_SHUFFLE

/* All transforms below use exp(+2 pi i n k / N): the conjugate spectrum has the same power. */

constexpr float kCos1 = 0.923879533f;  // cos(pi / 8)
constexpr float kCos2 = 0.707106781f;  // cos(2 pi / 8)
constexpr float kCos3 = 0.382683432f;  // cos(3 pi / 8)

/* 16 windowed real samples to bins 0 and 8 (real) and 1 to 7: split into even and odd bins. */
MEL_INLINE void dft16(const float *hops, const int *taps, const float *window, lanes &bin0,
                      lanes &bin8, Complex *bins1to7, int step) {
    lanes even[8], odd[8];
    for (int n = 0; n < 8; ++n) {
        const lanes near = load(hops + taps[n]) * window[n];
        const lanes far = load(hops + taps[n + 8]);
        even[n] = near + far * window[n + 8];
        odd[n] = near - far * window[n + 8];
    }

    const lanes sum0 = even[0] + even[4], dif0 = even[0] - even[4];
    const lanes sum1 = even[1] + even[5], dif1 = even[1] - even[5];
    const lanes sum2 = even[2] + even[6], dif2 = even[2] - even[6];
    const lanes sum3 = even[3] + even[7], dif3 = even[3] - even[7];
    const lanes sum02 = sum0 + sum2, sum13 = sum1 + sum3;
    bin0 = sum02 + sum13;
    bin8 = sum02 - sum13;
    const lanes dif13 = dif1 - dif3, tot13 = dif1 + dif3;
    bins1to7[1 * step] = {dif0 + kCos2 * dif13, kCos2 * tot13 + dif2};
    bins1to7[3 * step] = {sum0 - sum2, sum1 - sum3};
    bins1to7[5 * step] = {dif0 - kCos2 * dif13, kCos2 * tot13 - dif2};

    const lanes re1 = odd[1] - odd[7], im1 = odd[1] + odd[7];
    const lanes re2 = odd[2] - odd[6], im2 = odd[2] + odd[6];
    const lanes re3 = odd[3] - odd[5], im3 = odd[3] + odd[5];
    const lanes re_outer = odd[0] + kCos2 * re2, re_inner = odd[0] - kCos2 * re2;
    const lanes im_outer = kCos2 * im2 + odd[4], im_inner = kCos2 * im2 - odd[4];
    const lanes re17 = kCos1 * re1 + kCos3 * re3, re35 = kCos3 * re1 - kCos1 * re3;
    const lanes im17 = kCos3 * im1 + kCos1 * im3, im35 = kCos1 * im1 - kCos3 * im3;
    bins1to7[0 * step] = {re_outer + re17, im17 + im_outer};
    bins1to7[2 * step] = {re_inner + re35, im35 + im_inner};
    bins1to7[4 * step] = {re_inner - re35, im35 - im_inner};
    bins1to7[6 * step] = {re_outer - re17, im17 - im_outer};
}

constexpr float kFifthCos1 = 0.309016994f;   // cos(2 pi / 5)
constexpr float kFifthCos2 = -0.809016994f;  // cos(4 pi / 5)
constexpr float kFifthSin1 = 0.951056516f;   // sin(2 pi / 5)
constexpr float kFifthRatio = 0.618033989f;  // sin(4 pi / 5) / sin(2 pi / 5)

/* Real 5-point transform: bins 0 (real), 1 and 2. */
MEL_INLINE void dft5(const lanes (&in)[5], lanes &bin0, Complex &bin1, Complex &bin2) {
    const lanes sum1 = in[1] + in[4], dif1 = in[1] - in[4];
    const lanes sum2 = in[2] + in[3], dif2 = in[2] - in[3];
    bin0 = in[0] + (sum1 + sum2);
    bin1 = {in[0] + kFifthCos1 * sum1 + kFifthCos2 * sum2,
            kFifthSin1 * (dif1 + kFifthRatio * dif2)};
    bin2 = {in[0] + kFifthCos2 * sum1 + kFifthCos1 * sum2,
            kFifthSin1 * (kFifthRatio * dif1 - dif2)};
}

MEL_INLINE void dft5(const Complex (&in)[5], Complex (&out)[5]) {
    const lanes sum1_re = in[1].re + in[4].re, sum1_im = in[1].im + in[4].im;
    const lanes dif1_re = in[1].re - in[4].re, dif1_im = in[1].im - in[4].im;
    const lanes sum2_re = in[2].re + in[3].re, sum2_im = in[2].im + in[3].im;
    const lanes dif2_re = in[2].re - in[3].re, dif2_im = in[2].im - in[3].im;
    out[0] = {in[0].re + (sum1_re + sum2_re), in[0].im + (sum1_im + sum2_im)};
    const lanes even1_re = in[0].re + kFifthCos1 * sum1_re + kFifthCos2 * sum2_re;
    const lanes even1_im = in[0].im + kFifthCos1 * sum1_im + kFifthCos2 * sum2_im;
    const lanes even2_re = in[0].re + kFifthCos2 * sum1_re + kFifthCos1 * sum2_re;
    const lanes even2_im = in[0].im + kFifthCos2 * sum1_im + kFifthCos1 * sum2_im;
    const lanes odd1_re = dif1_re + kFifthRatio * dif2_re;
    const lanes odd1_im = dif1_im + kFifthRatio * dif2_im;
    const lanes odd2_re = kFifthRatio * dif1_re - dif2_re;
    const lanes odd2_im = kFifthRatio * dif1_im - dif2_im;
    out[1] = {even1_re - kFifthSin1 * odd1_im, even1_im + kFifthSin1 * odd1_re};
    out[2] = {even2_re - kFifthSin1 * odd2_im, even2_im + kFifthSin1 * odd2_re};
    out[3] = {even2_re + kFifthSin1 * odd2_im, even2_im - kFifthSin1 * odd2_re};
    out[4] = {even1_re + kFifthSin1 * odd1_im, even1_im - kFifthSin1 * odd1_re};
}

MEL_INLINE Complex twiddle(const Complex &value, int r, int c) {
    const float re = tables.twiddle_re[r][c], im = tables.twiddle_im[r][c];
    return {value.re * re - value.im * im, value.re * im + value.im * re};
}

MEL_INLINE lanes power_of(const Complex &value) {
    return value.re * value.re + value.im * value.im;
}

/* 25-point transform of complex input, n2 = 5 r + c and k2 = p + 5 q; stores all 25 powers. */
MEL_INLINE void dft25(const Complex *in, int k1, lanes *power) {
    Complex partial[5][5];
    for (int c = 0; c < 5; ++c) {
        const Complex column[5] = {in[c], in[5 + c], in[10 + c], in[15 + c], in[20 + c]};
        Complex bins[5];
        dft5(column, bins);
        partial[0][c] = bins[0];
        for (int p = 1; p < 5; ++p) partial[p][c] = c == 0 ? bins[p] : twiddle(bins[p], p, c);
    }
    for (int p = 0; p < 5; ++p) {
        Complex bins[5];
        dft5(partial[p], bins);
        for (int q = 0; q < 5; ++q) power[bin_of(k1, p + 5 * q)] = power_of(bins[q]);
    }
}

/* 25-point transform of real input; bins p and 25 - p coincide, so 13 powers are stored. */
MEL_INLINE void dft25(const lanes *in, int k1, lanes *power) {
    lanes first[5];
    Complex partial[2][5];
    for (int c = 0; c < 5; ++c) {
        const lanes column[5] = {in[c], in[5 + c], in[10 + c], in[15 + c], in[20 + c]};
        Complex bin1, bin2;
        dft5(column, first[c], bin1, bin2);
        partial[0][c] = c == 0 ? bin1 : twiddle(bin1, 1, c);
        partial[1][c] = c == 0 ? bin2 : twiddle(bin2, 2, c);
    }
    lanes bin0;
    Complex bin5, bin10;
    dft5(first, bin0, bin5, bin10);
    power[bin_of(k1, 0)] = bin0 * bin0;
    power[bin_of(k1, 5)] = power_of(bin5);
    power[bin_of(k1, 10)] = power_of(bin10);
    for (int p = 1; p < 3; ++p) {
        Complex bins[5];
        dft5(partial[p - 1], bins);
        for (int q = 0; q < 5; ++q) power[bin_of(k1, p + 5 * q)] = power_of(bins[q]);
    }
}

/* Power spectra of kLanes windows, from the transposed block. */
MEL_INLINE void power_spectrum(const float *hops, lanes *power) {
    lanes bin0[25], bin8[25];
    Complex bins1to7[7][25];
    for (int n2 = 0; n2 < 25; ++n2) {
        dft16(hops, tables.taps[n2], tables.window[n2], bin0[n2], bin8[n2], &bins1to7[0][n2], 25);
    }
    dft25(bin0, 0, power);
    dft25(bin8, 8, power);
    for (int k1 = 1; k1 < 8; ++k1) dft25(bins1to7[k1 - 1], k1, power);
}

/* log10 of values in [1e-10, FLT_MAX], to 4 ulp and (up to 1e10) to 6e-7; NaN for inf and NaN.

   x = 2^e m with m in [sqrt(1/2), sqrt(2)), and log10(m) = f P(f), f = m - 1. P is the minimax
   polynomial of degree 7 for the relative error (Remez exchange in double), 1.7e-7. */
MEL_INLINE lanes log10_of(lanes x) {
    const ints bits = (ints)x;
    const ints exponent = (bits - 0x3f3504f3) >> 23;
    const ints mantissa_bits = bits - (exponent << 23);
    const lanes f = (lanes)mantissa_bits - 1.0f;
    lanes p = splat(-4.38936912e-02f);
    p = p * f + 7.04537705e-02f;
    p = p * f - 7.49194026e-02f;
    p = p * f + 8.64253193e-02f;
    p = p * f - 1.08442940e-01f;
    p = p * f + 1.44772321e-01f;
    p = p * f - 2.17148826e-01f;
    p = p * f + 4.34294462e-01f;
    // The high part of log10(2) has 11 bits, so its product with the exponent is exact.
    const lanes e = __builtin_convertvector(exponent, lanes);
    const lanes log = e * 0.301025391f + (e * 4.60503898e-06f + p * f);
    return x < INFINITY ? log : splat(NAN);
}

/* Round-to-nearest-even conversions between float and IEEE half. */
#if MEL_F16C
#if MEL_LANES == 16
// GCC warns (PR 105593) of an uninitialized value inside the forms that take no mask.
constexpr __mmask16 kAllLanes = 0xffff;
#endif

MEL_INLINE shorts to_half(lanes value) {
#if MEL_LANES == 16
    return (shorts)_mm512_maskz_cvtps_ph(kAllLanes, (__m512)value, _MM_FROUND_TO_NEAREST_INT);
#else
    return (shorts)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#endif
}

MEL_INLINE lanes from_half(shorts value) {
#if MEL_LANES == 16
    return (lanes)_mm512_maskz_cvtph_ps(kAllLanes, (__m256i)value);
#else
    return (lanes)_mm256_cvtph_ps((__m128i)value);
#endif
}
#else
MEL_INLINE shorts to_half(lanes value) {
    const ints bits = (ints)value;
    const ints magnitude_bits = bits & 0x7fffffff;
    const lanes magnitude = (lanes)magnitude_bits;
    // Adding 1/2 puts the half's subnormal unit, 2^-24, at the float's last place.
    const lanes aligned = magnitude + 0.5f;
    const ints subnormal = (ints)aligned - 0x3f000000;
    // Rebias the exponent (127 to 15) and round half to even at bit 13.
    const ints normal = (magnitude_bits - (112 << 23) + 0xfff + ((magnitude_bits >> 13) & 1)) >> 13;
    const ints special = magnitude_bits > 0x7f800000 ? ints{} + 0x7e00 : ints{} + 0x7c00;
    ints half = magnitude_bits < (113 << 23) ? subnormal : normal;
    half = magnitude_bits >= (143 << 23) ? special : half;
    return __builtin_convertvector(half | ((bits >> 16) & 0x8000), shorts);
}

MEL_INLINE lanes from_half(shorts value) {
    const ints bits = __builtin_convertvector(value, ints);
    const ints magnitude_bits = (bits & 0x7fff) << 13;
    // The product rebiases the exponent (15 to 127) and normalizes subnormals.
    const lanes rebiased = (lanes)magnitude_bits * 0x1p112f;
    const ints finite = (ints)rebiased;
    const ints special = magnitude_bits >= (31 << 23) ? ints{} + 0x7f800000 : ints{};
    const ints result = finite | special | (bits & INT32_MIN);
    return (lanes)result;
}
#endif

MEL_INLINE lanes load_row(const char *from, bool half) {
    return half ? from_half(*reinterpret_cast<const any_shorts *>(from)) : load(from);
}

MEL_INLINE void store_row(char *to, lanes value, bool half) {
    if (half) {
        *reinterpret_cast<any_shorts *>(to) = to_half(value);
    } else {
        *reinterpret_cast<any_lanes *>(to) = value;
    }
}

/* Stores the first `count` lanes. */
MEL_INLINE void store_row(char *to, lanes value, bool half, int count) {
    if (count >= kLanes) {
        store_row(to, value, half);
    } else {
        char whole[sizeof(lanes)];
        store_row(whole, value, half);
        std::memcpy(to, whole, count * (half ? 2 : 4));
    }
}

/* The first `count` of the row's elements, then zeros. */
MEL_INLINE lanes load_row(const char *from, bool half, int count) {
    if (count >= kLanes) return load_row(from, half);
    char whole[sizeof(lanes)] = {};
    std::memcpy(whole, from, count * (half ? 2 : 4));
    return load_row(whole, half);
}

MEL_INLINE float largest_of(lanes value, int count) {
    float largest = -INFINITY;
    for (int lane = 0; lane < kLanes && lane < count; ++lane) {
        largest = value[lane] > largest ? value[lane] : largest;
    }
    return largest;
}

/* Mel power, logarithm and store of kLanes frames, `count` of them wanted; returns the largest. */
MEL_INLINE float mel_rows(const lanes *power, int count, const MelBank &bank, Affine stored,
                          const Rows &out) {
    const float *weights = bank.weights;
    lanes largest = splat(-INFINITY);
    for (int channel = 0; channel < bank.channels; ++channel) {
        const lanes *bins = power + bank.first[channel];
        lanes energy = bins[0] * weights[0];
        for (int i = 1; i < bank.width[channel]; ++i) energy += bins[i] * weights[i];
        weights += bank.width[channel];
        const lanes log = log10_of(energy < 1e-10f ? splat(1e-10f) : energy);  // keeps NaN
        largest = log > largest ? log : largest;
        store_row(out.data + channel * out.stride, log * stored.scale + stored.offset, out.half,
                  count);
    }
    return largest_of(largest, count);
}

float block(const char *samples, int frames, const MelBank &bank, Affine stored, const Rows &out) {
    alignas(64) float hops[kHop * kHopRow];
    transpose_block(samples, hops);
    float maximum = -INFINITY;
    for (int frame = 0; frame < frames; frame += kLanes) {
        lanes power[kBins];
        power_spectrum(hops + frame, power);
        const Rows rows{out.data + frame * (out.half ? 2 : 4), out.stride, out.half};
        const float largest = mel_rows(power, frames - frame, bank, stored, rows);
        maximum = largest > maximum ? largest : maximum;
    }
    return maximum;
}

/* out = max(stored(in), floor), NaN kept. `in` and `out` may be the same rows. */
void normalize(const Rows &in, const Rows &out, int channels, std::ptrdiff_t frames, Affine stored,
               float floor) {
    const std::ptrdiff_t in_element = in.half ? 2 : 4, out_element = out.half ? 2 : 4;
    for (int channel = 0; channel < channels; ++channel) {
        const char *from = in.data + channel * in.stride;
        char *to = out.data + channel * out.stride;
        for (std::ptrdiff_t frame = 0; frame < frames; frame += kLanes) {
            const std::ptrdiff_t left = frames - frame;
            const int count = left < kLanes ? static_cast<int>(left) : kLanes;
            const lanes value =
                load_row(from + frame * in_element, in.half, count) * stored.scale + stored.offset;
            store_row(to + frame * out_element, value < floor ? splat(floor) : value, out.half,
                      count);
        }
    }
}

/* The largest element, -inf if there is none; NaN never is the largest. */
float maximum(const Rows &in, int channels, std::ptrdiff_t frames) {
    const std::ptrdiff_t element = in.half ? 2 : 4;
    float result = -INFINITY;
    for (int channel = 0; channel < channels; ++channel) {
        const char *from = in.data + channel * in.stride;
        for (std::ptrdiff_t frame = 0; frame < frames; frame += kLanes) {
            const std::ptrdiff_t left = frames - frame;
            const int count = left < kLanes ? static_cast<int>(left) : kLanes;
            const float largest =
                largest_of(load_row(from + frame * element, in.half, count), count);
            result = largest > result ? largest : result;
        }
    }
    return result;
}

}  // namespace MEL_ISA
}  // namespace speechrnt_mel
