// Keys and values of new tokens, quantized into the pages of the KV cache; with ROPE, queries and keys go through it
// first, and keys and values are also given back as the cache will give them. With ROTATE, keys (and with ROPE queries)
// are then rotated by a Hadamard matrix, before keys are quantized.
//
// HEAD_DIM / 8 lanes share a head of a token: a query, a key or a value, in this order. A warp has the heads that its
// lanes have room for, ROUNDS times, of one token. No byte of a page belongs to two tokens (common/kv_page.cuh), so
// bytes are written without reading, by many tokens at once.
//
// HEAD_DIM  64, 128          IN_FORMAT  0 float16, 1 bfloat16
// BITS      4, 8             ROPE       1: apply it, and write query_out, key_out, value_out; 0: keys have had it
// ROUNDS    1, 4             ROTATE     1: Hadamard rotation of keys and queries; 0: none
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
constexpr int kHeadsOfWarp = kWarpSize / kLanes;
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
// and outputs is not there; with it, key_out and value_out are null where nobody wants them.
//
// A token goes to token slot % 64 of page slot / 64; one with a negative slot goes nowhere. A slot beyond the pages
// stops the kernel. A position outside the tables makes query and key NaN. `settled`: positions and slots were written
// before the last kernel that waited for no other; then they are read, and the tables after them, while it still runs.
extern "C" __global__ void __launch_bounds__(kThreads)
    qoq_kv_append_sm80(const uint16_t* query, const uint16_t* key, const uint16_t* value, const float* cosines,
                       const float* sines, const int32_t* positions, const int64_t* slots, uint8_t* __restrict__ pages,
                       uint16_t* __restrict__ query_out, uint16_t* __restrict__ key_out,
                       uint16_t* __restrict__ value_out, int tokens, int num_heads, int num_kv_heads, int query_stride,
                       int key_stride, int value_stride, int max_positions, int num_pages, int settled) {
    allow_next_kernel();
    const int heads = num_heads + 2 * num_kv_heads;
    const int warps_of_token = (heads + kHeadsOfWarp * ROUNDS - 1) / (kHeadsOfWarp * ROUNDS);
    const int warp = static_cast<int>(blockIdx.x) * (kThreads / kWarpSize) + static_cast<int>(threadIdx.x / kWarpSize);
    const int lane = static_cast<int>(threadIdx.x % kLanes);
    const int token = min(warp / warps_of_token, tokens - 1);
    // Of the warp's first lanes; those of the next lanes follow, and those of the next round follow them.
    const int first_head = (warp - token * warps_of_token) * kHeadsOfWarp * ROUNDS;
    const int lanes_head = first_head + static_cast<int>(threadIdx.x % kWarpSize / kLanes);

    const uint16_t* rows[ROUNDS];
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        const int head = lanes_head + i * kHeadsOfWarp, of_keys = head - num_heads, of_values = of_keys - num_kv_heads;
        const uint16_t* const row = of_keys < 0     ? query + int64_t(token) * query_stride + head * HEAD_DIM
                                    : of_values < 0 ? key + int64_t(token) * key_stride + of_keys * HEAD_DIM
                                                    : value + int64_t(token) * value_stride + of_values * HEAD_DIM;
        rows[i] = kept(row + lane * kVectorValues);
    }
    const int table_column = lane % (kLanes / 2) * kVectorValues;
    const bool any_turns = ROPE && first_head < num_heads + num_kv_heads;
    positions = kept(positions + token);
    slots = kept(slots + token);
    cosines = kept(cosines + table_column);
    sines = kept(sines + table_column);
    if (!settled) wait_for_last_kernel();
    const int position = load_number(positions, any_turns);
    const int64_t slot = load_number(slots, true);
    const bool valid = any_turns && position >= 0 && position < max_positions;
    const Values cos = load_rounded(cosines + int64_t(position) * kHalf, valid);
    const Values sin = load_rounded(sines + int64_t(position) * kHalf, valid);
    if (settled) wait_for_last_kernel();
    if (first_head >= heads) return;  // past the last token

    Values held[ROUNDS];
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) held[i] = load_values_once(rows[i], lanes_head + i * kHeadsOfWarp < heads);
    if (slot >= int64_t(num_pages) * kPageTokens) __trap();
    const int place = static_cast<int>(slot & (kPageTokens - 1));
    uint8_t* const token_pages = pages + slot / kPageTokens * num_kv_heads * Page::kBytes;

#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        Values& v = held[i];
        const int round_head = first_head + i * kHeadsOfWarp, head = lanes_head + i * kHeadsOfWarp;
        if (ROUNDS > 1 && round_head >= heads) break;  // the whole warp, which shuffles need
        const bool exists = head < heads, is_query = head < num_heads;
        const bool is_key = !is_query && head < num_heads + num_kv_heads, turns = is_query || is_key;
        if (ROPE && round_head < num_heads + num_kv_heads) {
            Values partner;
#pragma unroll
            for (int j = 0; j < kPairs; ++j) partner.pairs[j] = __shfl_xor_sync(kFullMask, v.pairs[j], kLanes / 2);
            if (turns) apply_rope(v, partner, cos, sin, lane < kLanes / 2);
        }
        if (ROTATE) {
            const Values rotated = rotated_head<Format, kLanes>(v);  // of values too: shuffles need the whole warp
            if (turns) v = rotated;
        }
        if (round_head + kHeadsOfWarp > num_heads) {  // else there are queries alone
            float low, high;
            range_of_head<Format, kLanes>(v, low, high);
            if (exists && !is_query) {
                const HeadGrid<BITS> grid(low, high);
                uint32_t codes[kVectorValues];
                round_trip<Format>(grid, v, codes);
                if (slot >= 0) {
                    const int kv_head = head - num_heads - (is_key ? 0 : num_kv_heads);
                    uint8_t* const page = token_pages + kv_head * Page::kBytes;
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
        }
        if (!ROPE || !exists) continue;
        uint16_t* const out = is_query ? query_out : is_key ? key_out : value_out;
        const int kind_heads = is_query ? num_heads : num_kv_heads;
        const int head_of_kind = head - (is_query ? 0 : is_key ? num_heads : num_heads + num_kv_heads);
        if (out != nullptr)
            store_values(out + (int64_t(token) * kind_heads + head_of_kind) * HEAD_DIM + lane * kVectorValues, v);
    }
}
