// Weights as the tensor cores take them: 32 channels by 32 inputs are two A fragments of mma.m16n8k32.
//
// 4-bit weights come in the checkpoint's order (formats/packing.py): the 16 bytes of a lane in a 32 x 32 tile are the
// four registers of two fragments, channels 0-15 in the low nibbles and 16-31 in the high ones. 8-bit weights are
// row-major and come through ldmatrix.
#pragma once
#include "common/async_copy.cuh"
#include "common/mma.cuh"
#include "common/types.cuh"

constexpr int kProgressive = 0, kPerChannel = 1, kInt8 = 2;
constexpr uint32_t kNibbles = 0x0F0F0F0Fu;

constexpr int kStripe = 32;     // channels of a packed tile
constexpr int kGroup = 128;     // inputs of a scale group
constexpr int kTile = 32;       // inputs of one mma
constexpr int kTilesPerGroup = kGroup / kTile;

// A row of 128 bytes is eight 16-byte chunks. The exclusive or spreads a column of chunks in eight rows over all banks,
// and also four neighbouring chunks in two rows.
DEVICE int swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 1) << 2 ^ (row >> 1 & 3)) << 4); }

// Fragments of one stripe as loaded: nibbles of a packed tile, or int8 as it is.
template <int kFormat>
struct RawTile {
    uint32_t words[kFormat == kInt8 ? 8 : 4];
};

// The weights of a warp, kStripes stripes wide, in stages of kGroups scale groups for a block of kBlockN channels.
template <int kFormat, int kStripes, int kGroups, int kBlockN>
struct Weights {
    static constexpr int kBytesPerChannel = (kFormat == kInt8 ? 128 : 64) * kGroups;
    static constexpr bool kHasScales = kFormat == kProgressive;

    uint32_t scale[kHasScales ? kStripes : 1][4], shift[kHasScales ? kStripes : 1][4];    // of channels g + 8 b

    // Where a lane's weights of the stripe at `channel` are in a stage, for the first 32 inputs.
    static DEVICE int lane_offset(int channel, int lane) {
        return kFormat == kInt8 ? swizzled(channel + (lane & 15), lane >> 4) : channel * kBytesPerChannel + lane * 16;
    }

    // at: shared address of the stage plus lane_offset; tile: 32 inputs each, counted from the stage's first.
    static DEVICE void load(RawTile<kFormat>& raw, uint32_t at, int tile) {
        if (kFormat == kInt8) {
            // Addresses of rows are multiples of 128, so that the swizzle of another column is an exclusive or.
            at = (at ^ (tile % kTilesPerGroup * 32)) + tile / kTilesPerGroup * (kBlockN * 128);
            uint32_t r[4];
            load_matrices_4(r, at);
#pragma unroll
            for (int i = 0; i < 4; ++i) raw.words[i] = r[i];
            load_matrices_4(r, at + 16 * 128);
#pragma unroll
            for (int i = 0; i < 4; ++i) raw.words[kFormat == kInt8 ? 4 + i : i] = r[i];
        } else {
            const uint4 v = load_shared_16(at + tile * 512);
            raw.words[0] = v.x, raw.words[1] = v.y, raw.words[2] = v.z, raw.words[3] = v.w;
        }
    }

    // Of the group that begins; begin_group must follow before the next decode. scales, zeros: shared addresses of the
    // bytes of the warp's first channel. Byte by byte: what widens a byte is not needed then.
    DEVICE void load_scales(uint32_t scales, uint32_t zeros, int lane) {
        if (!kHasScales) return;
#pragma unroll
        for (int s = 0; s < kStripes; ++s)
#pragma unroll
            for (int b = 0; b < 4; ++b) {
                scale[s][b] = load_shared_1(scales + s * kStripe + (lane >> 2) * 4 + b);
                shift[s][b] = load_shared_1(zeros + s * kStripe + (lane >> 2) * 4 + b);
            }
    }

    // code * s2 - offset, kept non-negative by adding 128: (code * s2) + (128 - offset) in each byte of one 32-bit
    // multiply-add. code * s2 <= 240 never carries, and neither does the sum, since code * s2 - offset is in int8
    // (QServe, section 5.2.3, subtracts after the multiplication likewise). The 128 is taken back in the epilogue.
    DEVICE void begin_group() {
        if (!kHasScales) return;
        // The stored byte is minus the offset, mod 256: 256 - offset, but 0 where the offset is 0.
#pragma unroll
        for (int s = 0; s < kStripes; ++s)
#pragma unroll
            for (int b = 0; b < 4; ++b) shift[s][b] = min(shift[s][b] - 1, 255u) * 0x01010101u + 0x80808081u;
    }

    // Register i of the A fragments of channels 0-15 and 16-31 of stripe s.
    DEVICE void decode(const RawTile<kFormat>& raw, int s, int i, uint32_t& low, uint32_t& high) const {
        if (kFormat == kInt8) {
            low = raw.words[i], high = raw.words[kFormat == kInt8 ? 4 + i : i];
            return;
        }
        low = raw.words[i] & kNibbles, high = (raw.words[i] >> 4) & kNibbles;
        if (kHasScales) {
            low = low * scale[s][i & 1] + shift[s][i & 1];
            high = high * scale[s][2 + (i & 1)] + shift[s][2 + (i & 1)];
        }
    }

    static DEVICE void multiply(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        if (kFormat == kInt8)
            mma_s8_s8(c, a, b0, b1);
        else
            mma_u8_s8(c, a, b0, b1);
    }
};
