// out [M, N] = act_codes int8 [M, K] times weights [N, K] of 4 or 8 bits, where there are fewer tiles than SMs: a tile is
// the work of a cluster of blocks, and in them of warpgroups, that share its inputs.
//
// A block has GROUPS times 64 channels, all TOKENS, and of K every CLUSTER-th run. One warp copies stages of 128 inputs
// with the bulk copy engine, weights before the last kernel has ended; SPLITS teams of GROUPS warpgroups take stages in
// turns and multiply by wgmma, weights of 4 bits decoded in registers for the next stage while this one runs. At the end
// the teams' int32 sums are added in shared memory, each block sends what it does not store to the block that does, and
// what a block stores is a part of the tile's channels. Integers, so the order does not matter.
//
// WEIGHT_FORMAT  0 progressive, 1 per channel, 2 int8        OUT_FORMAT  0 float16, 1 bfloat16, 2 int32
// TOKENS         of a tile, up to 128                        GROUPS      of 64 channels: 1 or 2
// SPLITS         teams: 1, 2 or 4                            CLUSTER     blocks: 1, 2 or 4
// STAGES         of the copies, a multiple of SPLITS         BLOCKS_PER_SM  that registers must leave room for
#include "common/types.cuh"
#include "sm90/async.cuh"
#include "sm90/cluster.cuh"
#include "sm90/gemm_output.cuh"
#include "sm90/gemm_weights.cuh"
#include "sm90/wgmma.cuh"

constexpr int kFormat = WEIGHT_FORMAT;
constexpr int kBlock = kBlockBytes<kFormat>;
constexpr int kPairBytes = 2 * kBlock;    // blocks of weights lie in pairs, of 128 channels
constexpr int kWeightBytes = GROUPS * kBlock, kStageBytes = kWeightBytes + TOKENS * kBlockInputs;
constexpr int kTokenGroupBytes = 8 * kBlockInputs;
constexpr int kMultipliers = GROUPS * SPLITS * kGroupThreads, kThreads = kMultipliers + kWarpSize;
constexpr int kSums = TOKENS / 2, kChannels = GROUPS * kBlockChannels;
static_assert(STAGES % SPLITS == 0, "a stage belongs to one team");

// In shared memory after the stages were used: each team's sums, rows of channels spread over the banks; then what other
// blocks send of the channels that this one stores.
constexpr int kRowBytes = (kChannels + 4) * 4, kTeamBytes = TOKENS * kRowBytes;
constexpr int kOwnChannels = kChannels / CLUSTER, kQuads = kChannels / 4, kOwnQuads = kOwnChannels / 4;
constexpr int kReceivedAt = SPLITS * kTeamBytes, kReceivedBytes = TOKENS * kOwnChannels * 4;
[[maybe_unused]] constexpr int kTasks = (TOKENS * kQuads + kMultipliers - 1) / kMultipliers;
constexpr int kOwnTasks = (TOKENS * kOwnQuads + kMultipliers - 1) / kMultipliers;

