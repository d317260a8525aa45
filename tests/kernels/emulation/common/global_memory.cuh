// In place of kernels/cuda/common/global_memory.cuh.
#pragma once
#include "common/types.cuh"

DEVICE uint32_t load_in_place(const void* pointer, bool valid) {
    return valid ? *static_cast<const uint32_t*>(pointer) : 0;
}

DEVICE uint4 load_16(const void* pointer, bool valid) {
    return valid ? *static_cast<const uint4*>(pointer) : uint4{};
}
DEVICE uint4 load_16_once(const void* pointer, bool valid) { return load_16(pointer, valid); }

DEVICE int32_t load_number(const int32_t* pointer, bool valid) { return valid ? *pointer : 0; }
DEVICE int64_t load_number(const int64_t* pointer, bool valid) { return valid ? *pointer : 0; }

DEVICE void prefetch(const void* pointer) { emulation::check(pointer, 1, emulation::Access::kRead); }

DEVICE void fence() {}

DEVICE void add_relaxed(int32_t* to, int32_t x) {
    emulation::give_turn(false);
    add_atomically(to, x);
}

DEVICE int32_t load_acquire(const int32_t* from) {
    emulation::give_turn(true);
    return *from;
}
