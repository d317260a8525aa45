// Heads times the Hadamard matrix over the square root of its order, exactly as formats.arithmetic.rotate_heads defines
// it. The values of a head lie with kLanes neighbouring lanes of a warp, eight each.
#pragma once
#include "common/pairs.cuh"
#include "common/types.cuh"

// Values 1, 2 and 4 apart are a lane's own, those 8, 16, ... apart another lane's. All lanes of the warp take part.
template <class Format, int kLanes>
DEVICE Values rotated_head(const Values& v) {
    static_assert(kLanes == 8 || kLanes == 16 || kLanes == 32, "a head has 64, 128 or 256 values");
    constexpr float kScale = kLanes == 8 ? 0.125f : kLanes == 16 ? 0.08838834764831845f : 0.0625f;
    float x[kVectorValues];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
        x[2 * i] = low_value<Format>(v.pairs[i]);
        x[2 * i + 1] = high_value<Format>(v.pairs[i]);
    }
#pragma unroll
    for (int step = 1; step < kVectorValues; step *= 2)
#pragma unroll
        for (int i = 0; i < kVectorValues; ++i)
            if ((i & step) == 0) {
                const float first = x[i], second = x[i + step];
                x[i] = __fadd_rn(first, second);
                x[i + step] = __fsub_rn(first, second);
            }
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) {
        // The lane with the second value takes it from the first.
        const uint32_t sign = (threadIdx.x & lanes) != 0 ? 0x80000000u : 0u;
#pragma unroll
        for (int i = 0; i < kVectorValues; ++i) {
            const uint32_t mine = __float_as_uint(x[i]);
            x[i] = __fadd_rn(__uint_as_float(__shfl_xor_sync(kFullMask, mine, lanes)), __uint_as_float(mine ^ sign));
        }
    }
    Values result;
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
        result.pairs[i] = Format::pair(__fmul_rn(x[2 * i], kScale), __fmul_rn(x[2 * i + 1], kScale));
    return result;
}
