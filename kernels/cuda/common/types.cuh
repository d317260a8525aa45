// Integer names and 16-bit floating point, without the CUDA toolkit's headers: NVRTC finds those on few machines.
#pragma once

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;

#define DEVICE __device__ __forceinline__

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = 0xFFFFFFFFu;
#define kInfinity __int_as_float(0x7F800000)

// Storage formats of a 16-bit float: `bits` rounds half to even, `value` is exact.
struct Float16 {
    static DEVICE float value(uint16_t bits) {
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
        return x;
    }
    static DEVICE uint16_t bits(float x) {
        uint16_t y;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
        return y;
    }
    // `low` in the low half of the word.
    static DEVICE uint32_t pair(float low, float high) {
        uint32_t y;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
        return y;
    }
};

struct BFloat16 {
    static DEVICE float value(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
    static DEVICE uint16_t bits(float x) {
        uint16_t y;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
        return y;
    }
    static DEVICE uint32_t pair(float low, float high) {
        uint32_t y;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
        return y;
    }
};

// Keeps the compiler from computing a value again wherever it is used.
DEVICE uint32_t kept(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}

// An address that is there before what is volatile and follows.
template <class T>
DEVICE T* kept(T* pointer) {
    asm volatile("" : "+l"(pointer));
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

// The element type OUT_FORMAT, IN_FORMAT, ... of an instantiation: 0 float16, 1 bfloat16.
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
