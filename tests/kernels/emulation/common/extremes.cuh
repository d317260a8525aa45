// In place of kernels/cuda/common/extremes.cuh.
#pragma once
#include "common/types.cuh"

template <class Format>
struct Extremes {
    static DEVICE uint32_t least(uint32_t a, uint32_t b) {
        return Format::pair(least(low_value<Format>(a), low_value<Format>(b)),
                            least(high_value<Format>(a), high_value<Format>(b)));
    }
    static DEVICE uint32_t most(uint32_t a, uint32_t b) {
        return Format::pair(-least(-low_value<Format>(a), -low_value<Format>(b)),
                            -least(-high_value<Format>(a), -high_value<Format>(b)));
    }

private:
    // A NaN wins, and -0 is below 0.
    static DEVICE float least(float a, float b) {
        if (a != a || b != b) return __int_as_float(0x7FC00000);
        if (a == b) return __uint_as_float(__float_as_uint(a) | __float_as_uint(b));
        return a < b ? a : b;
    }
};
