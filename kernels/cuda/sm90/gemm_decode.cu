// out [M, N] = act_codes int8 [M, K] times weights [N, K] of 4 bits, for so few tokens that reading the weights is all
// the work, and the chain from the last kernel's end to this one's all that can be saved.
//
// A block has UNITS * 16 channels and TOKENS tokens. Its warps, and those of the other blocks of its cluster, take the
// groups of 128 inputs in turns: each has a ring of its own in shared memory, which it fills by bulk copies and reads
// without waiting for another warp, and multiplies all channels by mma.sync. Weights are on their way before the last
// kernel has ended; activations, each needed once, come from the L2 straight into the fragments. At the end the warps add
// their int32 sums, so the order does not matter.
//
// WEIGHT_FORMAT  0 progressive, 1 per channel       OUT_FORMAT  0 float16, 1 bfloat16, 2 int32
// TOKENS         of a tile: 8, 16, 24 or 32         UNITS       of 16 channels
// WARPS, STAGES  warps of a block, stages of each   CLUSTER     blocks that share K: 1 or 2
// BLOCKS_PER_SM  that registers must leave room for
#include "common/mma.cuh"
#include "common/types.cuh"
#include "sm90/async.cuh"
#include "sm90/cluster.cuh"
#include "sm90/gemm_output.cuh"
#include "sm90/gemm_weights.cuh"

constexpr int kFormat = WEIGHT_FORMAT;
constexpr int kUnit = kUnitBytes<kFormat>;
constexpr int kStageBytes = UNITS * kUnit, kRingBytes = STAGES * kStageBytes;
constexpr int kUnitsOfPair = 8;    // units of weights that lie together
constexpr int kThreads = WARPS * kWarpSize;
constexpr int kTokenGroups = TOKENS / 8, kChannels = UNITS * kUnitChannels;
constexpr int kTokenGroupBytes = 8 * kBlockInputs;
// Sums of a warp in shared memory, where its ring was: rows of channels, spread over the banks.
constexpr int kRowBytes = (kChannels + 4) * 4;
static_assert(TOKENS * kRowBytes <= kRingBytes, "the sums of a warp lie in its ring");
// A thread adds two neighbouring channels of a token, kPairs of them a token.
constexpr int kPairs = kChannels / 2, kTasks = (kPairs * TOKENS + kThreads - 1) / kThreads;
constexpr int kOwnPairs = kPairs / CLUSTER;    // that a block of a cluster stores

// The warp's steps of 128 inputs: the first, and every kStride-th from there.
constexpr int kStride = WARPS * CLUSTER;

struct Weights {
    const uint8_t* from;    // the first unit of the tile, at the first of the warp's steps
    int64_t step_stride, pair_stride;
    int first_unit, units;    // of a pair; of the tile that exist

    // Copy those of the `index`-th step into the ring.
    DEVICE void copy(uint32_t to, uint32_t barrier, int index, int lane) const {
        const uint8_t* step = from + index * step_stride;
        if (lane == 0) barrier_expect(barrier, units * kUnit);
        if (kUnitsOfPair % UNITS == 0) {
            if (lane == 0) bulk_copy_once(to, step, units * kUnit, barrier);
        } else if (lane < units) {
            const int unit = first_unit + lane;
            bulk_copy_once(to + lane * kUnit,
                           step + unit / kUnitsOfPair * pair_stride + unit % kUnitsOfPair * kUnit, kUnit, barrier);
        }
    }
};

// B operands of one step: register 2 s + c of a group of 8 tokens is for inputs 32 s + 16 c.
struct Fragments {
    uint32_t b[kTokenGroups][8];

    // `from`: of the lane in the first group. valid: bit j for the lane's token in group j.
    DEVICE void load(const uint8_t* from, uint32_t valid) {
#pragma unroll
        for (int j = 0; j < kTokenGroups; ++j)
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                b[j][i] = 0;
                if (valid >> j & 1)
                    b[j][i] = __ldcg(reinterpret_cast<const uint32_t*>(from + j * kTokenGroupBytes + i * 128));
            }
    }
};

