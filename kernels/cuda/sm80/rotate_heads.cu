// Queries or keys, after RoPE, rotated by a Hadamard matrix, each head by itself.
//
// LANES     threads that share a head of 8 * LANES values          IN_FORMAT  0 float16, 1 bfloat16
#include "common/hadamard.cuh"
#include "common/types.cuh"

using Format = FormatOf<IN_FORMAT>::Type;
constexpr int kThreads = 128;

// x and out [heads, 8 * LANES], contiguous. heads >= 1.
extern "C" __global__ void __launch_bounds__(kThreads)
    qoq_rotate_heads_sm80(const uint16_t* __restrict__ x, uint16_t* __restrict__ out, int heads) {
    const int64_t head = int64_t(blockIdx.x) * (kThreads / LANES) + threadIdx.x / LANES;
    const bool exists = head < heads;  // if not, lanes repeat the first head: shuffles need the whole warp
    const int64_t place = ((exists ? head : 0) * LANES + threadIdx.x % LANES) * kVectorValues;
    const Values v = rotated_head<Format, LANES>(load_values(x + place));
    if (exists) store_values(out + place, v);
}
