// From int32 sums to the output: scales, zero term, bias, and stores of whole sectors.
#pragma once
#include "common/global_memory.cuh"
#include "common/mma.cuh"
#include "common/types.cuh"
#include "sm80/gemm_weights.cuh"

struct Output {
    const float* act_scales;      // [M]
    const int32_t* act_sums;      // [M]
    const uint16_t* s1_scales;    // float16 [N]
    const uint16_t* s1_szeros;    // float16 [N], per channel only
    const uint16_t* bias;         // float16 [N] or null
    void* out;                    // [M, N]
    int m, n;
};

// The sum that is meant: without the 128 that keeps progressive weights non-negative.
template <int kFormat>
DEVICE int32_t unbiased(int32_t acc, int32_t act_sum) {
    return kFormat == kProgressive ? acc - 128 * act_sum : acc;
}

// From lanes t that hold words 2 t .. (low) and 2 t .. (high) of two rows of eight: neighbouring lanes exchange one, so
// that an even lane has words t, t + 1 of the first row and an odd one words t - 1, t of the second.
DEVICE uint2 exchange(uint32_t low, uint32_t high, bool odd) {
    const uint32_t other = __shfl_xor_sync(kFullMask, odd ? low : high, 1);
    return odd ? make_uint2(other, high) : make_uint2(low, other);
}

// What the epilogue needs of a token: its scale and its sum of codes.
struct TokenScale {
    float scale;
    int32_t sum;
};

// Token `token`; past the end zeros, since what they give is not stored.
template <bool kNeedsSums>
DEVICE TokenScale load_token(const Output& output, int token) {
    const bool valid = token < output.m;
    return {__uint_as_float(load_in_place(output.act_scales + token, valid)),
            kNeedsSums ? static_cast<int32_t>(load_in_place(output.act_sums + token, valid)) : 0};
}

// Scales of channels g, g + 8, g + 16 and g + 24 of a stripe; kept in 16 bits, since registers are short here.
template <int kFormat, class Format, bool kHasBias>
struct Scaler {
    uint32_t scales[4];    // s1_scales in the low half, s1_szeros in the high one
    float biases[4];

    DEVICE Scaler(const Output& output, int channel) {
        channel = min(channel, output.n - 1 - 24);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            scales[q] = __ldg(output.s1_scales + channel + 8 * q);
            if (kFormat == kPerChannel)
                scales[q] |= static_cast<uint32_t>(__ldg(output.s1_szeros + channel + 8 * q)) << 16;
            if (kHasBias) biases[q] = Format::value(Format::bits(Float16::value(__ldg(output.bias + channel + 8 * q))));
        }
    }

    // Products in float32, each rounded, one rounding at the store, then the bias (formats/arithmetic.py).
    DEVICE float operator()(int32_t acc, int q, const TokenScale& token) const {
        const float scale = __fmul_rn(token.scale, low_value<Float16>(scales[q]));
        float y = __fmul_rn(__int2float_rn(unbiased<kFormat>(acc, token.sum)), scale);
        if (kFormat == kPerChannel)
            y = __fsub_rn(y, __fmul_rn(__fmul_rn(token.scale, __int2float_rn(token.sum)),
                                       high_value<Float16>(scales[q])));
        return kHasBias ? __fadd_rn(Format::value(Format::bits(y)), biases[q]) : y;
    }
};

// acc: sums of a warp, 32 kStripes channels from `channel` on by 8 kTokenTiles tokens from `token` on; fragments of
// channels 16 i .. of the warp and tokens 8 j .. are acc[i][j].
template <int kFormat, class Format, bool kHasBias, int kStripes, int kTokenTiles>
DEVICE void store_tile(const int32_t (&acc)[2 * kStripes][kTokenTiles][4], const Output& output, int channel,
                       int token, int lane) {
    const int g = lane >> 2, t = lane & 3;
    const int64_t tokens_8 = static_cast<int64_t>(output.n) * 8;
    const bool odd = t & 1;
    // Pairs under way: a load takes as long as the work on eight of them; small tiles have few registers, and the zero
    // term takes some.
    constexpr int kShare = kTokenTiles >= 12 && kFormat != kPerChannel ? 2 : 4;
    constexpr int kAhead = kTokenTiles < kShare ? 1 : kTokenTiles / kShare;
    TokenScale ahead[kAhead][2];
    const auto load_ahead = [&](int j) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            ahead[j % kAhead][i] = load_token<kFormat != kInt8>(output, token + 8 * (j % kTokenTiles) + 2 * t + i);
    };
#pragma unroll
    for (int j = 0; j < kAhead; ++j) load_ahead(j);
#pragma unroll
    for (int s = 0; s < kStripes; ++s) {
        const int first = channel + s * kStripe;
        const int rows_left = first < output.n ? output.m - token - g : 0;
        const Scaler<kFormat, Format, kHasBias> scaler(output, first + g);
        const int64_t place = static_cast<int64_t>(token + g) * output.n + first + (odd ? 6 : 0) + 2 * t;
        uint16_t* to = static_cast<uint16_t*>(output.out) + place;
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j, to += tokens_8) {
            const int next = s * kTokenTiles + j + kAhead;
            const TokenScale pair[2] = {ahead[next % kAhead][0], ahead[next % kAhead][1]};
            if (next < kStripes * kTokenTiles) load_ahead(next);
            uint32_t words[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const int32_t(&c)[4] = acc[2 * s + (q >> 1)][j];
                const float y0 = scaler(c[2 * (q & 1)], q, pair[0]), y1 = scaler(c[2 * (q & 1) + 1], q, pair[1]);
                words[q] = transpose_8x8(Format::pair(y0, y1));    // now channels 8 q + 2 t, + 1 of token g
            }
            // Four neighbouring lanes fill a sector of 32 bytes.
            const uint2 low = exchange(words[0], words[1], odd), high = exchange(words[2], words[3], odd);
            if (8 * j < rows_left) {
                *reinterpret_cast<uint2*>(to) = low;
                *reinterpret_cast<uint2*>(to + 16) = high;
            }
        }
    }
}

// The sums themselves, for verification.
template <int kFormat, int kStripes, int kTokenTiles>
DEVICE void store_sums(const int32_t (&acc)[2 * kStripes][kTokenTiles][4], const Output& output, int channel, int token,
                       int lane) {
    const int g = lane >> 2, t = lane & 3;
    int32_t* to = static_cast<int32_t*>(output.out) + (static_cast<int64_t>(token + 2 * t) * output.n + channel + g);
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j, to += static_cast<int64_t>(output.n) * 8)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            const int row = token + 8 * j + 2 * t + odd;
            if (row >= output.m) continue;
            const int32_t act_sum = kFormat == kProgressive ? load_in_place(output.act_sums + row, true) : 0;
#pragma unroll
            for (int q = 0; q < 4 * kStripes; ++q)
                if (channel + g + 8 * q < output.n)
                    to[odd * output.n + 8 * q] = unbiased<kFormat>(acc[q >> 1][j][2 * (q & 1) + odd], act_sum);
        }
}
