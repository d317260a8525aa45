// out [M, N] = act_codes int8 [M, K] times weights [N, K] of 4 or 8 bits, summed in int32 over all of K by wgmma.
//
// A block has one warp that copies stages of 128 inputs with the bulk copy engine, and GROUPS warpgroups that multiply,
// each 64 channels by all tokens of the tile. Weights of 4 bits are decoded in registers, for the next stage while the
// wgmma of this one run; since the group scale is in the weight, sums stay in the tensor cores' int32 over all of K.
// Warpgroups do not wait for each other: while one stores a tile, the other has the tensor cores to itself, as far as
// the stages reach.
//
// Blocks take whole tiles in turns and share the rest (common/gemm_schedule.cuh). Sums of a shared tile are added in a
// workspace, and the last warpgroup to arrive stores the tile: integers, so the order does not matter.
//
// WEIGHT_FORMAT  0 progressive, 1 per channel, 2 int8       OUT_FORMAT  0 float16, 1 bfloat16, 2 int32
// TOKENS         of a tile, up to 256                       GROUPS      warpgroups: 64 channels of the tile each
// STAGES         of the copies                              BLOCKS_PER_SM  that registers must leave room for
#include "common/gemm_schedule.cuh"
#include "common/types.cuh"
#include "sm90/async.cuh"
#include "sm90/gemm_output.cuh"
#include "sm90/gemm_weights.cuh"
#include "sm90/wgmma.cuh"

constexpr int kFormat = WEIGHT_FORMAT;
constexpr int kBlock = kBlockBytes<kFormat>;
constexpr int kPairBytes = 2 * kBlock;    // blocks of weights lie in pairs, of 128 channels
constexpr int kWeightBytes = GROUPS * kBlock, kStageBytes = kWeightBytes + TOKENS * kBlockInputs;
constexpr int kTokenGroupBytes = 8 * kBlockInputs;
// With many sums in several warpgroups the copying side is one too, since only whole ones can give registers to others.
constexpr bool kMovesRegisters = TOKENS > 128 && GROUPS > 1;
constexpr int kMultipliers = GROUPS * kGroupThreads;
constexpr int kThreads = kMultipliers + (kMovesRegisters ? kGroupThreads : kWarpSize);
constexpr int kSums = TOKENS / 2;
constexpr int kTokenLoads = (TOKENS + kGroupThreads - 1) / kGroupThreads;
using Area = Staging<TOKENS>;
constexpr int kStagingAt = STAGES * kStageBytes;
constexpr int kBarriersAt = kStagingAt + (OUT_FORMAT == 2 ? 0 : GROUPS * Area::kBytes);

// The stages in order, round and round.
struct Ring {
    uint32_t base, barriers;
    int stage = 0, parity = 0;

    DEVICE Ring(uint32_t base) : base(base), barriers(base + kBarriersAt) {}
    DEVICE uint32_t address() const { return base + stage * kStageBytes; }
    DEVICE uint32_t full() const { return barriers + 8 * stage; }
    DEVICE uint32_t empty() const { return barriers + 8 * (STAGES + stage); }
    DEVICE void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// Walks the units of a block and says where their operands are.
struct Source {
    const Schedule& schedule;
    Cursor cursor;
    const uint8_t *weights, *tokens;    // of the next unit
    int channel_groups, token_bytes;
    int64_t pair_stride, token_stride;

    DEVICE Source(const Schedule& schedule, const uint8_t* weight, const uint8_t* act_codes, int m, int n)
        : schedule(schedule), cursor(schedule), weight_(weight), act_codes_(act_codes) {
        pair_stride = static_cast<int64_t>(schedule.k_steps) * kPairBytes;
        token_groups_ = (m + 7) / 8;
        pairs_ = (n + 127) / 128;
        token_stride = static_cast<int64_t>(token_groups_) * kTokenGroupBytes;
        enter();
    }

    DEVICE bool ended() const { return cursor.run == 0; }
    DEVICE int bytes() const { return channel_groups * kBlock + token_bytes; }

    DEVICE void next() {
        weights += kPairBytes, tokens += token_stride;
        if (--cursor.run == 0) {
            cursor.next_run(schedule);
            enter();
        }
    }

