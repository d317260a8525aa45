// One warp, one query group: attention to 32 tokens at a time, straight from the codes of a page.
//
// Codes are float16 subnormal numbers as they lie in the page (a 4-bit code reads as code * 2^-24, or * 2^-20 in the
// upper half of a byte), which the tensor cores multiply exactly; zeros and scales come in afterwards:
//     score = key scale * (sum q * code - key zero * sum q)
//     output = sum p * value scale * code - sum p * value scale * value zero
// Tokens are the rows of the first product and the inner dimension of the second, queries are its columns. With up to
// 4 queries the 8 columns hold them twice: columns 0 .. 3 see the first 16 tokens and columns 4 .. 7 the last, so that
// no score is computed twice; the halves are added at the end. Lane 4 g + t has the scores of tokens g and g + 8 of a
// tile, columns 2 t and 2 t + 1, and of the output the dimensions that KvPage gives g, of the same columns.
//
// Scores are exponents of 2. They are taken relative to a `top` that is raised only when a score exceeds it by kSlack,
// and a value scale relative to a power of two that is lowered when one gets too large for it: p * value scale stays
// below 2^15, whatever the scales, and rounds to float16 without overflow. The sum of zeros uses the rounded numbers.
//
// BITS, HEAD_DIM  of the page        QUERIES  4 or 8, columns a group may have        FORMAT  of queries and outputs
#pragma once
#include "common/kv_page.cuh"
#include "common/math.cuh"
#include "common/mma.cuh"
#include "common/types.cuh"

using Format = FormatOf<FORMAT>::Type;
using Page = KvPage<HEAD_DIM, BITS>;
constexpr bool kTwice = QUERIES == 4;
constexpr int kTilesOfLane = kTwice ? 1 : 2;
constexpr int kParts = HEAD_DIM / 32;  // 16-byte parts of a query that a lane loads

constexpr float kSlack = 6.0f;
constexpr float kMaxScaled = 512.0f;                          // of a value scale times value_scale
constexpr uint32_t kMaxScaledExponent = 8, kExponentBias = 127;
constexpr float kFirstValueScale = 0x1p32f;                   // kMaxScaled over the smallest float16
constexpr float kSubnormal = 0x1p24f;
constexpr float kUpperNibble = BITS == 4 ? 0.0625f : 1.0f;    // undoes the 2^4 of codes in the upper half of a byte
constexpr uint32_t kQueryExponent = 14;                       // of a query's largest value, after scaling

// What lane 4 g + t loads of the query of column g: dimensions 32 part + 8 t .. + 7.
struct RawQuery {
    uint4 parts[kParts];
};

struct Query {
    uint32_t operands[Page::kSteps][2];
    float factor[2], sum[2];  // of columns 2 t, 2 t + 1: score = key scale * (product * factor - key zero * sum)
};

// The query is scaled by a power of two of its own, so that any bfloat16 fits float16, and nothing of it that matters
// is lost: values below 2^-28 of the largest lose bits. One with an infinity or a NaN is taken as it is.
DEVICE Query prepare(const RawQuery& raw, float softmax_scale) {
    float amax = 0.0f, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
        const uint32_t words[4] = {raw.parts[i].x, raw.parts[i].y, raw.parts[i].z, raw.parts[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j)
            amax = fmaxf(amax, fmaxf(fabsf(low_value<Format>(words[j])), fabsf(high_value<Format>(words[j]))));
    }
    amax = fmaxf(amax, __shfl_xor_sync(kFullMask, amax, 1));
    amax = fmaxf(amax, __shfl_xor_sync(kFullMask, amax, 2));
    const uint32_t exponent = __float_as_uint(amax) >> 23;
    const uint32_t lift = exponent == 255 ? kExponentBias : min(2 * kExponentBias + kQueryExponent - exponent, 253u);
    const float scale = __uint_as_float(lift << 23);
    const float inverse = __uint_as_float((2 * kExponentBias - lift) << 23) * softmax_scale;

    Query query;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
        const uint32_t words[4] = {raw.parts[i].x, raw.parts[i].y, raw.parts[i].z, raw.parts[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float low = low_value<Format>(words[j]) * scale, high = high_value<Format>(words[j]) * scale;
            const float share = j % 2 ? kUpperNibble : 1.0f;
            sum += low + high;
            query.operands[2 * i + j / 2][j % 2] = Float16::pair(low * share, high * share);
        }
    }
    sum += __shfl_xor_sync(kFullMask, sum, 1);
    sum += __shfl_xor_sync(kFullMask, sum, 2);
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < 2; ++c) {  // the lanes of column 2 t + c begin at 4 * (2 t + c)
        const float factor = __shfl_sync(kFullMask, inverse, 8 * t + 4 * c);
        query.factor[c] = factor * kSubnormal;
        query.sum[c] = __shfl_sync(kFullMask, sum, 8 * t + 4 * c) * factor;
    }
    return query;
}

