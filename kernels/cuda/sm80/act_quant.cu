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
// VECTORS       of 8 values that a thread holds                      WARP_ROWS     1: a row a warp, 0: a row a block
// STORE_VALUES  1: also store what is quantized (for tests)     TILED        1: codes as Hopper's products read them
#include "common/extremes.cuh"
#include "common/math.cuh"
#include "common/pairs.cuh"
#include "common/reduce.cuh"
#include "common/types.cuh"

using Format = FormatOf<IN_FORMAT>::Type;
constexpr int kSiluMul = 1, kRmsNorm = 2, kAddRmsNorm = 3;
constexpr bool kNormalizes = OPERATION == kRmsNorm || OPERATION == kAddRmsNorm;
constexpr bool kTwoInputs = OPERATION == kSiluMul || OPERATION == kAddRmsNorm;
constexpr bool kWholeBlock = !WARP_ROWS;
constexpr int kBatch = VECTORS < 4 ? VECTORS : 4;  // vectors asked for before the first is waited for
constexpr int kMaxThreads = WARP_ROWS ? 128 : VECTORS > 4 ? 832 : 1024;

constexpr uint32_t kMagnitudes = 0x7FFF7FFFu;
constexpr float kLog2E = 1.44269504f;
// Below it the remainder of a division can lose bits to float32's smallest number: x and scale are lifted, exactly.
constexpr float kSmallestScale = 0x1p-100f, kLift = 0x1p100f;

DEVICE Values load(const uint16_t* row, int column, int k) {
    return column < k ? load_values(row + column) : Values{};
}

DEVICE void store(uint16_t* row, int column, int k, const Values& v) {
    if (column < k) store_values(row + column, v);
}

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

struct Scale {
    float value;
    float lift, lifted, inverse;  // lifted = value * lift, exactly
    uint32_t mask;                // of codes: none where the scale is infinite or NaN

    // `amax`: bits of the largest magnitude.
    DEVICE explicit Scale(uint16_t amax) {
        value = __fdiv_rn(Format::value(amax), 127.0f);
        if (value == 0.0f) value = 1.0f;
        lift = value < kSmallestScale ? kLift : 1.0f;
        lifted = __fmul_rn(value, lift);
        inverse = __frcp_rn(lifted);
        mask = value < kInfinity ? 0xFFFFFFFFu : 0u;
    }

    // The code of x in the low byte. A quotient by way of the reciprocal is off by an ulp at times, which matters at a
    // tie; one step of correction by the exact remainder gives the quotient that a division rounds to
    // (tests/kernels/test_act_quant.py goes through every x and scale). |x| <= amax, so codes stay within -127 .. 127.
    DEVICE uint32_t code(float x) const {
        if (IN_FORMAT == 1) x = __fmul_rn(x, lift);  // no float16 is that small
        const float quotient = __fmul_rn(x, inverse);
        const float corrected = __fmaf_rn(__fmaf_rn(-quotient, lifted, x), inverse, quotient);
        return __float_as_uint(__fadd_rn(corrected, kRounder));
    }

    DEVICE uint32_t four_codes(uint32_t first, uint32_t second) const {
        return mask & pack_bytes(code(low_value<Format>(first)), code(high_value<Format>(first)),
                                 code(low_value<Format>(second)), code(high_value<Format>(second)));
    }
};

// Where the codes from `column` on of a row go: in order, or in the tiles of kernels/tiles.py.
DEVICE int64_t code_offset(int64_t row, int column, int rows, int k_pad) {
    if (!TILED) return row * k_pad + column;
    const int64_t tile = (column / 128) * static_cast<int64_t>((rows + 7) / 8) + row / 8;
    return tile * 1024 + column % 128 / 16 * 128 + row % 8 * 16 + column % 16;
}

