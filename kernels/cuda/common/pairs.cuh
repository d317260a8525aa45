// Rows of 16-bit values as vectors of four pairs, and arithmetic on pairs that rounds each result to their format.
#pragma once
#include "common/types.cuh"

constexpr int kVectorValues = 8, kPairs = kVectorValues / 2;
// Added to |x| < 2^22 it rounds half to even, and leaves the integer in the low bits of the sum.
constexpr float kRounder = 12582912.0f;

// Eight neighbouring values, the lower one of a pair in the low half.
struct Values {
    uint32_t pairs[kPairs];
};

DEVICE Values load_values(const uint16_t* x) {
    const uint4 v = *reinterpret_cast<const uint4*>(x);
    return {{v.x, v.y, v.z, v.w}};
}

DEVICE void store_values(uint16_t* x, const Values& v) {
    *reinterpret_cast<uint4*>(x) = make_uint4(v.pairs[0], v.pairs[1], v.pairs[2], v.pairs[3]);
}

template <class Format>
DEVICE uint32_t add(uint32_t a, uint32_t b) {
    return Format::pair(__fadd_rn(low_value<Format>(a), low_value<Format>(b)),
                        __fadd_rn(high_value<Format>(a), high_value<Format>(b)));
}

template <class Format>
DEVICE uint32_t multiply(uint32_t a, uint32_t b) {
    return Format::pair(__fmul_rn(low_value<Format>(a), low_value<Format>(b)),
                        __fmul_rn(high_value<Format>(a), high_value<Format>(b)));
}
