// From the int32 sums of a warpgroup, 64 channels by kTokens tokens, to out [M, N].
//
// Register 4 j + 2 h + e of lane 4 g + t in warp w is the sum of channel 16 w + 8 h + g and token 8 j + 2 t + e (PTX ISA,
// "Register Fragments for wgmma.mma_async.m64nNk32").
#pragma once
#include "common/types.cuh"
#include "sm90/async.cuh"
#include "sm90/gemm_weights.cuh"

constexpr int kGroupThreads = 128;

struct Output {
    const float* act_scales;      // [M]
    const int32_t* act_sums;      // [M]; not read for int8 weights
    const uint16_t* s1_scales;    // float16 [N]
    const uint16_t* s1_szeros;    // float16 [N], per channel only
    const uint16_t* bias;         // float16 [N] or null
    void* out;                    // [M, N]
    int m, n;
};

// What the epilogue needs of a token: its scale, and what is to be subtracted of each of its sums. Progressive weights
// were multiplied with 128 more than they are: int32 128 * sum. Per channel: float32 scale * sum, for the zeros.
struct TokenScale {
    float scale;
    uint32_t correction;
};

template <int kFormat>
DEVICE TokenScale load_token(const Output& output, int token) {
    if (token >= output.m) return {0.0f, 0};
    const float scale = __ldcg(output.act_scales + token);
    if (kFormat == kInt8) return {scale, 0};
    const int32_t sum = __ldcg(output.act_sums + token);
    if (kFormat == kProgressive) return {scale, static_cast<uint32_t>(128 * sum)};
    return {scale, __float_as_uint(__fmul_rn(scale, __int2float_rn(sum)))};
}

// Of two channels, kDistance apart.
template <int kFormat>
struct ChannelScales {
    float scales[2], zeros[2], biases[2];

    template <int kDistance>
    DEVICE void load(const Output& output, int channel) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int c = min(channel + kDistance * h, output.n - 1);
            scales[h] = Float16::value(__ldg(output.s1_scales + c));
            if (kFormat == kPerChannel) zeros[h] = Float16::value(__ldg(output.s1_szeros + c));
            if (output.bias) biases[h] = Float16::value(__ldg(output.bias + c));
        }
    }
};

// Shared memory of a warpgroup: its tokens' scales, and pieces of the output, of kPiece tokens by 64 channels, on their
// way from fragments to whole rows.
template <int kTokens>
struct Staging {
    static constexpr int kPiece = kTokens < 32 ? kTokens : kTokens % 32 ? 16 : 32;
    static constexpr int kPieces = kTokens / kPiece;
    static constexpr int kRowBytes = 2 * kBlockChannels;
    static constexpr int kPieceBytes = kPiece * kRowBytes;
    static constexpr int kTokensAt = (kPieces > 1 ? 2 : 1) * kPieceBytes;
    static constexpr int kBytes = kTokensAt + kTokens * 8;
};

// Column `column` (of 16 bytes) of row `row` in a piece: rows are spread over the banks.
DEVICE uint32_t piece_address(uint32_t piece, int row, int column) {
    return piece + row * 128 + ((column ^ (row & 7)) << 4);
}

// Products in float32, each rounded, one rounding at the store, then the bias (formats/arithmetic.py).
template <int kFormat, class Format>
DEVICE float scaled(int32_t sum, const TokenScale& token, const ChannelScales<kFormat>& channel, int h, bool has_bias) {
    if (kFormat == kProgressive) sum -= static_cast<int32_t>(token.correction);
    float y = __fmul_rn(__int2float_rn(sum), __fmul_rn(token.scale, channel.scales[h]));
    if (kFormat == kPerChannel) y = __fsub_rn(y, __fmul_rn(__uint_as_float(token.correction), channel.zeros[h]));
    if (has_bias) y = __fadd_rn(Format::value(Format::bits(y)), Format::value(Format::bits(channel.biases[h])));
    return y;
}

