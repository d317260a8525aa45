// Accesses to global memory that the compiler has no name for.
#pragma once
#include "common/types.cuh"

// A load that stays where it is written (the compiler would hoist those of all tokens, which do not fit the registers),
// and without a branch, over which nothing is scheduled. 0 where not `valid`.
DEVICE uint32_t load_in_place(const void* pointer, bool valid) {
    uint32_t v;
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.b32 %0, 0; @p ld.global.nc.u32 %0, [%1]; }"
        : "=r"(v)
        : "l"(pointer), "r"(static_cast<uint32_t>(valid)));
    return v;
}

// Added atomically, in no order with other accesses.
DEVICE void add_relaxed(int32_t* to, int32_t x) {
    asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

// What this thread accesses afterwards is as recent as the number.
DEVICE int32_t load_acquire(const int32_t* from) {
    int32_t v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}

// Adds to a number and returns what it was. What the threads of the warp wrote before a __syncwarp() comes before it,
// and what they access after one comes after all that the earlier additions followed.
DEVICE int32_t add_acquire_release(int32_t* to, int32_t x) {
    int32_t v;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(v) : "l"(to), "r"(x) : "memory");
    return v;
}