#if CLUSTER > 1
#define TOGETHER __cluster_dims__(CLUSTER, 1, 1)
#else
#define TOGETHER
#endif

extern "C" __global__ void TOGETHER __launch_bounds__(kThreads, BLOCKS_PER_SM)
    qoq_gemm_decode_sm90(const uint8_t* weight, const uint8_t* act_codes, const float* act_scales,
                         const int32_t* act_sums, const uint16_t* s1_scales, const uint16_t* s1_szeros,
                         const uint16_t* bias, void* out, int m, int n, int k) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ uint64_t barriers[WARPS * STAGES];
    [[maybe_unused]] __shared__ int2 received[CLUSTER > 1 ? TOKENS * kOwnPairs : 1];
    allow_next_kernel();
    const int lane = threadIdx.x % kWarpSize, warp = __shfl_sync(kFullMask, threadIdx.x / kWarpSize, 0);
    const int g = lane >> 2, t = lane & 3, rank = CLUSTER > 1 ? cluster_rank() : 0;
    const int tile = blockIdx.x / CLUSTER, first_channel = tile * kChannels, first_token = blockIdx.y * TOKENS;
    const int first_step = rank * WARPS + warp, steps = (k / kBlockInputs - first_step + kStride - 1) / kStride;

    const uint32_t ring = shared_address(shared) + warp * kRingBytes;
    const uint32_t full = shared_address(barriers + warp * STAGES);
    if (lane == 0) {  // which will also expect bytes: racecheck cannot follow that to another lane
#pragma unroll
        for (int i = 0; i < STAGES; ++i) barrier_init(full + 8 * i, 1);
    }
    barriers_made();
    __syncwarp();
    Weights weights;
    {
        const int unit = tile * UNITS;
        weights.pair_stride = static_cast<int64_t>(k / kBlockInputs) * kUnitsOfPair * kUnit;
        weights.step_stride = kStride * kUnitsOfPair * kUnit;
        weights.units = min(UNITS, (n + 127) / 128 * kUnitsOfPair - unit);
        weights.first_unit = unit % kUnitsOfPair;
        weights.from = weight + unit / kUnitsOfPair * weights.pair_stride + first_step * (kUnitsOfPair * kUnit);
        if (kUnitsOfPair % UNITS == 0) weights.from += weights.first_unit * kUnit;
    }
#pragma unroll 1
    for (int i = 0; i < STAGES && i < steps; ++i) weights.copy(ring + i * kStageBytes, full + 8 * i, i, lane);
#if CLUSTER > 1
    cluster_arrive();    // the other block has started
#endif

    const Output output{act_scales, act_sums, s1_scales, s1_szeros, bias, out, m, n};
    ChannelScales<kFormat> channels[kTasks];
    [[maybe_unused]] TokenScale tokens[kTasks];
#pragma unroll
    for (int i = 0; OUT_FORMAT != 2 && i < kTasks; ++i)
        channels[i].template load<1>(output, first_channel + (threadIdx.x + i * kThreads) % kPairs * 2);

    const int token_groups = (m + 7) / 8;
    const uint8_t* codes = act_codes + lane * 4 +
                           (static_cast<int64_t>(first_step) * token_groups + first_token / 8) * kTokenGroupBytes;
    const int64_t codes_stride = static_cast<int64_t>(kStride) * token_groups * kTokenGroupBytes;
    uint32_t valid = 0;
#pragma unroll
    for (int j = 0; j < kTokenGroups; ++j) valid |= static_cast<uint32_t>(first_token + 8 * j + g < m) << j;

    wait_for_last_kernel();
    Fragments even, odd;
    if (steps > 0) even.load(codes, valid);
    if (steps > 1) odd.load(codes + codes_stride, valid);
