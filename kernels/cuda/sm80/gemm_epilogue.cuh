// From int32 sums to the output: scales, zero term, bias, and 16-byte stores.
#pragma once
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

// A load that stays where it is written: hoisted loads of all tokens at once do not fit the registers.
template <int kWords>
DEVICE uint2 load_in_place(const void* pointer) {
    uint2 v = make_uint2(0, 0);
    if (kWords == 2)
        asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(pointer));
    else
        asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v.x) : "l"(pointer));
    return v;
}

// The 4 x 4 matrix whose row is held by each of four neighbouring lanes, transposed.
DEVICE void transpose_quad(uint32_t (&v)[4], int t) {
    const bool odd = t & 1, upper = t & 2;
    const uint32_t a = __shfl_xor_sync(kFullMask, odd ? v[0] : v[1], 1);
    const uint32_t b = __shfl_xor_sync(kFullMask, odd ? v[2] : v[3], 1);
    (odd ? v[0] : v[1]) = a;
    (odd ? v[2] : v[3]) = b;
    const uint32_t c = __shfl_xor_sync(kFullMask, upper ? v[0] : v[2], 2);
    const uint32_t d = __shfl_xor_sync(kFullMask, upper ? v[1] : v[3], 2);
    (upper ? v[0] : v[2]) = c;
    (upper ? v[1] : v[3]) = d;
}

// What the epilogue needs of a token: its scale and its sum of codes.
struct TokenScale {
    float scale;
    int32_t sum;
};

// Tokens `token` (even) and `token + 1`; past the end zeros, since what they give is not stored.
template <bool kNeedsSums>
DEVICE void load_token_pair(TokenScale (&pair)[2], const Output& output, int token) {
    uint2 scales = make_uint2(0, 0), sums = make_uint2(0, 0);
    if (token + 1 < output.m) {
        scales = load_in_place<2>(output.act_scales + token);
        if (kNeedsSums) sums = load_in_place<2>(output.act_sums + token);
    } else if (token < output.m) {
        scales = load_in_place<1>(output.act_scales + token);
        if (kNeedsSums) sums = load_in_place<1>(output.act_sums + token);
    }
    pair[0] = {__uint_as_float(scales.x), static_cast<int32_t>(sums.x)};
    pair[1] = {__uint_as_float(scales.y), static_cast<int32_t>(sums.y)};
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
#pragma unroll
    for (int s = 0; s < kStripes; ++s) {
        const int first = channel + s * kStripe;
        const int rows_left = first < output.n ? output.m - token - g : 0;
        const Scaler<kFormat, Format, kHasBias> scaler(output, first + g);
        const int64_t place = static_cast<int64_t>(token + g) * output.n + first + 8 * t;
        uint16_t* to = static_cast<uint16_t*>(output.out) + place;
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j, to += tokens_8) {
            TokenScale pair[2];
            load_token_pair<kFormat != kInt8>(pair, output, token + 8 * j + 2 * t);
            uint32_t words[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const int32_t(&c)[4] = acc[2 * s + (q >> 1)][j];
                const float y0 = scaler(c[2 * (q & 1)], q, pair[0]), y1 = scaler(c[2 * (q & 1) + 1], q, pair[1]);
                words[q] = transpose_8x8(Format::pair(y0, y1));    // now channels 8 q + 2 t, + 1 of token g
            }
            transpose_quad(words, t);                              // now channels 8 t .. 8 t + 7
            if (8 * j < rows_left) *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

// The sums themselves, for verification.
template <int kFormat, int kStripes, int kTokenTiles>
DEVICE void store_sums(const int32_t (&acc)[2 * kStripes][kTokenTiles][4], const Output& output, int channel, int token,
                       int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < 2 * kStripes; ++i)
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int c = channel + 16 * i + g + 8 * (e >> 1), row = token + 8 * j + 2 * t + (e & 1);
                if (row < output.m && c < output.n) {
                    const int32_t act_sum = kFormat == kProgressive ? __ldg(output.act_sums + row) : 0;
                    static_cast<int32_t*>(output.out)[static_cast<int64_t>(row) * output.n + c] =
                        unbiased<kFormat>(acc[i][j][e], act_sum);
                }
            }
}
