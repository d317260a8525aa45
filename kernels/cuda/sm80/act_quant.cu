// int8 codes, scale and sum of codes of each token: codes = round(x / scale), scale = amax / 127 in float32, exactly as
// formats.arithmetic.quantize_activation defines it. A NaN or an infinity makes the scale NaN or infinite, all codes 0.
//
// A row is read once and stays in registers, as 16-bit pairs, from the search for its amax to the store of its codes.
// What is quantized is x itself or made from it, each step rounded to x's format as transformers' modules round it:
//   silu_mul       silu(gate) * up; `x` holds gate in columns 0 .. k - 1, up in k .. 2 k - 1
//   rms_norm       weight * round(x / sqrt(mean(x^2) + eps)), a true RMSNorm: the mean is not subtracted
//   add_rms_norm   the same of round(x + residual), which is stored too
//
// OPERATION     0 x, 1 silu_mul, 2 rms_norm, 3 add_rms_norm          IN_FORMAT     0 float16, 1 bfloat16
// VECTORS       of 8 values that a thread holds                      TILED         1: codes as Hopper's products read them
// WARP_ROWS     1: a row a warp, 0: a row a block, or SPLIT          STORE_VALUES  1: also store what is quantized
// SPLIT         blocks of a cluster that share a row                               (for tests)
// TURNS         rows that a block does one after the other, of which it then writes tiles: 1, 2, 4 or 8
#include "common/async_copy.cuh"
#include "common/dependent_launch.cuh"
#include "common/extremes.cuh"
#include "common/math.cuh"
#include "common/packed.cuh"
#include "common/pairs.cuh"
#include "common/reduce.cuh"
#include "common/shared_memory.cuh"
#include "common/types.cuh"
#if SPLIT > 1
#include "sm90/async.cuh"
#include "sm90/cluster.cuh"
#define CLUSTER __cluster_dims__(SPLIT, 1, 1)
#else
#define CLUSTER
#endif

using Format = FormatOf<IN_FORMAT>::Type;
using Pair = Packed<Format>;
constexpr int kSiluMul = 1, kRmsNorm = 2, kAddRmsNorm = 3;
constexpr bool kNormalizes = OPERATION == kRmsNorm || OPERATION == kAddRmsNorm;
constexpr bool kTwoInputs = OPERATION == kSiluMul || OPERATION == kAddRmsNorm;
constexpr int kBatch = VECTORS < 4 ? VECTORS : 4;  // vectors asked for before the first is waited for
constexpr int kMaxThreads = WARP_ROWS ? 128 : VECTORS > 4 ? 832 : kNormalizes && VECTORS > 2 ? 512 : 1024;

#if VECTORS == 4
#define BOUNDS __launch_bounds__(kMaxThreads, 1)  // else the assembler aims at two blocks and spills
#else
#define BOUNDS __launch_bounds__(kMaxThreads)
#endif

constexpr float kLog2E = 1.44269504f;
// bfloat16 has scales whose reciprocals, or the rest of those, float32 does not hold: they are lifted, exactly.
constexpr float kSmallestScale = 0x1p-100f, kLargestScale = 0x1p80f, kUp = 0x1p100f, kDown = 0x1p-60f;

// g / (1 + exp(-g)), within 2^-20 of its size for |g| < 4 and 2^-17 for any g. Where 1 + exp(-g) passes 2^126, for g
// below -87.3, the result becomes -0; it is above -2^-119 there.
DEVICE float silu(float g) {
    return __fmul_rn(g, reciprocal(__fadd_rn(1.0f, power_of_2(__fmul_rn(g, -kLog2E)))));
}

DEVICE uint32_t silu(uint32_t pair) {
    return Format::pair(silu(low_value<Format>(pair)), silu(high_value<Format>(pair)));
}

DEVICE uint32_t scaled(uint32_t pair, float factor) {
    return Format::pair(__fmul_rn(low_value<Format>(pair), factor), __fmul_rn(high_value<Format>(pair), factor));
}

