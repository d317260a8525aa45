// From packed weights in shared memory to the A operand of wgmma, or of mma.sync, whose fragments are the same.
//
// A block of weights is 64 channels by 128 inputs, four units of 16 channels in the order of kernels/tiles.py: a lane
// takes its codes by 16 bytes, and every word holds the fragments of the same register for two steps of 32 inputs, one in
// the low and one in the high halves of its bytes.
#pragma once
#include "common/mma.cuh"
#include "common/types.cuh"

constexpr int kProgressive = 0, kPerChannel = 1, kInt8 = 2;
constexpr int kUnitChannels = 16, kBlockChannels = 64, kBlockInputs = 128;

// Bytes of a unit of 4-bit weights: its codes and, for progressive weights, a scale and a zero for each channel.
template <int kFormat>
constexpr int kUnitBytes = kFormat == kProgressive ? 1024 + 32 : 1024;

template <int kFormat>
constexpr int kBlockBytes = kFormat == kInt8 ? 8192 : kBlockChannels / kUnitChannels * kUnitBytes<kFormat>;

DEVICE uint32_t load_shared_4(uint32_t at) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
    return v;
}

// What a lane reads of a unit: codes of its two channels, g and g + 8, and their scales and zeros.
struct RawWeights {
    uint4 codes[2];     // inputs 0-63, 64-127
    uint32_t scales;    // bytes: s2 and zero of channel g, s2 and zero of channel g + 8

    template <int kFormat>
    DEVICE void load(uint32_t unit, int lane) {
        if (kFormat == kProgressive) scales = load_shared_4(unit + 1024 + (lane >> 2) * 4);
        codes[0] = load_shared_16(unit + lane * 16);
        codes[1] = load_shared_16(unit + 512 + lane * 16);
    }
};

// Level-1 weights plus 128, four in a word: each byte of code * s2 + (128 - zero) is within 0 .. 255 by what is legal on
// disk, so that the sum of the whole words is exact byte by byte, whatever a byte would borrow on the way.
struct ByteScale {
    uint32_t scale, offset;
    DEVICE explicit ByteScale(uint32_t pair)
        : scale(pair & 0xFF), offset((pair >> 8 & 0xFF) * 0xFEFEFEFFu + 0x80808080u) {}
    DEVICE uint32_t operator()(uint32_t codes) const { return codes * scale + offset; }
};

// a[4 * step + register]: the fragments of four steps of 32 inputs.
template <int kFormat>
DEVICE void decode(uint32_t (&a)[16], const RawWeights& raw) {
    constexpr uint32_t kLow = 0x0F0F0F0Fu;
    const ByteScale first(raw.scales & 0xFFFF), second(raw.scales >> 16);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint32_t words[4] = {raw.codes[half].x, raw.codes[half].y, raw.codes[half].z, raw.codes[half].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t low = words[i] & kLow, high = words[i] >> 4 & kLow;
            const ByteScale& channel = i & 1 ? second : first;
            a[8 * half + i] = kFormat == kProgressive ? channel(low) : low;
            a[8 * half + 4 + i] = kFormat == kProgressive ? channel(high) : high;
        }
    }
}
