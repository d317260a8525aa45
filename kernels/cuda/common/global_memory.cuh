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

// The same of 16 bytes that are read once: they do not stay in the L1. Not of memory that never changes (.nc): it may
// be what an earlier kernel wrote.
DEVICE uint4 load_16_once(const void* pointer, bool valid) {
    uint4 v;
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
        "@p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(pointer), "r"(static_cast<uint32_t>(valid)));
    return v;
}

// As above, and it stays in the L1.
DEVICE uint4 load_16(const void* pointer, bool valid) {
    uint4 v;
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
        "@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(pointer), "r"(static_cast<uint32_t>(valid)));
    return v;
}

// A number in place, not of memory that never changes. 0 where not `valid`.
DEVICE int32_t load_number(const int32_t* pointer, bool valid) {
    int32_t v;
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.b32 %0, 0; @p ld.global.s32 %0, [%1]; }"
        : "=r"(v)
        : "l"(pointer), "r"(static_cast<uint32_t>(valid)));
    return v;
}

DEVICE int64_t load_number(const int64_t* pointer, bool valid) {
    int64_t v;
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.b64 %0, 0; @p ld.global.s64 %0, [%1]; }"
        : "=l"(v)
        : "l"(pointer), "r"(static_cast<uint32_t>(valid)));
    return v;
}

// The line goes to the L2, where later writes find it: it may be asked for before it has its last value.
DEVICE void prefetch(const void* pointer) { asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer)); }

// What this thread did before is done for whoever learns of what it does afterwards.
DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

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
