// wgmma with int32 sums: m64 n8..n256 k32, A from registers (u8) or shared memory (s8), B (s8) from shared memory.
// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
//
// Operands in shared memory are without a swizzle: core matrices of 8 rows by 16 bytes lie one after the other, 128 bytes
// apart along k and 1024 bytes apart along rows, as weight_tiles.py and activation tiles are laid out.
#pragma once
#include "common/types.cuh"

// Registers written before become operands of the wgmma that follow.
DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kLeft of the committed groups are under way.
template <int kLeft>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// The descriptor of an operand at a shared address; 32 inputs further it is kDescriptorStep more.
constexpr uint64_t kDescriptorStep = 256 >> 4;
DEVICE uint64_t descriptor(uint32_t address) {
    constexpr uint64_t kAlongK = 128 >> 4, kAlongRows = 1024 >> 4;
    return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | kAlongK << 16 | kAlongRows << 32;
}

#define REGISTERS_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define REGISTERS_8 "%8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_16 "%16, %17, %18, %19, %20, %21, %22, %23"
#define REGISTERS_24 "%24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_32 "%32, %33, %34, %35, %36, %37, %38, %39"
#define REGISTERS_40 "%40, %41, %42, %43, %44, %45, %46, %47"
#define REGISTERS_48 "%48, %49, %50, %51, %52, %53, %54, %55"
#define REGISTERS_56 "%56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_64 "%64, %65, %66, %67, %68, %69, %70, %71"
#define REGISTERS_72 "%72, %73, %74, %75, %76, %77, %78, %79"
#define REGISTERS_80 "%80, %81, %82, %83, %84, %85, %86, %87"
#define REGISTERS_88 "%88, %89, %90, %91, %92, %93, %94, %95"
#define REGISTERS_96 "%96, %97, %98, %99, %100, %101, %102, %103"
#define REGISTERS_104 "%104, %105, %106, %107, %108, %109, %110, %111"
#define REGISTERS_112 "%112, %113, %114, %115, %116, %117, %118, %119"
#define REGISTERS_120 "%120, %121, %122, %123, %124, %125, %126, %127"
#define REGISTERS_TO_16 REGISTERS_0 ", " REGISTERS_8
#define REGISTERS_TO_24 REGISTERS_TO_16 ", " REGISTERS_16
#define REGISTERS_TO_32 REGISTERS_TO_24 ", " REGISTERS_24
#define REGISTERS_TO_48 REGISTERS_TO_32 ", " REGISTERS_32 ", " REGISTERS_40
#define REGISTERS_TO_64 REGISTERS_TO_48 ", " REGISTERS_48 ", " REGISTERS_56
#define REGISTERS_TO_96 REGISTERS_TO_64 ", " REGISTERS_64 ", " REGISTERS_72 ", " REGISTERS_80 ", " REGISTERS_88
#define REGISTERS_TO_128 REGISTERS_TO_96 ", " REGISTERS_96 ", " REGISTERS_104 ", " REGISTERS_112 ", " REGISTERS_120

#define SUMS_4(d, i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define SUMS_8(d, i) SUMS_4(d, i), SUMS_4(d, i + 4)
#define SUMS_16(d, i) SUMS_8(d, i), SUMS_8(d, i + 8)
#define SUMS_32(d, i) SUMS_16(d, i), SUMS_16(d, i + 16)
#define SUMS_64(d, i) SUMS_32(d, i), SUMS_32(d, i + 32)
#define SUMS_24(d, i) SUMS_16(d, i), SUMS_8(d, i + 16)
#define SUMS_48(d, i) SUMS_32(d, i), SUMS_16(d, i + 32)
#define SUMS_96(d, i) SUMS_64(d, i), SUMS_32(d, i + 64)
#define SUMS_128(d, i) SUMS_64(d, i), SUMS_64(d, i + 64)

// The numbers are those of the operands after the sums: a0 to a3, the descriptor of B, whether to add; and for A from
// shared memory its descriptor, that of B, whether to add.
#define WGMMA(N, COUNT, REGISTERS, SUMS, A0, A1, A2, A3, A4, A5)                                                      \
    DEVICE void wgmma_u8(int32_t (&d)[COUNT], const uint32_t* a, uint64_t b, int add) {                               \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #A5 ", 0;\n"                                             \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.u8.s8 {" REGISTERS "}, {%" #A0 ", %" #A1          \
                     ", %" #A2 ", %" #A3 "}, %" #A4 ", add;\n}"                                                       \
                     : SUMS(d, 0)                                                                                         \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                 \
    }                                                                                                                 \
    DEVICE void wgmma_s8(int32_t (&d)[COUNT], uint64_t a, uint64_t b, int add) {                                      \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #A2 ", 0;\n"                                             \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" REGISTERS "}, %" #A0 ", %" #A1           \
                     ", add;\n}"                                                                                      \
                     : SUMS(d, 0)                                                                                         \
                     : "l"(a), "l"(b), "r"(add));                                                                     \
    }

WGMMA(8, 4, "%0, %1, %2, %3", SUMS_4, 4, 5, 6, 7, 8, 9)
WGMMA(16, 8, REGISTERS_0, SUMS_8, 8, 9, 10, 11, 12, 13)
WGMMA(32, 16, REGISTERS_TO_16, SUMS_16, 16, 17, 18, 19, 20, 21)
WGMMA(48, 24, REGISTERS_TO_24, SUMS_24, 24, 25, 26, 27, 28, 29)
WGMMA(64, 32, REGISTERS_TO_32, SUMS_32, 32, 33, 34, 35, 36, 37)
WGMMA(96, 48, REGISTERS_TO_48, SUMS_48, 48, 49, 50, 51, 52, 53)
WGMMA(128, 64, REGISTERS_TO_64, SUMS_64, 64, 65, 66, 67, 68, 69)
WGMMA(192, 96, REGISTERS_TO_96, SUMS_96, 96, 97, 98, 99, 100, 101)
WGMMA(256, 128, REGISTERS_TO_128, SUMS_128, 128, 129, 130, 131, 132, 133)

#undef WGMMA
