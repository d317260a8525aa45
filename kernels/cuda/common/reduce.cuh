// Reductions over the threads that share a row: one warp, or (kWholeBlock) every warp of the block. All threads receive
// the result. The order is fixed by the number of warps alone, so floating point gives the same bits in every run.
#pragma once
#include "common/types.cuh"

constexpr int kMaxWarps = 32;

// A result of each warp, one buffer a reduction: with buffers of their own, consecutive reductions need no barrier
// between reading one and writing the next. Warps that do not exist count as `neutral`.
template <class T>
DEVICE T gather_warps(T of_warp, T neutral, T (&partials)[kMaxWarps]) {
    const int lane = threadIdx.x % kWarpSize;
    if (lane == 0) partials[threadIdx.x / kWarpSize] = of_warp;
    __syncthreads();
    return lane < static_cast<int>(blockDim.x) / kWarpSize ? partials[lane] : neutral;
}

template <bool kWholeBlock>
DEVICE uint32_t reduce_max(uint32_t x, uint32_t (&partials)[kMaxWarps]) {
    x = __reduce_max_sync(kFullMask, x);
    if (!kWholeBlock) return x;
    return __reduce_max_sync(kFullMask, gather_warps(x, 0u, partials));
}

template <bool kWholeBlock>
DEVICE int32_t reduce_sum(int32_t x, int32_t (&partials)[kMaxWarps]) {
    x = __reduce_add_sync(kFullMask, x);
    if (!kWholeBlock) return x;
    return __reduce_add_sync(kFullMask, gather_warps(x, 0, partials));
}

// At every step both lanes of a pair add the same two numbers, so all lanes end with the same bits.
DEVICE float warp_sum(float x) {
#pragma unroll
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) x = __fadd_rn(x, __shfl_xor_sync(kFullMask, x, lanes));
    return x;
}

template <bool kWholeBlock>
DEVICE float reduce_sum(float x, float (&partials)[kMaxWarps]) {
    x = warp_sum(x);
    if (!kWholeBlock) return x;
    return warp_sum(gather_warps(x, 0.0f, partials));
}
