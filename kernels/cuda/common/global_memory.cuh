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

// Accesses in no order with others, past the L1 cache; each word is whole. Addresses are multiples of the size.
DEVICE void store_relaxed(void* to, const uint32_t (&words)[2]) {
    asm volatile("st.relaxed.gpu.global.v2.b32 [%0], {%1,%2};" ::"l"(to), "r"(words[0]), "r"(words[1]) : "memory");
}

DEVICE void store_relaxed(void* to, const uint32_t (&words)[4]) {
    asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(words[0]), "r"(words[1]),
                 "r"(words[2]), "r"(words[3])
                 : "memory");
}

DEVICE void load_relaxed(const void* from, uint32_t (&words)[2]) {
    asm volatile("ld.relaxed.gpu.global.v2.b32 {%0,%1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "l"(from)
                 : "memory");
}

DEVICE void load_relaxed(const void* from, uint32_t (&words)[4]) {
    asm volatile("ld.relaxed.gpu.global.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(from)
                 : "memory");
}
