// The grid of one head of one token, exactly as formats.arithmetic.quantize_kv defines it, and its codes. The values of
// a head lie with kLanes neighbouring lanes of a warp, eight each.
#pragma once
#include "common/extremes.cuh"
#include "common/pairs.cuh"
#include "common/types.cuh"

constexpr float kFloat16Max = 65504.0f;
constexpr uint16_t kFloat16One = 0x3C00, kFloat16Nan = 0x7E00;

// The smallest and the largest value of a head, in all its lanes; NaN if it has one. All lanes of the warp take part.
template <class Format, int kLanes>
DEVICE void range_of_head(const Values& v, float& low, float& high) {
    using Of = Extremes<Format>;
    uint32_t least = Of::least(Of::least(v.pairs[0], v.pairs[1]), Of::least(v.pairs[2], v.pairs[3]));
    uint32_t most = Of::most(Of::most(v.pairs[0], v.pairs[1]), Of::most(v.pairs[2], v.pairs[3]));
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
        least = Of::least(least, __shfl_xor_sync(kFullMask, least, lanes));
        most = Of::most(most, __shfl_xor_sync(kFullMask, most, lanes));
    }
    low = low_value<Format>(Of::least(least, least >> 16));
    high = low_value<Format>(Of::most(most, most >> 16));
}

template <int kBits>
struct HeadGrid {
    static constexpr float kLevels = (1 << kBits) - 1;

    uint16_t scale_bits, zero_bits;
    float scale, zero;
    float inverse;  // of the scale

    DEVICE HeadGrid(float low, float high) {
        const float range = __fsub_rn(high, low);
        scale_bits = Float16::bits(fminf(__fdiv_rn(range, kLevels), kFloat16Max));
        scale = Float16::value(scale_bits);
        const bool is_usable = scale > 0.0f && fabsf(low) <= __fmul_rn(kFloat16Max, scale);
        if (!is_usable) scale_bits = kFloat16One;
        const bool is_finite = range < kInfinity;  // false for NaN
        if (!is_finite) scale_bits = kFloat16Nan;
        scale = Float16::value(scale_bits);
        zero_bits = Float16::bits(fminf(fmaxf(__fdiv_rn(-low, scale), -kFloat16Max), kFloat16Max));
        if (!is_finite) zero_bits = kFloat16Nan;
        zero = Float16::value(zero_bits);
        inverse = __frcp_rn(scale);
    }

    // The code of x, plus kRounder. A quotient by way of the reciprocal is off by an ulp at times, which matters at a
    // tie; one step of correction by the exact remainder gives the quotient that a division rounds to
    // (tests/kernels/test_kv_cache.py goes through every pair of significands). Where that step could lose bits, for
    // |x| < 2^-100, the quotient is below 2^-76 and vanishes beside the zero or the rounding. A NaN gets code 0.
    DEVICE float rounded(float x) const {
        const float quotient = __fmul_rn(x, inverse);
        const float corrected = __fmaf_rn(__fmaf_rn(-quotient, scale, x), inverse, quotient);
        return __fadd_rn(fminf(fmaxf(__fadd_rn(corrected, zero), 0.0f), kLevels), kRounder);
    }

    static DEVICE uint32_t code(float rounded) { return __float_as_uint(rounded) & 0xFFu; }

    // What the code of a rounded value decodes to.
    DEVICE float decoded(float rounded) const {
        return __fmul_rn(__fsub_rn(__fsub_rn(rounded, kRounder), zero), scale);
    }
};

// Quantizes a lane's values of a head, and replaces them by what their codes decode to.
template <class Format, int kBits>
DEVICE void round_trip(const HeadGrid<kBits>& grid, Values& v, uint32_t (&codes)[kVectorValues]) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
        const float low = grid.rounded(low_value<Format>(v.pairs[i]));
        const float high = grid.rounded(high_value<Format>(v.pairs[i]));
        codes[2 * i] = grid.code(low);
        codes[2 * i + 1] = grid.code(high);
        v.pairs[i] = Format::pair(grid.decoded(low), grid.decoded(high));
    }
}
