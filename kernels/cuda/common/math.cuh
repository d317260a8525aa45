// Approximations of the special function units (PTX ISA, "ex2", "rcp"): within 2 and 1 ulp; subnormal numbers are zero.
#pragma once
#include "common/types.cuh"

DEVICE float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