struct Operand {
    uint32_t a0, a1, a2, a3;
};

DEVICE uint32_t word(const uint4& words, int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// Operand `step` of a lane's piece of a chunk; rows of keys are tokens, of values dimensions.
DEVICE Operand byte_operand(const uint4& piece, int step) {
    const uint32_t x = word(piece, 2 * step), y = word(piece, 2 * step + 1);
    return {x & 0x00FF00FFu, y & 0x00FF00FFu, x >> 8 & 0x00FF00FFu, y >> 8 & 0x00FF00FFu};
}

DEVICE Operand key_operand(const uint4& piece, int step) {
    if (BITS == 8) return byte_operand(piece, step);
    const uint32_t x = word(piece, step), y = x >> 8;
    return {x & 0x000F000Fu, y & 0x000F000Fu, x & 0x00F000F0u, y & 0x00F000F0u};
}

DEVICE Operand value_operand(const uint4& piece, int step) {
    if (BITS == 8) return byte_operand(piece, step);
    const uint32_t x = word(piece, step), y = x >> 8;
    return {x & 0x000F000Fu, x & 0x00F000F0u, y & 0x000F000Fu, y & 0x00F000F0u};
}

// Sums of a lane; [2] is by column.
struct Attention {
    float output[Page::kSteps][4];  // times 2^-24, upper nibbles times 2^-20: [0], [1] of the lower dimension
    float top[2], sum[2], zeros[2];
    float value_scale;  // the same in all lanes

    DEVICE Attention() {
#pragma unroll
        for (int i = 0; i < Page::kSteps; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) output[i][j] = 0.0f;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            top[c] = -kInfinity;
            sum[c] = zeros[c] = 0.0f;
        }
        value_scale = kFirstValueScale;
    }

    // Bring sums to tops that cover the scores `highest` of all lanes, and to a value_scale for scales up to `widest`.
    DEVICE void raise(float (&highest)[2], float widest) {
#pragma unroll
        for (int lanes = kTwice ? 2 : 4; lanes < kWarpSize; lanes *= 2) {
            highest[0] = fmaxf(highest[0], __shfl_xor_sync(kFullMask, highest[0], lanes));
            highest[1] = fmaxf(highest[1], __shfl_xor_sync(kFullMask, highest[1], lanes));
            widest = fmaxf(widest, __shfl_xor_sync(kFullMask, widest, lanes));
        }
        float of_values = 1.0f;
        if (widest * value_scale > kMaxScaled) {
            const uint32_t exponent = kMaxScaledExponent + 2 * kExponentBias - (__float_as_uint(widest) >> 23);
            of_values = __uint_as_float(((exponent + kExponentBias) << 23) - __float_as_uint(value_scale));
            value_scale = __uint_as_float(exponent << 23);
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const float raised = fmaxf(top[c], highest[c]);
            const float of_scores = power_of_2(top[c] - raised), of_both = of_scores * of_values;
            top[c] = raised;
            sum[c] *= of_scores;
            zeros[c] *= of_both;
#pragma unroll
            for (int i = 0; i < Page::kSteps; ++i) {
                output[i][c] *= of_both;
                output[i][c + 2] *= of_both;
            }
        }
    }

    // Attend to tokens from .. to - 1 (of 0 .. 31) of the sub-block at `block` in shared memory.
    DEVICE void add(const Query& query, uint32_t block, int from, int to) {
        const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
        const uint32_t piece = block + lane * Page::kPieceBytes;

        float products[2][4] = {};
#pragma unroll
        for (int chunk = 0; chunk < Page::kChunksOfTile; ++chunk) {
            uint4 codes[2];
#pragma unroll
            for (int tile = 0; tile < 2; ++tile)
                codes[tile] = load_shared_16(piece + (tile * Page::kChunksOfTile + chunk) * Page::kChunkBytes);
#pragma unroll
            for (int step = 0; step < Page::kStepsOfChunk; ++step)
#pragma unroll
                for (int tile = 0; tile < 2; ++tile) {
                    const Operand a = key_operand(codes[tile], step);
                    const uint32_t(&b)[2] = query.operands[chunk * Page::kStepsOfChunk + step];
                    mma_f16(products[tile], a.a0, a.a1, a.a2, a.a3, b[0], b[1]);
                }
        }

        // [tile][token g, g + 8][column]
        float scores[kTilesOfLane][2][2], value_scales[kTilesOfLane][2], value_zeros[kTilesOfLane][2];
        float highest[2] = {-kInfinity, -kInfinity}, widest = 0.0f;
#pragma unroll
        for (int i = 0; i < kTilesOfLane; ++i) {
            const int tile = kTwice ? t / 2 : i;
            const uint4 entry = load_shared_16(block + Page::kEntries + (tile * 8 + g) * Page::kEntryBytes);
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const uint32_t of_key = row ? entry.z : entry.x, of_value = row ? entry.w : entry.y;
                const float key_scale = low_value<Float16>(of_key), key_zero = high_value<Float16>(of_key);
                value_scales[i][row] = low_value<Float16>(of_value);
                value_zeros[i][row] = high_value<Float16>(of_value);
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int place = 2 * row + c;
                    const float of_column = t / 2 ? products[1][place] : products[0][place];
                    const float product = kTwice ? of_column : products[i][place];
                    scores[i][row][c] = fmaf(-key_zero, query.sum[c], product * query.factor[c]) * key_scale;
                }
            }
            if (from > 0 || to < kBlockTokens) {  // what was never written may be a NaN
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    const int token = kTileTokens * tile + 8 * row + g;
                    if (token >= from && token < to) continue;
                    scores[i][row][0] = scores[i][row][1] = -kInfinity;
                    value_scales[i][row] = value_zeros[i][row] = 0.0f;
                }
            }
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                highest[0] = fmaxf(highest[0], scores[i][row][0]);
                highest[1] = fmaxf(highest[1], scores[i][row][1]);
                widest = fmaxf(widest, value_scales[i][row]);
            }
        }
        const bool too_high = highest[0] > top[0] + kSlack || highest[1] > top[1] + kSlack;
        if (__any_sync(kFullMask, too_high || widest * value_scale > kMaxScaled)) raise(highest, widest);

        uint32_t operands[2][2];  // [tile][tokens 0 .. 7, 8 .. 15]
