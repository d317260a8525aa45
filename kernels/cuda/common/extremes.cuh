// The smaller and the larger values of two pairs.
#pragma once
#include "common/types.cuh"

// A NaN wins.
template <class Format>
struct Extremes;
template <>
struct Extremes<Float16> {
    static DEVICE uint32_t least(uint32_t a, uint32_t b) {
        uint32_t y;
        asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
        return y;
    }
    static DEVICE uint32_t most(uint32_t a, uint32_t b) {
        uint32_t y;
        asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
        return y;
    }
};
template <>
struct Extremes<BFloat16> {
    static DEVICE uint32_t least(uint32_t a, uint32_t b) {
        uint32_t y;
        asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
        return y;
    }
    static DEVICE uint32_t most(uint32_t a, uint32_t b) {
        uint32_t y;
        asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
        return y;
    }
};
