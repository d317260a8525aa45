// In place of kernels/cuda/common/shared_memory.cuh.
#pragma once
#include "common/types.cuh"

DEVICE void store_shared(uint32_t address, uint32_t word) {
    __builtin_memcpy(emulation::shared_memory("st.shared", address, 4, emulation::Access::kWrite), &word, 4);
}

DEVICE uint32_t load_shared(uint32_t address) {
    uint32_t word;
    __builtin_memcpy(&word, emulation::shared_memory("ld.shared", address, 4, emulation::Access::kRead), 4);
    return word;
}

DEVICE float4 load_shared_4(uint32_t address) {
    float4 v;
    __builtin_memcpy(&v, emulation::shared_memory("ld.shared", address, 16, emulation::Access::kRead), 16);
    return v;
}
