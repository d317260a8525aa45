// In place of kernels/cuda/common/types.cuh, with what NVRTC has built in, for a host compiler.
#pragma once
#include <cmath>

#include "device.h"

#define __global__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Each block has a thread of the operating system, and so its own copy.
#define __shared__ thread_local
#define DEVICE inline

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())
#define blockDim (emulation::block_size())
#define gridDim (emulation::grid_size())

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = 0xFFFFFFFFu;
#define kInfinity __int_as_float(0x7F800000)

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
DEVICE uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
DEVICE uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
struct alignas(16) float4 {
    float x, y, z, w;
};

template <class To, class From>
DEVICE To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
}
DEVICE float __uint_as_float(uint32_t x) { return bits_as<float>(x); }
DEVICE float __int_as_float(int32_t x) { return bits_as<float>(x); }
DEVICE uint32_t __float_as_uint(float x) { return bits_as<uint32_t>(x); }

DEVICE int min(int a, int b) { return a < b ? a : b; }
DEVICE int max(int a, int b) { return a > b ? a : b; }
DEVICE uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
DEVICE uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }

// Compiled without contraction to fused operations.
DEVICE float __fadd_rn(float a, float b) { return a + b; }
DEVICE float __fsub_rn(float a, float b) { return a - b; }
DEVICE float __fmul_rn(float a, float b) { return a * b; }
DEVICE float __fdiv_rn(float a, float b) { return a / b; }
DEVICE float __frcp_rn(float x) { return 1.0f / x; }
DEVICE float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
DEVICE float __fdividef(float a, float b) { return emulation::divide_approximately(a, b); }
DEVICE float __int2float_rn(int x) { return static_cast<float>(x); }
DEVICE int __float2int_rz(float x) { return static_cast<int>(x); }

[[noreturn]] DEVICE void __trap() { emulation::fail("stops the kernel"); }
DEVICE void __syncthreads() { emulation::meet_block(); }
DEVICE void __threadfence() {}
DEVICE uint32_t __shfl_xor_sync(uint32_t mask, uint32_t x, int lanes) { return emulation::shuffle_xor(mask, x, lanes); }

DEVICE float __shfl_xor_sync(uint32_t mask, float x, int lanes) {
    return __uint_as_float(__shfl_xor_sync(mask, __float_as_uint(x), lanes));
}
DEVICE uint32_t __reduce_max_sync(uint32_t mask, uint32_t x) {
    for (int lanes = 1; lanes < kWarpSize; lanes *= 2) x = max(x, __shfl_xor_sync(mask, x, lanes));
    return x;
}
DEVICE int32_t __reduce_add_sync(uint32_t mask, int32_t x) {
    for (int lanes = 1; lanes < kWarpSize; lanes *= 2)
        x += static_cast<int32_t>(__shfl_xor_sync(mask, static_cast<uint32_t>(x), lanes));
    return x;
}
DEVICE uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t places) {
    const uint64_t both = a | static_cast<uint64_t>(b) << 32;
    uint32_t y = 0;
    for (int i = 0; i < 4; ++i) y |= static_cast<uint32_t>(both >> 8 * (places >> 4 * i & 7) & 0xFF) << 8 * i;
    return y;
}
DEVICE int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
    return sum;
}

template <class T>
DEVICE T __ldg(const T* from) {
    return *from;
}
DEVICE int32_t __ldcg(const int32_t* from) { return *from; }
DEVICE void __stcg(int32_t* to, int32_t x) { *to = x; }

// Blocks run one at a time, so that no access needs to be atomic.
DEVICE int32_t add_atomically(int32_t* to, int32_t x) {
    emulation::check(to, sizeof *to, emulation::Access::kAtomic);
    const int32_t before = __atomic_load_n(to, __ATOMIC_RELAXED);
    __atomic_store_n(to, before + x, __ATOMIC_RELAXED);
    return before;
}
DEVICE int32_t atomicAdd_block(int32_t* to, int32_t x) { return add_atomically(to, x); }
DEVICE int32_t atomicAdd(int32_t* to, int32_t x) {
    emulation::give_turn(false);
    return add_atomically(to, x);
}

struct Float16 {
    static DEVICE float value(uint16_t bits) { return emulation::float16_value(bits); }
    static DEVICE uint16_t bits(float x) { return emulation::float16_bits(x); }
    static DEVICE uint32_t pair(float low, float high) { return bits(low) | static_cast<uint32_t>(bits(high)) << 16; }
};

struct BFloat16 {
    static DEVICE float value(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
    static DEVICE uint16_t bits(float x) { return emulation::bfloat16_bits(x); }
    static DEVICE uint32_t pair(float low, float high) { return bits(low) | static_cast<uint32_t>(bits(high)) << 16; }
};

DEVICE uint32_t kept(uint32_t x) { return x; }
template <class T>
DEVICE T* kept(T* pointer) {
    return pointer;
}

template <class Format>
DEVICE float low_value(uint32_t pair) {
    return Format::value(static_cast<uint16_t>(pair & 0xFFFFu));
}

template <class Format>
DEVICE float high_value(uint32_t pair) {
    return Format::value(static_cast<uint16_t>(pair >> 16));
}

template <int kFormat>
struct FormatOf;
template <>
struct FormatOf<0> {
    using Type = Float16;
};
template <>
struct FormatOf<1> {
    using Type = BFloat16;
};
