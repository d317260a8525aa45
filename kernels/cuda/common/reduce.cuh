// The sum of a warp's numbers. All lanes receive it.
#pragma once
#include "common/types.cuh"

// At every step both lanes of a pair add the same two numbers, so all lanes end with the same bits.
DEVICE float warp_sum(float x) {
#pragma unroll
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) x = __fadd_rn(x, __shfl_xor_sync(kFullMask, x, lanes));
    return x;
}
