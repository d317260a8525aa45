// Joins what blocks of decode_attention.cu computed of the same segment, a block a segment and query; see there.
//
// HEAD_DIM  threads of a block        FORMAT  of the output, 0 float16, 1 bfloat16
#include "common/math.cuh"
#include "common/types.cuh"
#include "sm80/decode_work.cuh"

using Format = FormatOf<FORMAT>::Type;

// Grid [blocks of decode_attention.cu, queries_of_pass]; `rows` is its QUERIES.
extern "C" __global__ void __launch_bounds__(HEAD_DIM)
    qoq_decode_combine_sm80(const float* __restrict__ partial_sums, const float2* __restrict__ partial_stats,
                            const int4* __restrict__ tails, uint16_t* __restrict__ output, int rows, int kv_heads,
                            int queries_of_kv, int passes, int queries_of_pass) {
    const int4 tail = tails[blockIdx.x];
    const int parts_after = tail.x, sequence = tail.y, group = tail.z, i = blockIdx.y;
    const HeadShape heads{kv_heads, queries_of_kv, passes, queries_of_pass};
    if (parts_after < 0 || i >= heads.queries(group)) return;
    // This block's part 1, then part 0 of those after it.
    const auto row_of = [&](int part) { return (2 * (blockIdx.x + part) + (part == 0 ? 1 : 0)) * rows + i; };

    float top = -kInfinity, sum = 0.0f, value = 0.0f;
    for (int part = threadIdx.x % kWarpSize; part <= parts_after; part += kWarpSize)
        top = fmaxf(top, partial_stats[row_of(part)].x);
#pragma unroll
    for (int lanes = 1; lanes < kWarpSize; lanes *= 2) top = fmaxf(top, __shfl_xor_sync(kFullMask, top, lanes));
#pragma unroll 4
    for (int part = 0; part <= parts_after; ++part) {
        const int row = row_of(part);
        const float2 stats = partial_stats[row];
        const float weight = power_of_2(stats.x - top);
        sum = fmaf(weight, stats.y, sum);
        value = fmaf(weight, partial_sums[row * HEAD_DIM + threadIdx.x], value);
    }
    const int64_t head = static_cast<int64_t>(sequence) * heads.heads() + heads.first_head(group) + i;
    output[head * HEAD_DIM + threadIdx.x] = Format::bits(value * __frcp_rn(sum));
}