// Low bytes of four words as one.
DEVICE uint32_t pack_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// As a division rounds; shorter where nothing is lost to float32's smallest number.
DEVICE float divided_by_127(float x) {
    if (IN_FORMAT == 1 && x < kSmallestScale) return __fdiv_rn(x, 127.0f);
    constexpr float kInverse = 1.0f / 127.0f;
    const float quotient = __fmul_rn(x, kInverse);
    return x < kInfinity ? __fmaf_rn(__fmaf_rn(-quotient, 127.0f, x), kInverse, quotient) : x;
}

struct Scale {
    float value;
    float lift;           // x and the scale are multiplied by it before they are divided
    float inverse, rest;  // their sum is 1 / (value * lift), to some 46 places
    uint32_t mask;        // of codes: none where the scale is infinite or NaN

    // `amax`: bits of the largest magnitude.
    DEVICE explicit Scale(uint16_t amax) {
        value = divided_by_127(Format::value(amax));
        if (value == 0.0f) value = 1.0f;
        lift = 1.0f;
        if (IN_FORMAT == 1) lift = value < kSmallestScale ? kUp : value > kLargestScale ? kDown : 1.0f;
        const float lifted = __fmul_rn(value, lift);
        inverse = reciprocal(lifted);
        rest = __fmul_rn(__fmaf_rn(-inverse, lifted, 1.0f), inverse);
        mask = value < kInfinity ? 0xFFFFFFFFu : 0u;
    }

    // The code of x * lift, in the low byte. By way of the rounded reciprocal alone a quotient is off by an ulp at
    // times, which matters at a tie; with the rest of the reciprocal it is what a division rounds to
    // (tests/kernels/test_act_quant.py goes through every x and scale). |x| <= amax, so codes stay within -127 .. 127.
    DEVICE uint32_t code(float x) const {
        return __float_as_uint(__fadd_rn(__fmaf_rn(x, inverse, __fmul_rn(x, rest)), kRounder));
    }

    DEVICE uint32_t four_codes(uint32_t first, uint32_t second) const {
        return mask & pack_bytes(code(low_value<Format>(first)), code(high_value<Format>(first)),
                                 code(low_value<Format>(second)), code(high_value<Format>(second)));
    }
};

// Codes of TURNS rows on their way to tiles, of which 16 bytes of a row are next to those of the next row: a piece of
// 16 * TURNS bytes for every 16 columns. (Of many rows, writing 16 bytes at a time, less than a sector, took 2.4 times
// as long; of some hundreds, having more blocks counts for more.)
constexpr bool kStages = TURNS > 1;

// Where in it; neighbouring pieces begin with different rows, so that the lanes of a warp meet different banks.
DEVICE int staged_place(int piece, int turn) { return piece * TURNS + ((turn ^ (piece * TURNS / 8)) & (TURNS - 1)); }

// Rows first .. first + TURNS - 1 as far as there are any, all columns. `first` is a multiple of TURNS.
DEVICE void write_tiles(const uint4* staged, int8_t* codes, int64_t first, int rows, int k_pad) {
    const int64_t tile_row = static_cast<int64_t>((rows + 7) / 8) * 1024;
    codes += first / 8 * 1024 + first % 8 * 16;
    for (int i = threadIdx.x; i < k_pad / 16 * TURNS; i += blockDim.x) {
        const int piece = i / TURNS, turn = i % TURNS;
        if (first + turn < rows)
            *reinterpret_cast<uint4*>(codes + piece / 8 * tile_row + piece % 8 * 128 + turn * 16) =
                staged[staged_place(piece, turn)];
    }
}

// Where the codes from `column` on of a row go: in order, or in the tiles of kernels/tiles.py.
DEVICE int64_t code_offset(int64_t row, int column, int rows, int k_pad) {
    if (!TILED) return row * k_pad + column;
    const int64_t tile = (column / 128) * static_cast<int64_t>((rows + 7) / 8) + row / 8;
    return tile * 1024 + column % 128 / 16 * 128 + row % 8 * 16 + column % 16;
}

