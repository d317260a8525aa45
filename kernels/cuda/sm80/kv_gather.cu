// Pages of the KV cache, decoded into contiguous keys and values: (code - zero) * scale in float32, rounded once.
//
// A block decodes a page of one head. Threads read pieces of 16 bytes (common/kv_page.cuh). A piece of keys has 8
// neighbouring dimensions of two tokens, with 4 bits twice; a piece of values has 8 (4 bits) or 4 (8 bits) neighbouring
// dimensions of four tokens. Each vector is one store, and the stores of a warp fill whole sectors of 32 bytes.
//
// HEAD_DIM  64, 128          OUT_FORMAT  0 float16, 1 bfloat16
// BITS      4, 8
#include "common/kv_page.cuh"
#include "common/types.cuh"

using Format = FormatOf<OUT_FORMAT>::Type;
using Page = KvPage<HEAD_DIM, BITS>;
constexpr int kThreads = 128;
constexpr int kChunks = Page::kChunksOfTile;
constexpr int kBlocks = kPageTokens / kBlockTokens, kTiles = kBlockTokens / kTileTokens;
constexpr int kPieces = kBlocks * kTiles * kChunks * kWarpSize / kThreads;  // of keys, or of values, a thread
constexpr uint32_t kMask = (1 << BITS) - 1;
static_assert(kPieces == kChunks, "");

// Scale and zero of a token, from two float16 numbers.
struct Grid {
    float scale, zero;

    DEVICE explicit Grid(uint32_t pair) : scale(low_value<Float16>(pair)), zero(high_value<Float16>(pair)) {}

    // The code lies from bit `shift` on.
    DEVICE float decode(uint32_t word, int shift) const {
        const float two_23 = 8388608.0f;  // with a code in its low bits it is larger by the code
        const float code = __fsub_rn(__uint_as_float(__float_as_uint(two_23) | (word >> shift & kMask)), two_23);
        return __fmul_rn(__fsub_rn(code, zero), scale);
    }
};

// Where a piece of 16 bytes lies, and what it holds.
struct Piece {
    int block, tile, chunk, g, t;

    DEVICE int offset() const {
        return block * Page::kBlockBytes + Page::word_offset(tile, chunk * Page::kStepsOfChunk, g, t);
    }
    DEVICE int token(int in_tile) const { return block * kBlockTokens + tile * kTileTokens + in_tile; }
};

// In the order of addresses: four lanes of a store write 64 bytes.
DEVICE Piece key_piece(int n) {
    return {n / (kWarpSize * kChunks * kTiles), n / (kWarpSize * kChunks) % kTiles, n / kWarpSize % kChunks,
            n / 4 % 8, n % 4};
}

// The chunks of two neighbouring g first, whose dimensions are neighbours: 32 or 64 bytes of a row.
DEVICE Piece value_piece(int n) {
    return {n / (kWarpSize * kChunks * kTiles), n / (kWarpSize * kChunks) % kTiles, n % kChunks,
            n / (8 * kChunks) % 4 * 2 + n / kChunks % 2, n / (2 * kChunks) % 4};
}

DEVICE void store(uint16_t* to, const uint32_t (&pairs)[4]) {
    *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

DEVICE void store(uint16_t* to, const uint32_t (&pairs)[2]) {
    *reinterpret_cast<uint2*>(to) = make_uint2(pairs[0], pairs[1]);
}

// `key` points at the head in the row of the page's first token; rows are `stride` apart.
DEVICE void store_keys(const Piece& piece, const uint4& bytes, const uint4& entry, uint16_t* key, int64_t stride) {
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
    constexpr int kVectors = BITS == 4 ? 2 : 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Grid grid(half ? entry.z : entry.x);
        uint16_t* row = key + piece.token(piece.g + 8 * half) * stride;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            uint32_t pairs[4];
#pragma unroll
            for (int q = 0; q < 2; ++q) {
                const uint32_t word = BITS == 4 ? words[2 * i + q] >> 8 * half : words[2 * q + half];
                pairs[2 * q] = Format::pair(grid.decode(word, 0), grid.decode(word, 16));
                pairs[2 * q + 1] = Format::pair(grid.decode(word, BITS), grid.decode(word, 16 + BITS));
            }
            const int dim = (piece.chunk * kVectors + i) * 32 + piece.t * 8;
            store(row + dim, pairs);
        }
    }
}

// `entries` are those of tokens 2 t and 2 t + 1 of the tile.
DEVICE void store_values(const Piece& piece, const uint4& bytes, const uint4 (&entries)[2], uint16_t* value,
                         int64_t stride) {
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
    constexpr int kDims = BITS == 4 ? 8 : 4;
    const int dim = piece.g * Page::kDimsOfGroup + piece.chunk * kDims;
#pragma unroll
    for (int parity = 0; parity < 2; ++parity)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Grid grid(half ? entries[parity].w : entries[parity].y);
            const int shift = 8 * (2 * parity + half);
            uint32_t pairs[kDims / 2];
#pragma unroll
            for (int i = 0; i < kDims / 2; ++i)
                pairs[i] = BITS == 4
                               ? Format::pair(grid.decode(words[i], shift), grid.decode(words[i], shift + 4))
                               : Format::pair(grid.decode(words[2 * i], shift), grid.decode(words[2 * i + 1], shift));
            uint16_t* row = value + piece.token(2 * piece.t + parity + 8 * half) * stride + dim;
            store(row, pairs);
        }
}

// pages [num_pages, num_kv_heads, Page::kBytes]; page_ids, one for each num_kv_heads blocks; key and value
// [64 * page_ids, num_kv_heads, HEAD_DIM]. A page that does not exist stops the kernel.
extern "C" __global__ void __launch_bounds__(kThreads)
    qoq_kv_gather_sm80(const uint8_t* __restrict__ pages, const int32_t* __restrict__ page_ids,
                       uint16_t* __restrict__ key, uint16_t* __restrict__ value, int num_kv_heads, int num_pages) {
    const int index = static_cast<int>(blockIdx.x) / num_kv_heads;
    const int head = static_cast<int>(blockIdx.x) - index * num_kv_heads;
    const int id = page_ids[index];
    if (id < 0 || id >= num_pages) __trap();
    const uint8_t* page = pages + (int64_t(id) * num_kv_heads + head) * Page::kBytes;
    const auto load = [&](int offset) { return *reinterpret_cast<const uint4*>(page + offset); };
    const int thread = static_cast<int>(threadIdx.x);

    uint4 keys[kPieces], values[kPieces], key_entries[kPieces], value_entries[kPieces][2];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        const Piece of_keys = key_piece(thread + i * kThreads), of_values = value_piece(thread + i * kThreads);
        keys[i] = load(of_keys.offset());
        values[i] = load(Page::kValues + of_values.offset());
        key_entries[i] = load(Page::entry(of_keys.token(of_keys.g)));
#pragma unroll
        for (int parity = 0; parity < 2; ++parity)
            value_entries[i][parity] = load(Page::entry(of_values.token(2 * of_values.t + parity)));
    }
    const int64_t stride = int64_t(num_kv_heads) * HEAD_DIM;
    const int64_t first = int64_t(index) * kPageTokens * stride + head * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        store_keys(key_piece(thread + i * kThreads), keys[i], key_entries[i], key + first, stride);
        store_values(value_piece(thread + i * kThreads), values[i], value_entries[i], value + first, stride);
    }
}