    // Weights of one unit; a tile of more than 128 channels reaches over pairs.
    DEVICE void copy_weights(uint32_t to, uint32_t barrier) const {
        constexpr int kPiece = GROUPS < 2 ? 1 : 2;
#pragma unroll
        for (int i = 0; i < GROUPS / kPiece; ++i) {
            if (kPiece * i >= channel_groups) continue;
            const uint32_t piece = to + i * kPiece * kBlock;
            if (schedule.tiles_m == 1)
                bulk_copy_once(piece, weights + i * pair_stride, kPiece * kBlock, barrier);
            else
                bulk_copy(piece, weights + i * pair_stride, kPiece * kBlock, barrier);
        }
    }

    DEVICE void copy_tokens(uint32_t to, uint32_t barrier) const {
        bulk_copy(to + kWeightBytes, tokens, token_bytes, barrier);
    }

  private:
    const uint8_t *weight_, *act_codes_;
    int token_groups_, pairs_;

    DEVICE void enter() {
        if (cursor.run == 0) return;
        int tile_n, tile_m;
        schedule.place(cursor.tile, tile_n, tile_m);
        const int block = tile_n * GROUPS, first_token = tile_m * (TOKENS / 8);
        channel_groups = min(GROUPS, 2 * pairs_ - block);
        token_bytes = min(TOKENS / 8, token_groups_ - first_token) * kTokenGroupBytes;
        weights = weight_ + (block / 2) * pair_stride + static_cast<int64_t>(cursor.step) * kPairBytes +
                  block % 2 * kBlock;
        tokens = act_codes_ + cursor.step * token_stride + static_cast<int64_t>(first_token) * kTokenGroupBytes;
    }
};

// One lane copies. Weights do not depend on the kernel before, activations do.
DEVICE void copy_all(Ring ring, const Schedule& schedule, const uint8_t* weight, const uint8_t* act_codes, int m,
                     int n) {
    Source source(schedule, weight, act_codes, m, n), ahead(source);
    Ring early = ring;
#pragma unroll 1
    for (int i = 0; i < STAGES && !ahead.ended(); ++i) {
        barrier_expect(early.full(), ahead.bytes());
        ahead.copy_weights(early.address(), early.full());
        early.next();
        ahead.next();
    }
    wait_for_last_kernel();
#pragma unroll 1
    for (int i = 0; i < STAGES && !source.ended(); ++i) {
        source.copy_tokens(ring.address(), ring.full());
        ring.next();
        source.next();
    }
#pragma unroll 1
    while (!source.ended()) {
        barrier_wait(ring.empty(), ring.parity ^ 1);
        barrier_expect(ring.full(), source.bytes());
        source.copy_weights(ring.address(), ring.full());
        source.copy_tokens(ring.address(), ring.full());
        ring.next();
        source.next();
    }
}

// Adds the sums of a shared tile. True for the last warpgroup to do so, which then holds the whole, and leaves workspace
// and counter zero for the next launch.
DEVICE bool add_over_blocks(int32_t (&sums)[kSums], int32_t* workspace, int32_t* counters, int slot, int steps,
                            int k_steps, int group) {
    __shared__ int arrived[GROUPS];
    const int thread = threadIdx.x % kGroupThreads;
    int32_t* mine = workspace + (static_cast<int64_t>(slot) * GROUPS + group) * (kSums * kGroupThreads) + thread;
    int32_t* counter = counters + slot * GROUPS + group;
#pragma unroll
    for (int i = 0; i < kSums; ++i)
        asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(mine + i * kGroupThreads), "r"(sums[i])
                     : "memory");
    __threadfence();
    meet(1 + group, kGroupThreads);
    if (thread == 0) {
        arrived[group] = atomicAdd(counter, steps) + steps;
        __threadfence();
    }
    meet(1 + group, kGroupThreads);
    if (arrived[group] != k_steps) return false;
    if (thread == 0) *counter = 0;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
        sums[i] = __ldcg(mine + i * kGroupThreads);
        __stcg(mine + i * kGroupThreads, 0);
    }
    return true;
}

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS_PER_SM)
    qoq_gemm_sm90(const uint8_t* weight, const uint8_t* act_codes, const float* act_scales, const int32_t* act_sums,
                  const uint16_t* s1_scales, const uint16_t* s1_szeros, const uint16_t* bias, void* out,
                  int32_t* workspace, int32_t* counters, int m, int n, int k, int whole, int units_each, int longer) {
    extern __shared__ __align__(128) uint8_t shared[];
    const Schedule schedule{k / kBlockInputs, (n + GROUPS * kBlockChannels - 1) / (GROUPS * kBlockChannels),
                            (m + TOKENS - 1) / TOKENS, whole, units_each, longer};
    Ring ring(shared_address(shared));
    allow_next_kernel();
    // The same for all lanes, which the compiler cannot know.
    const int group = __shfl_sync(kFullMask, threadIdx.x / kGroupThreads, 0);
    if (threadIdx.x == kMultipliers) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(ring.barriers + 8 * i, 1);
            barrier_init(ring.barriers + 8 * (STAGES + i), kMultipliers / kWarpSize);
        }
        barriers_made();
    }
    __syncthreads();
    if (group == GROUPS) {
        if (kMovesRegisters) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == kMultipliers) copy_all(ring, schedule, weight, act_codes, m, n);
        return;
    }
    if (kMovesRegisters) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");

    const Output output{act_scales, act_sums, s1_scales, s1_szeros, bias, out, m, n};
    const int thread = threadIdx.x % kGroupThreads, warp = thread / kWarpSize, lane = thread % kWarpSize;
    const uint32_t my_block = group * kBlock, my_unit = my_block + (kFormat == kInt8 ? 0 : warp * kUnitBytes<kFormat>);
    int32_t sums[kSums];
    uint32_t even[16], odd[16];    // fragments of every other stage
    uint32_t last_empty = 0;

    // Fragments of the stage that the ring is at, once it has come.
    const auto fetch = [&](uint32_t(&a)[16]) {
        barrier_wait(ring.full(), ring.parity);
        if (kFormat == kInt8) return;
        RawWeights raw;
        raw.load<kFormat>(ring.address() + my_unit, lane);
        decode<kFormat>(a, raw);
    };
    const auto multiply = [&](uint32_t(&a)[16], bool first) {
        if (kFormat != kInt8)
#pragma unroll
            for (int i = 0; i < 16; ++i) a[i] = kept(a[i]);    // none is decoded between the wgmma
        wgmma_begin();
        const uint64_t b = descriptor(ring.address() + kWeightBytes), w = descriptor(ring.address() + my_block);
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
    // The stage before the last one multiplied is free for copies.
    const auto release = [&] {
        if (lane == 0) barrier_arrive(last_empty);
    };
    const auto advance = [&] {
        last_empty = ring.empty();
        ring.next();
    };

    Cursor cursor(schedule);
    bool waited = false;
#pragma unroll 1
    while (cursor.run > 0) {
        const int steps = cursor.run;
        int tile_n, tile_m;
        schedule.place(cursor.tile, tile_n, tile_m);
        const int channel = (tile_n * GROUPS + group) * kBlockChannels, token = tile_m * TOKENS;

        fetch(even);
#pragma unroll 1
        for (int step = 0; step + 1 < steps; step += 2) {
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
            if (step + 2 < steps) fetch(even);
        }
        if (steps & 1) {
            multiply(even, steps == 1);
            if (steps > 1) {
                wgmma_wait<1>();
                release();
            }
            advance();
        }
        if (!waited) wait_for_last_kernel(), waited = true;
        // Asked for while the last products are computed.
        ChannelScales<kFormat> channels;
        [[maybe_unused]] TokenScale tokens[kTokenLoads];
        if (OUT_FORMAT != 2) {
            channels.load<8>(output, channel + 16 * warp + (lane >> 2));
#pragma unroll
            for (int i = 0; i < kTokenLoads; ++i)
                tokens[i] = load_token<kFormat>(output, token + thread % TOKENS + i * kGroupThreads);
        }
        wgmma_wait<0>();
        release();

        if (steps == schedule.k_steps || add_over_blocks(sums, workspace, counters, schedule.owner(cursor.tile), steps,
                                                         schedule.k_steps, group)) {
#if OUT_FORMAT == 2
            store_sums<kFormat, TOKENS>(sums, output, channel, token);
#else
            using Format = FormatOf<OUT_FORMAT>::Type;
            const uint32_t staging = ring.base + kStagingAt + group * Area::kBytes;
            if (bias)
                store_tile<kFormat, Format, TOKENS, true>(sums, output, channels, tokens, channel, token, staging,
                                                          1 + group);
            else
                store_tile<kFormat, Format, TOKENS, false>(sums, output, channels, tokens, channel, token, staging,
                                                           1 + group);
#endif
        }
        cursor.next_run(schedule);
    }
}
