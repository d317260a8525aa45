// In place of kernels/cuda/common/mma.cuh.
#pragma once
#include "common/types.cuh"

DEVICE void mma_u8_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulation::mma_m16n8k32(c, a, b0, b1, false);
}

DEVICE void mma_s8_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulation::mma_m16n8k32(c, a, b0, b1, true);
}

DEVICE void load_matrices_4(uint32_t (&r)[4], uint32_t address) { emulation::load_matrices_4(r, address); }

DEVICE uint32_t transpose_8x8(uint32_t x) { return emulation::transpose_8x8(x); }

DEVICE uint4 load_shared_16(uint32_t address) {
    uint4 v;
    __builtin_memcpy(&v, emulation::shared_memory("ld.shared", address, 16, emulation::Access::kRead), 16);
    return v;
}

DEVICE uint32_t load_shared_1(uint32_t address) {
    return *emulation::shared_memory("ld.shared", address, 1, emulation::Access::kRead);
}
