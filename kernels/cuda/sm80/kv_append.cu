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
#include "common/dependent_launch.cuh"
#include "common/global_memory.cuh"
#include "common/hadamard.cuh"
#include "common/kv_page.cuh"
#include "common/kv_quantize.cuh"
#include "common/packed.cuh"
#include "common/pairs.cuh"
#include "common/types.cuh"

using Format = FormatOf<IN_FORMAT>::Type;
using Pair = Packed<Format>;
using Page = KvPage<HEAD_DIM, BITS>;
constexpr int kThreads = 128;
constexpr int kLanes = HEAD_DIM / kVectorValues;
constexpr int kHalf = HEAD_DIM / 2;  // dimensions d and d + kHalf turn together
constexpr uint32_t kSigns = 0x80008000u;

DEVICE uint32_t rounded(uint32_t low, uint32_t high) {
    return Format::pair(__uint_as_float(low), __uint_as_float(high));
}

// Eight neighbours of a float32 table, rounded to Format; NaN where there are none.
DEVICE Values load_rounded(const float* table, bool valid) {
    const uint4 a = load_16(table, valid), b = load_16(table + 4, valid);
    const uint32_t nan = valid ? 0u : 0x7FC07FC0u;  // of either format
    return {{nan | rounded(a.x, a.y), nan | rounded(a.z, a.w), nan | rounded(b.x, b.y), nan | rounded(b.z, b.w)}};
}

// x * cos + rotate_half(x) * sin, every step rounded to Format, as transformers' apply_rotary_pos_emb.
DEVICE void apply_rope(Values& v, const Values& partner, const Values& cosines, const Values& sines,
                       bool is_lower_half) {
    const uint32_t sign = is_lower_half ? kSigns : 0u;
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
        v.pairs[i] = Pair::sum(Pair::product(v.pairs[i], cosines.pairs[i]),
                               Pair::product(partner.pairs[i] ^ sign, sines.pairs[i]));
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
    qoq_kv_append_sm80(const uint16_t* query, const uint16_t* key, const uint16_t* value, const float* cosines,
                       const float* sines, const int32_t* positions, const int64_t* slots, uint8_t* __restrict__ pages,
                       uint16_t* __restrict__ query_out, uint16_t* __restrict__ key_out,
                       uint16_t* __restrict__ value_out, int tokens, int num_heads, int num_kv_heads, int query_stride,
                       int key_stride, int value_stride, int max_positions, int num_pages) {
    allow_next_kernel();
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
    row = kept(row + column);
    row_out = kept(row_out + column);
    const int table_column = lane % (kLanes / 2) * kVectorValues;
    const bool turns = is_query || is_key;
    positions = kept(positions + token);
    slots = kept(slots + token);
    cosines = kept(cosines + table_column);
    sines = kept(sines + table_column);
    if (ROPE && turns) {
        const int position = load_hint(positions);
        if (position >= 0 && position < max_positions) {
            prefetch(cosines + int64_t(position) * kHalf);
            prefetch(sines + int64_t(position) * kHalf);
        }
    }
    wait_for_last_kernel();
    const int position = load_number(positions, ROPE && turns);
    Values v = load_values_once(row, true);
    const int64_t slot = load_number(slots, !is_query);

    if (ROPE) {
        Values partner;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) partner.pairs[i] = __shfl_xor_sync(kFullMask, v.pairs[i], kLanes / 2);
        if (turns) {
            const bool valid = position >= 0 && position < max_positions;
            const Values cos = load_rounded(cosines + int64_t(position) * kHalf, valid);
            const Values sin = load_rounded(sines + int64_t(position) * kHalf, valid);
            apply_rope(v, partner, cos, sin, lane < kLanes / 2);
        }
    }
    if (ROTATE) {
        const Values rotated = rotated_head<Format, kLanes>(v);  // of values too: shuffles need the whole warp
        if (turns) v = rotated;
    }

    float low, high;
    range_of_head<Format, kLanes>(v, low, high);
    if (!exists) return;

    if (!is_query) {
        const HeadGrid<BITS> grid(low, high);
        uint32_t codes[kVectorValues];
        round_trip<Format>(grid, v, codes);
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
    if (ROPE) store_values(row_out, v);
}