#pragma unroll
    for (int i = 0; OUT_FORMAT != 2 && i < kTasks; ++i)
        tokens[i] = load_token<kFormat>(output, first_token + (threadIdx.x + i * kThreads) / kPairs);

    int32_t sums[UNITS][kTokenGroups][4] = {};
    int stage = 0, parity = 0;
    const auto multiply = [&](Fragments& fragments, int i) {
        RawWeights raw[UNITS];
        barrier_wait(full + 8 * stage, parity);
#pragma unroll
        for (int u = 0; u < UNITS; ++u) raw[u].template load<kFormat>(ring + stage * kStageBytes + u * kUnit, lane);
        if (i + STAGES < steps) {
            __syncwarp();
            weights.copy(ring + stage * kStageBytes, full + 8 * stage, i + STAGES, lane);
        }
        if (++stage == STAGES) stage = 0, parity ^= 1;
#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
            uint32_t a[16];
            decode<kFormat>(a, raw[u]);
#pragma unroll
            for (int s = 0; s < 4; ++s) {
                const uint32_t fragment[4] = {a[4 * s], a[4 * s + 1], a[4 * s + 2], a[4 * s + 3]};
#pragma unroll
                for (int j = 0; j < kTokenGroups; ++j)
                    mma_u8_s8(sums[u][j], fragment, fragments.b[j][2 * s], fragments.b[j][2 * s + 1]);
            }
        }
        if (i + 2 < steps) fragments.load(codes + (i + 2) * codes_stride, valid);
    };
#pragma unroll 1
    for (int i = 0; i < steps; i += 2) {
        multiply(even, i);
        if (i + 1 < steps) multiply(odd, i + 1);
    }

    __syncwarp();
#pragma unroll
    for (int u = 0; u < UNITS; ++u)
#pragma unroll
        for (int j = 0; j < kTokenGroups; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int token = 8 * j + 2 * t + (e & 1), channel = 16 * u + g + 8 * (e >> 1);
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(ring + token * kRowBytes + channel * 4),
                             "r"(sums[u][j][e]) : "memory");
            }
    __syncthreads();
    int2 totals[kTasks];
#if CLUSTER > 1
    cluster_wait();
#endif
#pragma unroll
    for (int i = 0; i < kTasks; ++i) {
        const int task = threadIdx.x + i * kThreads, token = task / kPairs, pair = task % kPairs;
        totals[i] = make_int2(0, 0);
        if (token >= TOKENS || first_token + token >= m) continue;
        const uint32_t at = shared_address(shared) + token * kRowBytes + pair * 8;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            int2 part;
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(part.x), "=r"(part.y) : "r"(at + w * kRingBytes));
            totals[i].x += part.x, totals[i].y += part.y;
        }
        if (CLUSTER > 1 && pair / kOwnPairs != rank)
            store_in_block(
                address_in(pair / kOwnPairs, shared_address(received + token * kOwnPairs + pair % kOwnPairs)),
                totals[i]);
    }
#if CLUSTER > 1
    meet_cluster();
#endif
#pragma unroll
    for (int i = 0; i < kTasks; ++i) {
        const int task = threadIdx.x + i * kThreads, token = task / kPairs, pair = task % kPairs;
        const int channel = first_channel + 2 * pair;
        if (token >= TOKENS || first_token + token >= m || channel >= n) continue;
        if (CLUSTER > 1) {
            if (pair / kOwnPairs != rank) continue;
            const int2 other = received[token * kOwnPairs + pair % kOwnPairs];
            totals[i].x += other.x, totals[i].y += other.y;
        }
        const int64_t place = static_cast<int64_t>(first_token + token) * n + channel;
#if OUT_FORMAT == 2
        const int32_t correction = kFormat == kProgressive ? 128 * __ldcg(act_sums + first_token + token) : 0;
        *reinterpret_cast<int2*>(static_cast<int32_t*>(out) + place) =
            make_int2(totals[i].x - correction, totals[i].y - correction);
#else
        using Format = FormatOf<OUT_FORMAT>::Type;
        const float y0 = scaled<kFormat, Format>(totals[i].x, tokens[i], channels[i], 0, bias != nullptr);
        const float y1 = scaled<kFormat, Format>(totals[i].y, tokens[i], channels[i], 1, bias != nullptr);
        *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(out) + place) = Format::pair(y0, y1);
#endif
    }
}
