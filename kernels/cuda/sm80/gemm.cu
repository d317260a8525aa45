// out [M, N] = act_codes int8 [M, K] times weights [N, K] of 4 or 8 bits, summed in int32 over all of K.
//
// Weights are the A operand and tokens the columns of mma.m16n8k32, so that a warp decodes each weight once for all its
// tokens and a lane reads its packed words in one 16-byte access. A block copies stages of inputs with cp.async and
// works through the units that its schedule gives it; copies run ahead over tile borders, and fragments one mma ahead
// over stages. Where a tile is shared, blocks add int32 sums in a workspace, and the last to arrive stores the tile:
// integers, so the order does not matter.
//
// WEIGHT_FORMAT  0 progressive, 1 per channel, 2 int8       OUT_FORMAT  0 float16, 1 bfloat16, 2 int32
// BLOCK_N, BLOCK_M  channels and tokens of a tile           GROUPS  of 128 inputs in a stage
// WARPS_N, WARPS_M, WARPS_K  how warps share a stage        STAGES  of the copy pipeline
// BLOCKS_PER_SM  that registers must leave room for
#include "common/async_copy.cuh"
#include "common/global_memory.cuh"
#include "common/mma.cuh"
#include "common/types.cuh"
#include "sm80/gemm_epilogue.cuh"
#include "sm80/gemm_loader.cuh"
#include "common/gemm_schedule.cuh"
#include "sm80/gemm_weights.cuh"

constexpr int kThreads = WARPS_N * WARPS_M * WARPS_K * kWarpSize;
constexpr int kWarpN = BLOCK_N / WARPS_N, kWarpM = BLOCK_M / WARPS_M;
constexpr int kStripes = kWarpN / kStripe, kTokenTiles = kWarpM / 8;
constexpr int kWarpTiles = GROUPS * kTilesPerGroup / WARPS_K;    // of 32 inputs, in a stage
static_assert(kWarpN % kStripe == 0 && kWarpM % 16 == 0, "a warp works on pieces of 32 channels by 16 tokens");
static_assert(kWarpTiles >= 1 && kWarpTiles * WARPS_K == GROUPS * kTilesPerGroup, "warps share a stage evenly");

using StageLoader = Loader<WEIGHT_FORMAT, BLOCK_N, BLOCK_M, GROUPS, kThreads>;
using WarpWeights = Weights<WEIGHT_FORMAT, kStripes, GROUPS, BLOCK_N>;
constexpr int kPairs = kTokenTiles / 2;                          // of 8 tokens
constexpr int kAccumulators = 2 * kStripes * kTokenTiles * 4;
constexpr int kCopyParts = kWarpTiles > 1 ? kWarpTiles - 1 : 1;

using Sums = int32_t[2 * kStripes][kTokenTiles][4];

