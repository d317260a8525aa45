// Tensor core instructions of Ampere and later, and the loads of their fragments.
#pragma once
#include "common/types.cuh"

// Fragments of mma.m16n8k32 for 8-bit integers; lane = 4 g + t (PTX ISA, "Matrix Fragments for mma.m16n8k32"):
//   a[0] row g, a[1] row g + 8, inputs 4 t .. 4 t + 3;  a[2], a[3] the same rows, inputs 16 + 4 t ..
//   b[0] column g, inputs 4 t ..;  b[1] column g, inputs 16 + 4 t ..
//   c[0], c[1] row g, columns 2 t, 2 t + 1;  c[2], c[3] row g + 8
DEVICE void mma_u8_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE void mma_s8_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// mma.m16n8k16 on float16 with float32 sums; lane = 4 g + t, two values a register, the lower index in the low half:
//   a[0] row g, a[1] row g + 8, inputs 2 t, 2 t + 1;  a[2], a[3] the same rows, inputs 2 t + 8, 2 t + 9
//   b0 column g, inputs 2 t, 2 t + 1;  b1 inputs 2 t + 8, 2 t + 9;  c as above
DEVICE void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements: lanes 8 i .. 8 i + 7 give the addresses of the rows (16 bytes) of matrix i;
// lane 4 g + t receives elements 2 t, 2 t + 1 of row g of each.
DEVICE void load_matrices_4(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// An 8 x 8 matrix of 16-bit elements, two a lane, transposed within the warp.
DEVICE uint32_t transpose_8x8(uint32_t x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

DEVICE uint4 load_shared_16(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

// One byte, widened.
DEVICE uint32_t load_shared_1(uint32_t address) {
    uint32_t v;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}
