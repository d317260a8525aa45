// Keys and values of new tokens, quantized into the pages of the KV cache; with ROPE, queries and keys go through it
// first, and keys and values are also given back as the cache will give them. With ROTATE, keys (and with ROPE queries)
// are then rotated by a Hadamard matrix, before keys are quantized.
//
// HEAD_DIM / 8 lanes share a head of a token: a query, a key or a value. Heads lie one after the other in the order
// queries, keys, values of a token, then the next token. No byte of a page belongs to two tokens (common/kv_page.cuh),
// so bytes are written without reading, by many tokens at once.
//
// HEAD_DIM  64, 128          IN_FORMAT  0 float16, 1 bfloat16
// BITS      4, 8             ROPE       1: apply it, and write query_out, key_out, value_out; 0: keys have had it
//                            ROTATE     1: Hadamard rotation of keys and queries; 0: none
#include "common/hadamard.cuh"
#include "common/kv_page.cuh"
#include "common/kv_quantize.cuh"
#include "common/pairs.cuh"
#include "common/types.cuh"

using Format = FormatOf<IN_FORMAT>::Type;
using Page = KvPage<HEAD_DIM, BITS>;
constexpr int kThreads = 128;
constexpr int kLanes = HEAD_DIM / kVectorValues;
constexpr int kHalf = HEAD_DIM / 2;  // dimensions d and d + kHalf turn together
constexpr uint32_t kSigns = 0x80008000u;

// Eight neighbours of a float32 table, rounded to Format.
DEVICE Values load_rounded(const float* table) {
    const float4 a = reinterpret_cast<const float4*>(table)[0], b = reinterpret_cast<const float4*>(table)[1];
    return {{Format::pair(a.x, a.y), Format::pair(a.z, a.w), Format::pair(b.x, b.y), Format::pair(b.z, b.w)}};
}

// x * cos + rotate_half(x) * sin, every step rounded to Format, as transformers' apply_rotary_pos_emb.
DEVICE void apply_rope(Values& v, const Values& partner, const Values& cosines, const Values& sines,
                       bool is_lower_half) {
    const uint32_t sign = is_lower_half ? kSigns : 0u;
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
        v.pairs[i] = add<Format>(multiply<Format>(v.pairs[i], cosines.pairs[i]),
                                 multiply<Format>(partner.pairs[i] ^ sign, sines.pairs[i]));
}

// Codes of dimensions 8 * lane .. 8 * lane + 7 of the key of a token.
DEVICE void store_key_codes(uint8_t* page, int token, int lane, const uint32_t (&codes)[kVectorValues]) {
#pragma unroll
    for (int i = 0; i < kVectorValues; i += 4) {
        if (BITS == 4) {
            page[Page::key_byte(token, kVectorValues * lane + i)] = codes[i] | codes[i + 2] << 4;
            page[Page::key_byte(token, kVectorValues * lane + i + 1)] = codes[i + 1] | codes[i + 3] << 4;
        } else {
            *reinterpret_cast<uint32_t*>(page + Page::key_byte(token, kVectorValues * lane + i)) =
                codes[i] | codes[i + 2] << 8 | codes[i + 1] << 16 | codes[i + 3] << 24;
        }
    }
}

DEVICE void store_value_codes(uint8_t* page, int token, int lane, const uint32_t (&codes)[kVectorValues]) {
#pragma unroll
    for (int i = 0; i < kVectorValues; i += 2) {
        if (BITS == 4) {
            page[Page::value_byte(token, kVectorValues * lane + i)] = codes[i] | codes[i + 1] << 4;
        } else {
            page[Page::value_byte(token, kVectorValues * lane + i)] = codes[i];
            page[Page::value_byte(token, kVectorValues * lane + i + 1)] = codes[i + 1];
        }
    }
}