// The warps of a row tell each other a word for each of kSlots. Of a row that one warp has nothing is told.
constexpr int kSlots = 64, kBoards = 3;

struct __align__(16) BoardMemory {
    uint32_t words[kSlots];
    uint64_t barrier;  // of this block, with SPLIT: whether all words came
};

class Board {
    uint32_t words_, barrier_;

public:
    // Addresses are made once: making one takes a while on Hopper.
    DEVICE explicit Board(const BoardMemory* memory)
        : words_(kept(shared_address(memory))), barrier_(words_ + 4 * kSlots) {}

    // By one thread, before the blocks of a cluster meet. `words`: those of the row.
    DEVICE void open(int words) const {
#if SPLIT > 1
        barrier_init(barrier_, 1);
        barrier_expect(barrier_, 4 * words);
#endif
    }

    // `word` is the same in all lanes of the warp.
    DEVICE void post(int slot, uint32_t word) const {
        const int lane = threadIdx.x % kWarpSize;
#if SPLIT > 1
        if (lane < SPLIT) send(address_in(lane, words_ + 4 * slot), address_in(lane, barrier_), word);
#else
        if (lane == 0) clear(slot, word);
#endif
    }

    // In this block alone.
    DEVICE void clear(int slot, uint32_t word) const { store_shared(words_ + 4 * slot, word); }

    DEVICE void wait() const {
#if SPLIT > 1
        barrier_wait(barrier_, 0);
#else
        __syncthreads();
#endif
    }

    // The n-th after this one in memory.
    DEVICE Board next(int n) const {
        Board board = *this;
        board.words_ += n * static_cast<int>(sizeof(BoardMemory));
        board.barrier_ += n * static_cast<int>(sizeof(BoardMemory));
        return board;
    }

    DEVICE uint32_t word(int slot) const { return load_shared(words_ + 4 * slot); }
    DEVICE float4 numbers(int slot) const { return load_shared_4(words_ + 4 * slot); }
};

// Partial sums of 256 columns each, in slots 0 .. slots - 1 with zeros up to the next multiple of 16. All threads add in
// the same order, in which zeros change nothing.
DEVICE float total(const Board& board, int slots) {
    float4 sums = {};
#pragma unroll 1
    for (int i = 0; i < slots; i += 16) {
        const float4 a = board.numbers(i), b = board.numbers(i + 4), c = board.numbers(i + 8), d = board.numbers(i + 12);
        sums.x = __fadd_rn(sums.x, __fadd_rn(__fadd_rn(a.x, b.x), __fadd_rn(c.x, d.x)));
        sums.y = __fadd_rn(sums.y, __fadd_rn(__fadd_rn(a.y, b.y), __fadd_rn(c.y, d.y)));
        sums.z = __fadd_rn(sums.z, __fadd_rn(__fadd_rn(a.z, b.z), __fadd_rn(c.z, d.z)));
        sums.w = __fadd_rn(sums.w, __fadd_rn(__fadd_rn(a.w, b.w), __fadd_rn(c.w, d.w)));
    }
    return __fadd_rn(__fadd_rn(sums.x, sums.y), __fadd_rn(sums.z, sums.w));
}