// Copies all stages of this block's steps; one lane.
DEVICE void copy_all(uint32_t base, uint32_t full, uint32_t empty, const uint8_t* weights, const uint8_t* tokens,
                     int steps, int64_t token_stride, int token_bytes) {
    const auto copy_weights = [&](int i, int stage) {
        bulk_copy_once(base + stage * kStageBytes, weights + static_cast<int64_t>(i) * kPairBytes, kWeightBytes,
                       full + 8 * stage);
    };
    const auto copy_tokens = [&](int i, int stage) {
        bulk_copy(base + stage * kStageBytes + kWeightBytes, tokens + i * token_stride, token_bytes, full + 8 * stage);
    };
    const int ahead = min(steps, STAGES);
#pragma unroll 1
    for (int i = 0; i < ahead; ++i) {
        barrier_expect(full + 8 * i, kWeightBytes + token_bytes);
        copy_weights(i, i);
    }
    wait_for_last_kernel();
#pragma unroll 1
    for (int i = 0; i < ahead; ++i) copy_tokens(i, i);
    int stage = 0, parity = 0;
#pragma unroll 1
    for (int i = STAGES; i < steps; ++i) {
        barrier_wait(empty + 8 * stage, parity);
        barrier_expect(full + 8 * stage, kWeightBytes + token_bytes);
        copy_weights(i, stage);
        copy_tokens(i, stage);
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
}

DEVICE int4 load_sums(uint32_t at) {
    const uint4 v = load_shared_16(at);
    return make_int4(static_cast<int>(v.x), static_cast<int>(v.y), static_cast<int>(v.z), static_cast<int>(v.w));
}

DEVICE void add(int4& to, const int4& v) { to.x += v.x, to.y += v.y, to.z += v.z, to.w += v.w; }

#if CLUSTER > 1
#define TOGETHER __cluster_dims__(CLUSTER, 1, 1)
#else
#define TOGETHER
#endif

extern "C" __global__ void TOGETHER __launch_bounds__(kThreads, BLOCKS_PER_SM)
    qoq_gemm_split_sm90(const uint8_t* weight, const uint8_t* act_codes, const float* act_scales,
                        const int32_t* act_sums, const uint16_t* s1_scales, const uint16_t* s1_szeros,
                        const uint16_t* bias, void* out, int m, int n, int k) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ uint64_t barriers[2 * STAGES];
    allow_next_kernel();
    const uint32_t base = shared_address(shared), full = shared_address(barriers), empty = full + 8 * STAGES;
    const int rank = CLUSTER > 1 ? cluster_rank() : 0, tile = blockIdx.x / CLUSTER;
    const int first_channel = tile * kChannels, first_token = blockIdx.y * TOKENS;
    // Blocks of the cluster share K in equal runs.
    const int k_steps = k / kBlockInputs, first_step = k_steps * rank / CLUSTER;
    const int steps = k_steps * (rank + 1) / CLUSTER - first_step;
    // The same for all lanes, which the compiler cannot know.
    const int group = __shfl_sync(kFullMask, threadIdx.x / kGroupThreads, 0);
    if (threadIdx.x == kMultipliers) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, GROUPS * kGroupThreads / kWarpSize);
        }
        barriers_made();
    }
    __syncthreads();
    if (group == GROUPS * SPLITS) {
        if (threadIdx.x == kMultipliers) {
            const int token_groups = (m + 7) / 8, token_group = first_token / 8;
            const int64_t token_stride = static_cast<int64_t>(token_groups) * kTokenGroupBytes;
            const int block = tile * GROUPS;
            copy_all(base, full, empty,
                     weight + (static_cast<int64_t>(block / 2) * k_steps + first_step) * kPairBytes +
                         block % 2 * kBlock,
                     act_codes + first_step * token_stride + static_cast<int64_t>(token_group) * kTokenGroupBytes,
                     steps, token_stride, min(TOKENS / 8, token_groups - token_group) * kTokenGroupBytes);
        }
        __syncwarp();
#if CLUSTER > 1
        for (int i = 0; i < 2; ++i) meet_cluster();    // as the others
#endif
        return;
    }

    const int channel_group = group % GROUPS, team = group / GROUPS;
    const int thread = threadIdx.x % kGroupThreads, warp = thread / kWarpSize, lane = thread % kWarpSize;
    const uint32_t my_block = channel_group * kBlock;
    const uint32_t my_unit = my_block + (kFormat == kInt8 ? 0 : warp * kUnitBytes<kFormat>);
    int32_t sums[kSums];
    uint32_t even[16], odd[16];    // fragments of every other stage
    int stage = team, parity = 0;
    uint32_t last_empty = 0;

    const auto fetch = [&](uint32_t(&a)[16]) {
        barrier_wait(full + 8 * stage, parity);
        if (kFormat == kInt8) return;
        RawWeights raw;
        raw.load<kFormat>(base + stage * kStageBytes + my_unit, lane);
        decode<kFormat>(a, raw);
    };
    const auto multiply = [&](uint32_t(&a)[16], bool first) {
        if (kFormat != kInt8)
#pragma unroll
            for (int i = 0; i < 16; ++i) a[i] = kept(a[i]);    // none is decoded between the wgmma
        wgmma_begin();
        const uint32_t at = base + stage * kStageBytes;
        const uint64_t b = descriptor(at + kWeightBytes), w = descriptor(at + my_block);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int add = i > 0 || !first;
            if (kFormat == kInt8)
                wgmma_s8(sums, w + i * kDescriptorStep, b + i * kDescriptorStep, add);
            else
                wgmma_u8(sums, a + 4 * i, b + i * kDescriptorStep, add);
        }
        wgmma_commit();
    };
    // The team's stage before the last one multiplied is free for copies.
    const auto release = [&] {
        if (lane == 0) barrier_arrive(last_empty);
    };
    const auto advance = [&] {
        last_empty = empty + 8 * stage;
        stage += SPLITS;
        if (stage >= STAGES) stage = team, parity ^= 1;
    };

    // The team's steps; where K does not divide evenly the first teams have one more.
    const int my_steps = (steps - team + SPLITS - 1) / SPLITS;
    if (my_steps > 0) {
        fetch(even);
#pragma unroll 1
        for (int step = 0; step + 1 < my_steps; step += 2) {
            multiply(even, step == 0);
            if (step > 0) {
                wgmma_wait<1>();
                release();
            }
            advance();
            fetch(odd);
            multiply(odd, false);
            wgmma_wait<1>();
            release();
            advance();
            if (step + 2 < my_steps) fetch(even);
        }
        if (my_steps & 1) multiply(even, my_steps == 1);
        wgmma_wait<0>();
    } else {
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] = 0;
    }
    wait_for_last_kernel();

    // Until every stage of this block and, in a cluster, of the others has been used.