// Where a lane's row of the B fragments of 16 tokens is in a stage, for the first 32 inputs. Lanes 8 i .. address the
// rows of matrix i: tokens 0-7 and 8-15, inputs 0-15 and 16-31 of each.
DEVICE int token_offset(int token, int lane) {
    return StageLoader::kActsAt + swizzled(token + (lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
}

// at: shared address of the stage plus token_offset of the warp's first token; pair: 16 tokens each. Addresses of rows
// are multiples of 128, so that the swizzle of another column is an exclusive or.
DEVICE void load_tokens(uint32_t (&words)[4], uint32_t at, int pair, int tile) {
    at ^= tile % kTilesPerGroup * 32;
    load_matrices_4(words, at + tile / kTilesPerGroup * (BLOCK_M * 128) + pair * (16 * 128));
}

// Add the sums of the warps that share K. Warps with warp_k = 0 hold the whole afterwards.
DEVICE void add_over_warps(Sums& acc, int32_t* partial, int warp_k) {
    int32_t* flat = &acc[0][0][0];
    constexpr int kPart = kThreads / WARPS_K;
    int32_t* mine = partial + threadIdx.x % kPart;
    if (warp_k == 0)
#pragma unroll
        for (int i = 0; i < kAccumulators; ++i) mine[i * kPart] = flat[i];
    __syncthreads();
    if (warp_k > 0)
#pragma unroll
        for (int i = 0; i < kAccumulators; ++i) atomicAdd_block(mine + i * kPart, flat[i]);
    __syncthreads();
    if (warp_k == 0)
#pragma unroll
        for (int i = 0; i < kAccumulators; ++i) flat[i] = mine[i * kPart];
}

// The sums of a tile that blocks share. All but the last block to finish add theirs in the workspace and return false;
// the last waits until they have, takes them to its own, and leaves workspace and counters zero for the next launch.
// What it waits for is under way: the others have arrived here before it.
DEVICE bool add_over_blocks(Sums& acc, int32_t* workspace, int32_t* counters, int slot, int steps, int k_steps,
                            bool holds_sums) {
    __shared__ int arrived;
    constexpr int kPart = kThreads / WARPS_K;
    int32_t* sums = workspace + static_cast<int64_t>(slot) * kAccumulators * kPart + threadIdx.x % kPart;
    int32_t *arrivals = counters + 2 * slot, *additions = arrivals + 1;
    int32_t* flat = &acc[0][0][0];
    if (threadIdx.x == 0) arrived = atomicAdd(arrivals, steps) + steps;
    __syncthreads();
    if (arrived != k_steps) {
        if (holds_sums) {
#pragma unroll
            for (int i = 0; i < kAccumulators; ++i) add_relaxed(sums + i * kPart, flat[i]);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();    // of what all threads added: they did so before the barrier
            atomicAdd(additions, steps);
        }
        return false;
    }
    if (threadIdx.x == 0) {
        while (load_acquire(additions) != k_steps - steps) {
        }
        *arrivals = 0;
        *additions = 0;
    }
    __syncthreads();
    if (holds_sums) {
#pragma unroll
        for (int i = 0; i < kAccumulators; ++i) {
            flat[i] += __ldcg(sums + i * kPart);
            __stcg(sums + i * kPart, 0);
        }
    }
    return true;
}

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS_PER_SM)
    qoq_gemm_sm80(const uint8_t* weight, const int8_t* act_codes, const uint8_t* s2_scales, const uint8_t* s2_zeros,
                  const float* act_scales, const int32_t* act_sums, const uint16_t* s1_scales,
                  const uint16_t* s1_szeros, const uint16_t* bias, void* out, int32_t* workspace, int32_t* counters,
                  int m, int n, int k, int whole, int units_each, int longer) {
    extern __shared__ __align__(128) uint8_t shared[];
    const Operands operands{weight, act_codes, s2_scales, s2_zeros, m, n, k};
    const Output output{act_scales, act_sums, s1_scales, s1_szeros, bias, out, m, n};
    const Schedule schedule{(k + GROUPS * kGroup - 1) / (GROUPS * kGroup), (n + BLOCK_N - 1) / BLOCK_N,
                            (m + BLOCK_M - 1) / BLOCK_M, whole, units_each, longer};
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int warp_n = warp % WARPS_N * kWarpN, warp_m = warp / WARPS_N % WARPS_M * kWarpM;
    const int warp_k = WARPS_K == 1 ? 0 : warp / (WARPS_N * WARPS_M), first_tile = warp_k * kWarpTiles;
    const uint32_t stages = shared_address(shared);
    int32_t* partial = reinterpret_cast<int32_t*>(shared + STAGES * StageLoader::kStageBytes);

    StageLoader loader(operands, schedule);
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; ++i) {
        loader.copy(stages + i * StageLoader::kStageBytes, 0, 1);
        loader.finish();
        loader.leave(1, schedule);
    }

    Sums acc = {};
    uint32_t tokens[kPairs][4];
    RawTile<WEIGHT_FORMAT> raw[kStripes];
    WarpWeights weights;
    const auto load_scales = [&](uint32_t stage, int tile) {
        const uint32_t scales = stage + StageLoader::kScalesAt + tile / kTilesPerGroup * BLOCK_N + warp_n;
        weights.load_scales(scales, scales + StageLoader::kScaleBytes, lane);
    };
    // Computed once: the compiler would do it again for every stage.
    const uint32_t tokens_at = kept(token_offset(warp_m, lane));
    const uint32_t weights_at = kept(WarpWeights::lane_offset(warp_n, lane));
    const auto load_raw = [&](int s, uint32_t stage, int tile) {
        constexpr int kNextStripe = WEIGHT_FORMAT == kInt8 ? kStripe * 128 : kStripe * WarpWeights::kBytesPerChannel;
        WarpWeights::load(raw[s], stage + weights_at + s * kNextStripe, tile);
    };
    // The A fragments of channels 0-15 and 16-31 of the stripe that is multiplied now.
    uint32_t low[4], high[4];
    const auto load_first = [&](uint32_t stage) {
        load_scales(stage, first_tile);
#pragma unroll
        for (int p = 0; p < kPairs; ++p) load_tokens(tokens[p], stage + tokens_at, p, first_tile);
#pragma unroll
        for (int s = 0; s < kStripes; ++s) load_raw(s, stage, first_tile);
        weights.begin_group();
#pragma unroll
        for (int w = 0; w < 4; ++w) weights.decode(raw[0], 0, w, low[w], high[w]);
    };
    wait_for_copies<STAGES - 2>();
    __syncthreads();
    load_first(stages);

    int reading = 0;
    const auto multiply_stage = [&] {
        uint32_t stage = stages + reading * StageLoader::kStageBytes;
        const uint32_t free_stage = kept(stages + (reading == 0 ? STAGES - 1 : reading - 1) * StageLoader::kStageBytes);
#pragma unroll
        for (int i = 0; i < kWarpTiles; ++i) {
            const bool last = i == kWarpTiles - 1;
            if (kWarpTiles == 1) loader.copy(free_stage, 0, 1);
            if (last) {
                loader.finish();
                wait_for_copies<STAGES - 2>();
                __syncthreads();    // the next stage has come for all, and all are done with this one
                reading = reading == STAGES - 1 ? 0 : reading + 1;
                stage = stages + reading * StageLoader::kStageBytes;
            }
            const int next = last ? first_tile : first_tile + i + 1;
            const bool new_group = last || next % kTilesPerGroup == 0;
            if (kWarpTiles > 1 && !last) loader.copy(free_stage, i, kCopyParts);
            // While a stripe is multiplied, the next one is decoded, a register after every few mma, and what was
            // decoded before is loaded anew.
#pragma unroll
            for (int s = 0; s < kStripes; ++s) {
                const bool last_stripe = s == kStripes - 1;
                const int next_stripe = last_stripe ? 0 : s + 1;
                uint32_t next_low[4], next_high[4];
                if (new_group && last_stripe) load_scales(stage, next);
                load_raw(s, stage, next);
#pragma unroll
                for (int p = 0; p < kPairs; ++p) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const uint32_t b0 = tokens[p][2 * half], b1 = tokens[p][2 * half + 1];
                        WarpWeights::multiply(acc[2 * s][2 * p + half], low, b0, b1);
                    }
#pragma unroll
                    for (int half = 1; half >= 0; --half) {
                        const uint32_t b0 = tokens[p][2 * half], b1 = tokens[p][2 * half + 1];
                        WarpWeights::multiply(acc[2 * s + 1][2 * p + half], high, b0, b1);
                    }
                    if (p == kPairs / 5 && new_group && last_stripe) weights.begin_group();
#pragma unroll
                    for (int w = 0; w < 4; ++w)
                        if (p == (w + 1) * kPairs / 5)
                            weights.decode(raw[next_stripe], next_stripe, w, next_low[w], next_high[w]);
                    if (last_stripe) load_tokens(tokens[p], stage + tokens_at, p, next);
                }
#pragma unroll
                for (int w = 0; w < 4; ++w) low[w] = next_low[w], high[w] = next_high[w];
            }
        }
    };

    Cursor cursor(schedule);
    int steps = cursor.run;
    while (steps > 0) {
        // Until copies or sums come to another tile: a loop without a branch, over which nothing is scheduled.
        const int units = min(cursor.run, loader.run());
#pragma unroll 1
        for (int i = 0; i < units; ++i) multiply_stage();
        loader.leave(units, schedule);
        cursor.run -= units;
        if (cursor.run == 0) {
            if (WARPS_K > 1) add_over_warps(acc, partial, warp_k);
            if (steps == schedule.k_steps || add_over_blocks(acc, workspace, counters, schedule.owner(cursor.tile),
                                                             steps, schedule.k_steps, warp_k == 0)) {
                int tile_n, tile_m;
                schedule.place(cursor.tile, tile_n, tile_m);
                const int channel = tile_n * BLOCK_N + warp_n, token = tile_m * BLOCK_M + warp_m;
                if (warp_k == 0) {
#if OUT_FORMAT == 2
                    store_sums<WEIGHT_FORMAT, kStripes, kTokenTiles>(acc, output, channel, token, lane);
#else
                    using Format = FormatOf<OUT_FORMAT>::Type;
                    constexpr int kFormat = WEIGHT_FORMAT;
                    if (bias)
                        store_tile<kFormat, Format, true, kStripes, kTokenTiles>(acc, output, channel, token, lane);
                    else
                        store_tile<kFormat, Format, false, kStripes, kTokenTiles>(acc, output, channel, token, lane);
#endif
                }
            }
            int32_t* flat = &acc[0][0][0];
#pragma unroll
            for (int i = 0; i < kAccumulators; ++i) flat[i] = 0;
            cursor.next_run(schedule);
            steps = cursor.run;
            // Again, rather than kept: the stores above need the registers.
            load_first(stages + reading * StageLoader::kStageBytes);
        }
    }
    wait_for_copies<0>();
}