// query [tokens, num_heads, HEAD_DIM], key and value [tokens, num_kv_heads, HEAD_DIM], strides of tokens in values (all
// heads begin at multiples of 16 bytes); cosines and sines [max_positions, HEAD_DIM / 2]; positions and slots [tokens];
// pages [num_pages, num_kv_heads, Page::kBytes]. tokens >= 1. Without ROPE, num_heads is 0 and what belongs to queries
// and outputs is not there.
//
// A token goes to token slot % 64 of page slot / 64; one with a negative slot goes nowhere. A slot beyond the pages
// stops the kernel. A position outside the tables makes query and key NaN.
extern "C" __global__ void __launch_bounds__(kThreads)
    qoq_kv_append_sm80(const uint16_t* __restrict__ query, const uint16_t* __restrict__ key,
                       const uint16_t* __restrict__ value, const float* __restrict__ cosines,
                       const float* __restrict__ sines, const int32_t* __restrict__ positions,
                       const int64_t* __restrict__ slots, uint8_t* __restrict__ pages, uint16_t* __restrict__ query_out,
                       uint16_t* __restrict__ key_out, uint16_t* __restrict__ value_out, int tokens, int num_heads,
                       int num_kv_heads, int query_stride, int key_stride, int value_stride, int max_positions,
                       int num_pages) {
    const int heads = num_heads + 2 * num_kv_heads;
    const int index = static_cast<int>(blockIdx.x) * (kThreads / kLanes) + static_cast<int>(threadIdx.x / kLanes);
    const int lane = static_cast<int>(threadIdx.x % kLanes);
    const bool exists = index < tokens * heads;  // if not, lanes repeat the first head: shuffles need the whole warp
    const int token = exists ? index / heads : 0;
    int head = exists ? index - token * heads : 0;

    const bool is_query = ROPE && head < num_heads;
    const uint16_t* row;
    uint16_t* row_out = nullptr;
    if (is_query) {
        row = query + int64_t(token) * query_stride;
        row_out = query_out + int64_t(token) * num_heads * HEAD_DIM;
    } else {
        head -= num_heads;
    }
    const bool is_key = !is_query && head < num_kv_heads;
    if (is_key) {
        row = key + int64_t(token) * key_stride;
        if (ROPE) row_out = key_out + int64_t(token) * num_kv_heads * HEAD_DIM;
    } else if (!is_query) {
        head -= num_kv_heads;
        row = value + int64_t(token) * value_stride;
        if (ROPE) row_out = value_out + int64_t(token) * num_kv_heads * HEAD_DIM;
    }
    const int column = head * HEAD_DIM + lane * kVectorValues;
    Values v = load_values(row + column);

    if (ROPE) {
        Values partner;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) partner.pairs[i] = __shfl_xor_sync(kFullMask, v.pairs[i], kLanes / 2);
        if (is_query || is_key) {
            const int position = positions[token];
            const float nan = __int_as_float(0x7FC00000);
            Values cos, sin;
            if (position >= 0 && position < max_positions) {
                const int64_t place = int64_t(position) * kHalf + lane % (kLanes / 2) * kVectorValues;
                cos = load_rounded(cosines + place);
                sin = load_rounded(sines + place);
            } else {
#pragma unroll
                for (int i = 0; i < kPairs; ++i) cos.pairs[i] = sin.pairs[i] = Format::pair(nan, nan);
            }
            apply_rope(v, partner, cos, sin, lane < kLanes / 2);
        }
    }
    if (ROTATE) {
        const Values rotated = rotated_head<Format, kLanes>(v);  // of values too: shuffles need the whole warp
        if (is_query || is_key) v = rotated;
    }

    float low, high;
    range_of_head<Format, kLanes>(v, low, high);
    if (!exists) return;

    if (!is_query) {
        const HeadGrid<BITS> grid(low, high);
        uint32_t codes[kVectorValues];
        round_trip<Format>(grid, v, codes);
        const int64_t slot = slots[token];
        if (slot >= int64_t(num_pages) * kPageTokens) __trap();
        if (slot >= 0) {
            const int place = static_cast<int>(slot & (kPageTokens - 1));
            uint8_t* page = pages + (slot / kPageTokens * num_kv_heads + head) * Page::kBytes;
            if (is_key)
                store_key_codes(page, place, lane, codes);
            else
                store_value_codes(page, place, lane, codes);
            if (lane == 0) {
                uint32_t* entry = reinterpret_cast<uint32_t*>(page + Page::entry(place));
                entry[is_key ? 0 : 1] = grid.scale_bits | static_cast<uint32_t>(grid.zero_bits) << 16;
            }
        }
    }
    if (ROPE) store_values(row_out + column, v);
}