#if CLUSTER > 1
    meet_cluster();
#else
    meet(1, kMultipliers);
#endif
    {
        const uint32_t mine = base + team * kTeamBytes + 2 * (lane & 3) * kRowBytes +
                              (channel_group * kBlockChannels + 16 * warp + (lane >> 2)) * 4;
#pragma unroll
        for (int i = 0; i < kSums; ++i)
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(mine + ((i >> 2) * 8 + (i & 1)) * kRowBytes + (i >> 1 & 1) * 32),
                         "r"(sums[i]) : "memory");
    }
    meet(1, kMultipliers);
    [[maybe_unused]] const Output output{act_scales, act_sums, s1_scales, s1_szeros, bias, out, m, n};
    const int tokens = min(TOKENS, m - first_token);
    const auto total = [&](int token, int quad) {
        int4 all = load_sums(base + token * kRowBytes + quad * 16);
#pragma unroll
        for (int s = 1; s < SPLITS; ++s) add(all, load_sums(base + s * kTeamBytes + token * kRowBytes + quad * 16));
        return all;
    };
#if CLUSTER > 1
    // What others store goes to them: slot `away` - 1 of a block is for the one `away` ranks before it.
#pragma unroll 1
    for (int i = 0; i < kTasks; ++i) {
        const int task = threadIdx.x + i * kMultipliers, token = task / kQuads, quad = task % kQuads;
        const int owner = quad / kOwnQuads, away = (owner - rank + CLUSTER) % CLUSTER;
        if (token >= tokens || away == 0) continue;
        const uint32_t slot = base + kReceivedAt + (away - 1) * kReceivedBytes;
        store_in_block(address_in(owner, slot + (token * kOwnQuads + quad % kOwnQuads) * 16), total(token, quad));
    }
    meet_cluster();
#endif
#pragma unroll 1
    for (int i = 0; i < kOwnTasks; ++i) {
        const int task = threadIdx.x + i * kMultipliers, token = task / kOwnQuads, quad = task % kOwnQuads;
        const int channel = first_channel + rank * kOwnChannels + 4 * quad;
        if (token >= tokens || channel >= n) continue;
        int4 all = total(token, rank * kOwnQuads + quad);
#pragma unroll
        for (int c = 0; c < CLUSTER - 1; ++c)
            add(all, load_sums(base + kReceivedAt + c * kReceivedBytes + task * 16));
        const int64_t place = static_cast<int64_t>(first_token + token) * n + channel;
#if OUT_FORMAT == 2
        const int32_t correction = kFormat == kProgressive ? 128 * __ldcg(act_sums + first_token + token) : 0;
        *reinterpret_cast<int4*>(static_cast<int32_t*>(out) + place) =
            make_int4(all.x - correction, all.y - correction, all.z - correction, all.w - correction);
#else
        using Format = FormatOf<OUT_FORMAT>::Type;
        const TokenScale scale = load_token<kFormat>(output, first_token + token);
        ChannelScales<kFormat> first, second;
        first.template load<1>(output, channel);
        second.template load<1>(output, channel + 2);
        const bool has_bias = bias != nullptr;
        const uint2 words = make_uint2(Format::pair(scaled<kFormat, Format>(all.x, scale, first, 0, has_bias),
                                                    scaled<kFormat, Format>(all.y, scale, first, 1, has_bias)),
                                       Format::pair(scaled<kFormat, Format>(all.z, scale, second, 0, has_bias),
                                                    scaled<kFormat, Format>(all.w, scale, second, 1, has_bias)));
        *reinterpret_cast<uint2*>(static_cast<uint16_t*>(out) + place) = words;
#endif
    }
}
