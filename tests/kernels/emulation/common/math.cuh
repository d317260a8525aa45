// In place of kernels/cuda/common/math.cuh: exact but for rounding, and subnormal numbers are zero where they are there.
#pragma once
#include "common/types.cuh"

DEVICE float without_subnormal(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
DEVICE float power_of_2(float x) { return without_subnormal(std::exp2(without_subnormal(x))); }
DEVICE float reciprocal(float x) { return without_subnormal(1.0f / without_subnormal(x)); }
DEVICE float reciprocal_root(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