// x [rows, k], strides in values; `residual` [rows, k] and `weight` [k] where OPERATION has them; codes [rows, k_pad]:
// columns from k on become 0. All rows begin at multiples of 16 bytes, k is a multiple of 8, k_pad of 128, and the
// threads of a row hold at least k_pad values.
extern "C" __global__ void BOUNDS CLUSTER
    qoq_act_quant_sm80(const uint16_t* x, const uint16_t* residual, const uint16_t* weight, int8_t* __restrict__ codes,
                       float* __restrict__ scales, int32_t* __restrict__ sums, uint16_t* __restrict__ residual_out,
                       uint16_t* __restrict__ values_out, int rows, int k, int k_pad, int x_stride,
                       int residual_stride, float eps) {
    // With a row a block or more: boards, then codes on their way to tiles.
    extern __shared__ __align__(128) uint8_t shared[];
    BoardMemory* const boards = reinterpret_cast<BoardMemory*>(shared);
    uint4* const staged = reinterpret_cast<uint4*>(shared + kBoards * sizeof(BoardMemory));

    allow_next_kernel();
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
#if SPLIT > 1
    const int rank = cluster_rank();
#else
    const int rank = 0;
#endif
    // A row's warp i of n has vectors 32 i + lane, 32 (n + i) + lane, ...
    const int warps_of_row = WARP_ROWS ? 1 : SPLIT * warps;
    const int warp_of_row = WARP_ROWS ? 0 : rank * warps + warp;
    const int64_t first_row = WARP_ROWS ? static_cast<int64_t>(blockIdx.x) * warps + warp : static_cast<int64_t>(blockIdx.x / SPLIT) * TURNS;
    const int column = (warp_of_row * kWarpSize + lane) * kVectorValues;
    const int step = warps_of_row * kWarpSize * kVectorValues;
    const auto column_of = [&](int i) { return column + i * step; };

    // All that can be made before the wait.
    x = kept(x + first_row * x_stride + column);
    residual = kept(OPERATION == kSiluMul ? x + k : residual + first_row * residual_stride + column);
    weight = kept(weight + column);
    residual_out = kept(residual_out + first_row * k + column);
    if (!kStages) codes = kept(codes + code_offset(first_row, column, rows, k_pad));
    const int64_t codes_step = TILED ? static_cast<int64_t>(step / 128) * ((rows + 7) / 8) * 1024 : step;
    const float inverse_k = __uint_as_float(kept(__float_as_uint(__frcp_rn(static_cast<float>(k)))));
    const Board squares_board(boards), amax_boards(boards + 1);  // one for squares, two for extremes
    if (kNormalizes && first_row == 0) {
#pragma unroll
        for (int i = 0; i < VECTORS; ++i)
            if (column_of(i) < k) prefetch(weight + i * step);
    }
    if (!WARP_ROWS) {
        const int slots = VECTORS * warps_of_row;
        if (threadIdx.x == 0) {
            if (kNormalizes) squares_board.open(slots);
            amax_boards.open(warps_of_row);
        }
        if (kNormalizes && threadIdx.x < -slots % 16u) squares_board.clear(slots + threadIdx.x, 0);
#if SPLIT > 1
        if (threadIdx.x == 0) barriers_made();
        meet_cluster();
#endif
    }
    wait_for_last_kernel();
    if (first_row >= rows) return;  // whole warps, and only where no warp waits for another

#pragma unroll 1
    for (int turn = 0; turn < TURNS; ++turn) {
        const int64_t row = first_row + turn;
        if (TURNS > 1 && row >= rows) break;

        // Columns past the end are zeros, and stay zeros through all that follows.
        Values held[VECTORS], others[kBatch], gains[VECTORS];
#pragma unroll
        for (int first = 0; first < VECTORS; first += kBatch) {
#pragma unroll
            for (int i = first; i < first + kBatch && i < VECTORS; ++i) {
                held[i] = load_values_once(x + i * step, column_of(i) < k);
                if (kTwoInputs) others[i - first] = load_values_once(residual + i * step, column_of(i) < k);
                if (kNormalizes) gains[i] = load_values(weight + i * step, column_of(i) < k);
            }
            if (first == 0 && !WARP_ROWS && rank == 0 && threadIdx.x == 0) {
                sums[row] = 0;  // warps add to it, once they heard from this one
                if (SPLIT > 1) fence();
            }
            if (!kTwoInputs) continue;
#pragma unroll
            for (int i = first; i < first + kBatch && i < VECTORS; ++i) {
#pragma unroll
                for (int j = 0; j < kPairs; ++j) {
                    uint32_t& pair = held[i].pairs[j];
                    const uint32_t with = others[i - first].pairs[j];
                    pair = OPERATION == kSiluMul ? Pair::product(silu(pair), with) : Pair::sum(pair, with);
                }
                if (OPERATION == kAddRmsNorm && column_of(i) < k) store_values(residual_out + i * step, held[i]);
            }
        }

        if (kNormalizes) {
            float squares = 0.0f;
#pragma unroll
            for (int i = 0; i < VECTORS; ++i) {
                float partial = 0.0f;
#pragma unroll
                for (int j = 0; j < kPairs; ++j) {
                    const float low = low_value<Format>(held[i].pairs[j]), high = high_value<Format>(held[i].pairs[j]);
                    partial = __fmaf_rn(high, high, __fmaf_rn(low, low, partial));
                }
                partial = warp_sum(partial);
                if (WARP_ROWS)
                    squares = __fadd_rn(squares, partial);
                else
                    squares_board.post(warp_of_row + i * warps_of_row, __float_as_uint(partial));
            }
            if (!WARP_ROWS) {
                squares_board.wait();
                squares = total(squares_board, VECTORS * warps_of_row);
            }
            const float factor = reciprocal_root(__fadd_rn(__fmul_rn(squares, inverse_k), eps));
#pragma unroll
            for (int i = 0; i < VECTORS; ++i)
#pragma unroll
                for (int j = 0; j < kPairs; ++j)
                    held[i].pairs[j] = Pair::product(scaled(held[i].pairs[j], factor), gains[i].pairs[j]);
        }
        if (STORE_VALUES) {
#pragma unroll
            for (int i = 0; i < VECTORS; ++i)
                if (column_of(i) < k) store_values(values_out + row * k + column_of(i), held[i]);
        }

        uint32_t most = 0;
#pragma unroll
        for (int i = 0; i < VECTORS; ++i)
#pragma unroll
            for (int j = 0; j < kPairs; ++j) most = Extremes<Format>::most(most, Pair::magnitude(held[i].pairs[j]));
        // As integers, magnitudes are in the order of their values, with NaN above infinity.
        uint32_t amax = __reduce_max_sync(kFullMask, max(most & 0xFFFFu, most >> 16));
        if (!WARP_ROWS) {
            // The other one may still be read from the turn before.
            const Board amax_board = amax_boards.next(turn % 2);
            amax_board.post(warp_of_row, amax);
            amax_board.wait();
            amax = lane < warps_of_row ? amax_board.word(lane) : 0;
            if (SPLIT > 1 && lane + kWarpSize < warps_of_row) amax = max(amax, amax_board.word(lane + kWarpSize));
            amax = __reduce_max_sync(kFullMask, amax);
        }

        const Scale scale(static_cast<uint16_t>(amax));
        if (IN_FORMAT == 1 && scale.lift != 1.0f) {
#pragma unroll
            for (int i = 0; i < VECTORS; ++i)
#pragma unroll
                for (int j = 0; j < kPairs; ++j) held[i].pairs[j] = scaled(held[i].pairs[j], scale.lift);
        }
        int32_t sum = 0;
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            if (column_of(i) >= k_pad) continue;
            const uint2 packed = make_uint2(scale.four_codes(held[i].pairs[0], held[i].pairs[1]),
                                            scale.four_codes(held[i].pairs[2], held[i].pairs[3]));
            if (kStages)
                reinterpret_cast<uint2*>(staged)[2 * staged_place(column_of(i) / 16, turn) + lane % 2] = packed;
            else
                *reinterpret_cast<uint2*>(codes + i * codes_step) = packed;
            sum = __dp4a(static_cast<int>(packed.x), 0x01010101, sum);
            sum = __dp4a(static_cast<int>(packed.y), 0x01010101, sum);
        }
        sum = __reduce_add_sync(kFullMask, sum);
        if (lane == 0) {
            if (WARP_ROWS)
                sums[row] = sum;
            else
                add_relaxed(&sums[row], sum);
            if (warp_of_row == 0) scales[row] = scale.value;
        }

        x += x_stride;
        residual += OPERATION == kSiluMul ? x_stride : residual_stride;
        residual_out += k;
    }
    if (kStages) {
        __syncthreads();
        write_tiles(staged, codes, first_row, rows, k_pad);
    }
}
