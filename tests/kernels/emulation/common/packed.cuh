// In place of kernels/cuda/common/packed.cuh.
#pragma once
#include "common/types.cuh"

template <class Format>
struct Packed {
    static DEVICE uint32_t sum(uint32_t a, uint32_t b) {
        return Format::pair(low_value<Format>(a) + low_value<Format>(b), high_value<Format>(a) + high_value<Format>(b));
    }
    static DEVICE uint32_t product(uint32_t a, uint32_t b) {
        return Format::pair(low_value<Format>(a) * low_value<Format>(b), high_value<Format>(a) * high_value<Format>(b));
    }
    static DEVICE uint32_t magnitude(uint32_t x) { return x & 0x7FFF7FFFu; }
};