// x [rows, k], strides in values; `residual` [rows, k] and `weight` [k] where OPERATION has them; codes [rows, k_pad]:
// columns from k on become 0. All rows begin at multiples of 16 bytes, k is a multiple of 8, k_pad of 128, and the
// threads of a row hold at least k_pad values.
extern "C" __global__ void __launch_bounds__(kMaxThreads)
    qoq_act_quant_sm80(const uint16_t* __restrict__ x, const uint16_t* __restrict__ residual,
                       const uint16_t* __restrict__ weight, int8_t* __restrict__ codes, float* __restrict__ scales,
                       int32_t* __restrict__ sums, uint16_t* __restrict__ residual_out,
                       uint16_t* __restrict__ values_out, int rows, int k, int k_pad, int x_stride,
                       int residual_stride, float eps) {
    __shared__ float warp_squares[kMaxWarps];
    __shared__ uint32_t warp_amaxes[kMaxWarps];
    __shared__ int32_t warp_sums[kMaxWarps];

    const int threads = WARP_ROWS ? kWarpSize : blockDim.x;
    const int thread = WARP_ROWS ? threadIdx.x % kWarpSize : threadIdx.x;
    int64_t row = blockIdx.x;
    if (WARP_ROWS) row = row * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
    if (row >= rows) return;  // whole warps, and only where no warp waits for another
    const auto column_of = [&](int i) { return (thread + i * threads) * kVectorValues; };
    x += row * x_stride;
    const uint16_t* other = OPERATION == kSiluMul ? x + k : residual + row * residual_stride;

    // Columns past the end are zeros, and stay zeros through all that follows.
    Values held[VECTORS], others[kBatch], gains[VECTORS];
#pragma unroll
    for (int first = 0; first < VECTORS; first += kBatch) {
#pragma unroll
        for (int i = first; i < first + kBatch && i < VECTORS; ++i) {
            held[i] = load(x, column_of(i), k);
            if (kTwoInputs) others[i - first] = load(other, column_of(i), k);
            if (kNormalizes) gains[i] = load(weight, column_of(i), k);
        }
        if (!kTwoInputs) continue;
#pragma unroll
        for (int i = first; i < first + kBatch && i < VECTORS; ++i) {
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
                uint32_t& pair = held[i].pairs[j];
                const uint32_t with = others[i - first].pairs[j];
                pair = OPERATION == kSiluMul ? multiply<Format>(silu(pair), with) : add<Format>(pair, with);
            }
            if (OPERATION == kAddRmsNorm) store(residual_out + row * k, column_of(i), k, held[i]);
        }
    }

    if (kNormalizes) {
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < VECTORS; ++i)
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
                const float low = low_value<Format>(held[i].pairs[j]), high = high_value<Format>(held[i].pairs[j]);
                squares = __fmaf_rn(high, high, __fmaf_rn(low, low, squares));
            }
        squares = reduce_sum<kWholeBlock>(squares, warp_squares);
        const float factor = __frsqrt_rn(__fadd_rn(__fdiv_rn(squares, static_cast<float>(k)), eps));
#pragma unroll
        for (int i = 0; i < VECTORS; ++i)
#pragma unroll
            for (int j = 0; j < kPairs; ++j)
                held[i].pairs[j] = multiply<Format>(scaled(held[i].pairs[j], factor), gains[i].pairs[j]);
    }
    if (STORE_VALUES) {
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) store(values_out + row * k, column_of(i), k, held[i]);
    }

    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i)
#pragma unroll
        for (int j = 0; j < kPairs; ++j) amax = Extremes<Format>::most(amax, held[i].pairs[j] & kMagnitudes);
    // As integers, magnitudes are in the order of their values, with NaN above infinity.
    amax = reduce_max<kWholeBlock>(max(amax & 0xFFFFu, amax >> 16), warp_amaxes);

    const Scale scale(static_cast<uint16_t>(amax));
    int32_t sum = 0;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        if (column_of(i) >= k_pad) continue;
        const uint2 packed = make_uint2(scale.four_codes(held[i].pairs[0], held[i].pairs[1]),
                                        scale.four_codes(held[i].pairs[2], held[i].pairs[3]));
        *reinterpret_cast<uint2*>(codes + code_offset(row, column_of(i), rows, k_pad)) = packed;
        sum = __dp4a(static_cast<int>(packed.x), 0x01010101, sum);
        sum = __dp4a(static_cast<int>(packed.y), 0x01010101, sum);
    }
    sum = reduce_sum<kWholeBlock>(sum, warp_sums);
    if (thread == 0) {
        scales[row] = scale.value;
        sums[row] = sum;
    }
}
