// Rows of 16-bit values as vectors of four pairs.
#pragma once
#include "common/global_memory.cuh"
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

// In place, and gone from the L1 afterwards: of what an earlier kernel wrote, and of what is read once. Zeros where not
// `valid`.
DEVICE Values load_values_once(const uint16_t* x, bool valid) {
    const uint4 v = load_16_once(x, valid);
    return {{v.x, v.y, v.z, v.w}};
}

// In place as well, of what is read again.
DEVICE Values load_values(const uint16_t* x, bool valid) {
    const uint4 v = load_16(x, valid);
    return {{v.x, v.y, v.z, v.w}};
}