#pragma unroll
        for (int i = 0; i < kTilesOfLane; ++i)
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const float p0 = power_of_2(scores[i][row][0] - top[0]), p1 = power_of_2(scores[i][row][1] - top[1]);
                const float scale = value_scales[i][row] * value_scale;
                const uint32_t pair = Float16::pair(p0 * scale, p1 * scale);
                sum[0] += p0;
                sum[1] += p1;
                zeros[0] = fmaf(low_value<Float16>(pair), value_zeros[i][row], zeros[0]);
                zeros[1] = fmaf(high_value<Float16>(pair), value_zeros[i][row], zeros[1]);
                const uint32_t turned = transpose_8x8(pair);
                if (kTwice) {  // lanes 0 .. 15 now have columns 0 .. 3
                    operands[0][row] = lane < 16 ? turned : 0u;
                    operands[1][row] = lane < 16 ? 0u : turned;
                } else {
                    operands[i][row] = turned;
                }
            }

#pragma unroll
        for (int chunk = 0; chunk < Page::kChunksOfTile; ++chunk) {
            uint4 codes[2];
#pragma unroll
            for (int tile = 0; tile < 2; ++tile)
                codes[tile] = load_shared_16(piece + Page::kValues +
                                             (tile * Page::kChunksOfTile + chunk) * Page::kChunkBytes);
#pragma unroll
            for (int tile = 0; tile < 2; ++tile)
#pragma unroll
                for (int step = 0; step < Page::kStepsOfChunk; ++step) {
                    const Operand a = value_operand(codes[tile], step);
                    mma_f16(output[chunk * Page::kStepsOfChunk + step], a.a0, a.a1, a.a2, a.a3, operands[tile][0],
                            operands[tile][1]);
                }
        }
    }

    // Add up sums and zeros over the lanes that share a column.
    DEVICE void fold() {
#pragma unroll
        for (int lanes = kTwice ? 2 : 4; lanes < kWarpSize; lanes *= 2)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                sum[c] += __shfl_xor_sync(kFullMask, sum[c], lanes);
                zeros[c] += __shfl_xor_sync(kFullMask, zeros[c], lanes);
            }
    }

    // Dimensions of the lane for one of its columns, after fold(), not divided by the sum. Where columns are doubled
    // the lane gets column c = t / 2 from itself and from lane ^ 2, whose other column it hands on; all lanes call.
    DEVICE void values(int c, float (&result)[Page::kDimsOfGroup]) const {
        const float inverse = __uint_as_float(2 * (kExponentBias << 23) - __float_as_uint(value_scale));
#pragma unroll
        for (int i = 0; i < Page::kSteps; ++i)
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const float first = output[i][2 * row], second = output[i][2 * row + 1];
                float product = c ? second : first;
                if (kTwice) product += __shfl_xor_sync(kFullMask, c ? first : second, 2);
                const float unit = row ? kSubnormal * kUpperNibble : kSubnormal;
                result[2 * i + row] = fmaf(product, unit, -(c ? zeros[1] : zeros[0])) * inverse;
            }
    }
};