// Called by the kGroupThreads threads of a warpgroup, which meet at `barrier`. tokens[i]: of token thread + i * 128.
template <int kFormat, class Format, int kTokens, bool kHasBias>
DEVICE void store_tile(const int32_t (&sums)[kTokens / 2], const Output& output,
                       const ChannelScales<kFormat>& channels, const TokenScale* tokens, int channel, int token,
                       uint32_t staging, int barrier) {
    using Area = Staging<kTokens>;
    const int thread = threadIdx.x % kGroupThreads, warp = thread / kWarpSize, lane = thread % kWarpSize;
    const uint32_t scales_at = staging + Area::kTokensAt;
#pragma unroll
    for (int i = 0; i < (kTokens + kGroupThreads - 1) / kGroupThreads; ++i) {
        const int which = thread + i * kGroupThreads;
        if (kTokens % kGroupThreads == 0 || which < kTokens)
            asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(scales_at + which * 8),
                         "r"(__float_as_uint(tokens[i].scale)), "r"(tokens[i].correction) : "memory");
    }
    meet(barrier, kGroupThreads);
    const int rows_left = output.m - token, columns_left = output.n - channel;
    uint16_t* const corner = static_cast<uint16_t*>(output.out) + static_cast<int64_t>(token) * output.n + channel;
#pragma unroll
    for (int piece = 0; piece < Area::kPieces; ++piece) {
        const uint32_t at = staging + piece % 2 * Area::kPieceBytes;
#pragma unroll
        for (int pair = 0; pair < (Area::kPiece + 15) / 16; ++pair) {    // of token groups: a 16 x 16 piece of a warp
            constexpr int kGroups = Area::kPiece < 16 ? 1 : 2;
            uint32_t words[2 * kGroups];
#pragma unroll
            for (int i = 0; i < kGroups; ++i) {
                const int j = (piece * Area::kPiece) / 8 + 2 * pair + i;
                const uint4 two = load_shared_16(scales_at + (8 * j + 2 * (lane & 3)) * 8);
                const TokenScale first{__uint_as_float(two.x), two.y}, second{__uint_as_float(two.z), two.w};
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float y0 = scaled<kFormat, Format>(sums[4 * j + 2 * h], first, channels, h, kHasBias);
                    const float y1 = scaled<kFormat, Format>(sums[4 * j + 2 * h + 1], second, channels, h, kHasBias);
                    words[2 * i + h] = Format::pair(y0, y1);
                }
            }
            // Matrix 2 i + h: token group i, channels 8 h .. of the warp's 16. Lanes 8 q .. say where its rows go.
            const int row = 16 * pair + (lane >> 4) * 8 + (lane & 7), column = 2 * warp + (lane >> 3 & 1);
            if (kGroups == 2)
                asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                                 piece_address(at, row, column)), "r"(words[0]), "r"(words[1]),
                             "r"(words[kGroups == 2 ? 2 : 0]), "r"(words[kGroups == 2 ? 3 : 1]) : "memory");
            else
                asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(
                                 piece_address(at, lane & 7, column)), "r"(words[0]), "r"(words[1]) : "memory");
        }
        meet(barrier, kGroupThreads);
        constexpr int kParts = (Area::kPiece * 8 + kGroupThreads - 1) / kGroupThreads;    // of 16 bytes, a thread
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
            const int part = i * kGroupThreads + thread, row = part >> 3, column = part & 7;
            const int in_tile = piece * Area::kPiece + row;
            if ((Area::kPiece >= 16 || row < Area::kPiece) && in_tile < rows_left && 8 * column < columns_left)
                *reinterpret_cast<uint4*>(corner + static_cast<int64_t>(in_tile) * output.n + 8 * column) =
                    load_shared_16(piece_address(at, row, column));
        }
    }
}

// The sums themselves, for verification.
template <int kFormat, int kTokens>
DEVICE void store_sums(const int32_t (&sums)[kTokens / 2], const Output& output, int channel, int token) {
    const int thread = threadIdx.x % kGroupThreads, warp = thread / kWarpSize, lane = thread % kWarpSize;
    const int first_channel = channel + 16 * warp + (lane >> 2), first_token = token + 2 * (lane & 3);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
        const int to = first_token + (i >> 2) * 8 + (i & 1), c = first_channel + (i >> 1 & 1) * 8;
        if (to >= output.m || c >= output.n) continue;
        const int32_t correction = kFormat == kProgressive ? 128 * __ldcg(output.act_sums + to) : 0;
        static_cast<int32_t*>(output.out)[static_cast<int64_t>(to) * output.n + c] = sums[i] - correction;
    }
}
