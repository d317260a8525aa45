// Where a page of the KV cache keeps the keys and values of one KV head: the device side of kernels/layouts.py, which
// describes the order and its reasons. All offsets are in bytes from the start of the page, a multiple of 16.
#pragma once
#include "common/types.cuh"

constexpr int kPageTokens = 64;
constexpr int kBlockTokens = 32;  // of a sub-block: half a page
constexpr int kTileTokens = 16;   // of an mma tile: half a sub-block

template <int kHeadDim, int kBits>
struct KvPage {
    static_assert(kHeadDim == 64 || kHeadDim == 128, "head_dim must be 64 or 128");
    static_assert(kBits == 4 || kBits == 8, "bits must be 4 or 8");

    // A sub-block: codes of its keys, codes of its values, scales and zeros.
    static constexpr int kCodeBytes = kBlockTokens * kHeadDim * kBits / 8;
    static constexpr int kValues = kCodeBytes;
    static constexpr int kEntries = 2 * kCodeBytes;
    // An entry: {key scale, key zero, value scale, value zero} of a token, then of token + 8.
    static constexpr int kEntryBytes = 16;
    static constexpr int kTokenEntryBytes = kEntryBytes / 2;
    static constexpr int kBlockBytes = kEntries + kTileTokens * kEntryBytes;
    static constexpr int kBytes = kPageTokens / kBlockTokens * kBlockBytes;

    // Codes come in chunks: 16 bytes for each lane = 4 g + t of a warp. A word (4 bits) or a pair of words (8 bits)
    // is one A operand of mma.m16n8k16, so a lane's piece of a chunk holds kStepsOfChunk of them.
    static constexpr int kPieceBytes = 16;
    static constexpr int kChunkBytes = kWarpSize * kPieceBytes;
    static constexpr int kStepsOfChunk = kBits == 4 ? 4 : 2;
    static constexpr int kSteps = kHeadDim / 16;
    static constexpr int kChunksOfTile = kSteps / kStepsOfChunk;
    static constexpr int kDimsOfGroup = kHeadDim / 8;  // value dimensions that lanes 4 g .. 4 g + 3 own

    static DEVICE constexpr int block_offset(int token) { return token / kBlockTokens * kBlockBytes; }
    static DEVICE constexpr int tile(int token) { return token % kBlockTokens / kTileTokens; }

    // The word that holds A operand `step` of lane 4 g + t of a tile; with 8 bits the first of two.
    static DEVICE constexpr int word_offset(int tile, int step, int g, int t) {
        return (tile * kChunksOfTile + step / kStepsOfChunk) * kChunkBytes + (4 * g + t) * kPieceBytes +
               step % kStepsOfChunk * (kPieceBytes / kStepsOfChunk);
    }

    // The byte with the code of dimension `dim` of the key of a token (0 .. 63). With 4 bits it holds dimensions d and
    // d + 2, for d % 4 < 2: that of d % 4 < 2 in its low half.
    static DEVICE constexpr int key_byte(int token, int dim) {
        const int g = token % 8, half = token / 8 % 2, t = dim / 8 % 4, step = dim / 32 * 2 + dim / 4 % 2;
        const int in_word = kBits == 4 ? 2 * (dim % 2) + half : 4 * half + 2 * (dim % 2) + dim / 2 % 2;
        return block_offset(token) + word_offset(tile(token), step, g, t) + in_word;
    }

    // The same of its value. With 4 bits a byte holds dimensions d and d + 1, for even d: d in its low half.
    static DEVICE constexpr int value_byte(int token, int dim) {
        const int half = token / 8 % 2, t = token / 2 % 4, g = dim / kDimsOfGroup, step = dim % kDimsOfGroup / 2;
        const int in_word = 2 * (token % 2) + half + (kBits == 4 ? 0 : 4 * (dim % 2));
        return block_offset(token) + kValues + word_offset(tile(token), step, g, t) + in_word;
    }

    // The four float16 numbers of a token: key scale, key zero, value scale, value zero. A multiple of 8.
    static DEVICE constexpr int entry(int token) {
        return block_offset(token) + kEntries + (tile(token) * 8 + token % 8) * kEntryBytes +
               token / 8 % 2 * kTokenEntryBytes;
    }
};
