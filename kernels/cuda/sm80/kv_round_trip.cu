// Heads as the KV cache gives them back: quantized and decoded, each by itself.
//
// LANES     threads that share a head, eight values each          IN_FORMAT  0 float16, 1 bfloat16
// BITS      4, 8                                                  ROTATE     1: rotate heads first (keys), 0: do not
#include "common/hadamard.cuh"
#include "common/kv_quantize.cuh"
#include "common/types.cuh"

using Format = FormatOf<IN_FORMAT>::Type;
constexpr int kThreads = 128;

// x and out [heads, head_dim], contiguous; head_dim is a multiple of 8, at most 8 * LANES, and 8 * LANES where they are
// rotated. heads >= 1.
extern "C" __global__ void __launch_bounds__(kThreads)
    qoq_kv_round_trip_sm80(const uint16_t* __restrict__ x, uint16_t* __restrict__ out, int heads, int head_dim) {
    const int64_t head = int64_t(blockIdx.x) * (kThreads / LANES) + threadIdx.x / LANES;
    const int column = static_cast<int>(threadIdx.x % LANES) * kVectorValues;
    // Lanes without values of their own repeat others: that changes no extreme, and shuffles need the whole warp.
    const bool exists = head < heads && column < head_dim;
    const int64_t place = exists ? head * head_dim + column : head < heads ? head * head_dim : 0;
    Values v = load_values(x + place);
    if (ROTATE) v = rotated_head<Format, LANES>(v);
    float low, high;
    range_of_head<Format, LANES>(v, low, high);
    const HeadGrid<BITS> grid(low, high);
    uint32_t codes[kVectorValues];
    round_trip<Format>(grid, v, codes);
    if (exists) store_values(out + place, v);
}
