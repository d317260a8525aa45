// Approximations of the special function units (PTX ISA, "ex2", "rcp", "rsqrt"): within 2, 1 and 2 ulp; subnormal numbers
// are zero, but not to rsqrt.
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

DEVICE float reciprocal_root(float x) {
    float y;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
