// In place of kernels/cuda/common/global_memory.cuh.
#pragma once
#include "common/types.cuh"

DEVICE uint32_t load_in_place(const void* pointer, bool valid) {
    return valid ? *static_cast<const uint32_t*>(pointer) : 0;
}

DEVICE void add_relaxed(int32_t* to, int32_t x) {
    emulation::give_turn(false);
    add_atomically(to, x);
}

DEVICE int32_t load_acquire(const int32_t* from) {
    emulation::give_turn(true);
    return *from;
}
