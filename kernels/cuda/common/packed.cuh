// Arithmetic on pairs of 16-bit values. Each result is rounded once, half to even; of these operations that is also what
// rounding to float32 first and then to 16 bits gives (float32 has 24 places, two more than twice float16's 11), but
// for products of bfloat16 that no normal number holds.
#pragma once
#include "common/types.cuh"

template <class Format>
struct Packed;
template <>
struct Packed<Float16> {
    static DEVICE uint32_t sum(uint32_t a, uint32_t b) {
        uint32_t y;
        asm("add.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
        return y;
    }
    static DEVICE uint32_t product(uint32_t a, uint32_t b) {
        uint32_t y;
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
        return y;
    }
    static DEVICE uint32_t magnitude(uint32_t x) {
        uint32_t y;
        asm("abs.f16x2 %0, %1;" : "=r"(y) : "r"(x));
        return y;
    }
};
// Ampere has no sums and products of bfloat16, but what makes both: x * 1 + y and x * y + -0.
template <>
struct Packed<BFloat16> {
    static DEVICE uint32_t sum(uint32_t a, uint32_t b) { return multiply_add(a, 0x3F803F80u, b); }
    static DEVICE uint32_t product(uint32_t a, uint32_t b) { return multiply_add(a, b, 0x80008000u); }
    static DEVICE uint32_t magnitude(uint32_t x) {
        uint32_t y;
        asm("abs.bf16x2 %0, %1;" : "=r"(y) : "r"(x));
        return y;
    }

private:
    static DEVICE uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
        uint32_t y;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
        return y;
    }
};
