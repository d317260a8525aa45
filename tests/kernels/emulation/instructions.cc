// What lanes of a warp compute together, and rounding to 16 bits.
#include <cmath>
#include <cstring>
#include <limits>

#include "runtime.h"

namespace emulation {

namespace {

struct Shuffle {
    uint32_t x;
    int lanes;
    uint32_t result;
};

void shuffle(void* const (&all)[kLanes]) {
    for (int lane = 0; lane < kLanes; ++lane) {
        Shuffle& mine = *static_cast<Shuffle*>(all[lane]);
        mine.result = static_cast<Shuffle*>(all[lane ^ mine.lanes])->x;
    }
}

struct Transpose {
    uint32_t x, result;
};

// Lane 4 g + t has elements 2 t, 2 t + 1 of row g.
void transpose(void* const (&all)[kLanes]) {
    uint16_t matrix[8][8];
    for (int lane = 0; lane < kLanes; ++lane)
        memcpy(&matrix[lane / 4][lane % 4 * 2], &static_cast<Transpose*>(all[lane])->x, 4);
    for (int lane = 0; lane < kLanes; ++lane) {
        const uint32_t low = matrix[lane % 4 * 2][lane / 4], high = matrix[lane % 4 * 2 + 1][lane / 4];
        static_cast<Transpose*>(all[lane])->result = low | high << 16;
    }
}

struct LoadMatrices {
    const uint8_t* row;    // of 16 bytes, of matrix lane / 8
    uint32_t* r;
};

void load_matrices(void* const (&all)[kLanes]) {
    for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < 4; ++i)
            memcpy(&static_cast<LoadMatrices*>(all[lane])->r[i],
                   static_cast<LoadMatrices*>(all[8 * i + lane / 4])->row + lane % 4 * 4, 4);
}

struct Mma {
    int32_t* c;
    const uint32_t* a;
    uint32_t b[2];
    bool a_is_signed;
};

// Of the fragments in PTX ISA, "Matrix Fragments for mma.m16n8k32" (8-bit integers). Sums wrap as they do there.
void multiply(void* const (&all)[kLanes]) {
    int16_t a[16][32], b[8][32];
    for (int lane = 0; lane < kLanes; ++lane) {
        const Mma& mine = *static_cast<Mma*>(all[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) {
                const uint8_t code = mine.a[i] >> (8 * j);
                a[g + i % 2 * 8][i / 2 * 16 + t * 4 + j] =
                    mine.a_is_signed ? static_cast<int16_t>(static_cast<int8_t>(code)) : static_cast<int16_t>(code);
            }
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 4; ++j) b[g][i * 16 + t * 4 + j] = static_cast<int8_t>(mine.b[i] >> (8 * j));
    }
    for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            int32_t sum = 0;
            for (int j = 0; j < 32; ++j) sum += a[row][j] * b[column][j];
            int32_t& c = static_cast<Mma*>(all[lane])->c[i];
            c = static_cast<int32_t>(static_cast<uint32_t>(c) + static_cast<uint32_t>(sum));
        }
}

}  // namespace

uint32_t shuffle_xor(uint32_t mask, uint32_t x, int lanes) {
    if (mask != 0xFFFFFFFFu) fail("shuffles with the mask %x", mask);
    Shuffle mine{x, lanes, 0};
    meet_warp("shfl.bfly", shuffle, &mine);
    return mine.result;
}

uint32_t transpose_8x8(uint32_t x) {
    Transpose mine{x, 0};
    meet_warp("movmatrix", transpose, &mine);
    return mine.result;
}

void load_matrices_4(uint32_t* r, uint32_t address) {
    LoadMatrices mine{shared_memory("ldmatrix", address, 16, Access::kRead), r};
    meet_warp("ldmatrix", load_matrices, &mine);
}

void mma_m16n8k32(int32_t* c, const uint32_t* a, uint32_t b0, uint32_t b1, bool a_is_signed) {
    Mma mine{c, a, {b0, b1}, a_is_signed};
    meet_warp(a_is_signed ? "mma.s8.s8" : "mma.u8.s8", multiply, &mine);
}

float float16_value(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31   ? fraction ? NAN : INFINITY
                       : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                       : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    return bits & 0x8000 ? -size : size;
}

uint16_t float16_bits(float x) {
    if (std::isnan(x)) return 0x7FFF;
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float size = std::fabs(x);
    if (size >= 65520.0f) return sign | 0x7C00;
    if (size < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));
    const int exponent = std::ilogb(size);
    const int significand = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));    // 1024 .. 2048
    return sign | static_cast<uint16_t>(((exponent + 14) << 10) + significand);
}

uint16_t bfloat16_bits(float x) {
    if (std::isnan(x)) return 0x7FFF;
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

// Off by two units in the last place, the most that __fdividef may be (CUDA C++ Programming Guide, on intrinsics).
float divide_approximately(float a, float b) {
    const float up = std::numeric_limits<float>::infinity();
    const float direction = this_block().launch.random(2) ? up : -up;
    return std::nextafter(std::nextafter(a / b, direction), direction);
}

}  // namespace emulation
