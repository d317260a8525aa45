// The emulated device as kernels see it: what the headers beside this file build CUDA's names on.
//
// Threads of a block are fibers. One runs until it comes to an instruction that its warp or block executes together.
// Blocks change after barriers and at atomic operations, in an order that a seed decides. A wrong access ends the launch
// with a message (memory.cc). Not emulated: writes to global memory that others see late, so that fences do nothing.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulation {

constexpr int kLanes = 32;

struct Index {
    unsigned x, y, z;
};

// Of the thread that runs. Constant for a thread, so that the compiler need not ask again.
__attribute__((const)) Index thread_index();
__attribute__((const)) Index block_index();
__attribute__((const)) Index block_size();
__attribute__((const)) Index grid_size();

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// Every lane of a warp comes here with arguments of its own; the last one runs `together` on all of them.
using Together = void (*)(void* const (&lanes)[kLanes]);
void meet_warp(const char* instruction, Together together, void* mine);
void meet_block();

// Other blocks may go on now. `waits`: this one cannot before they did.
void give_turn(bool waits);

enum class Access { kRead, kWrite, kAtomic };

// An access to any memory, by its address on the host.
void check(const void* at, int bytes, Access access);

// As cvta.to.shared, and back: checked, and a multiple of `bytes`.
uint32_t shared_address(const void* pointer);
uint8_t* shared_memory(const char* instruction, uint32_t address, int bytes, Access access);

// cp.async of 16 bytes, or of 16 zeros; done no sooner than wait_for_copies asks for.
void copy_async(uint32_t shared, const void* global, bool valid);
void commit_copies();
void wait_for_copies(int pending);

uint32_t shuffle_xor(uint32_t mask, uint32_t x, int lanes);
uint32_t transpose_8x8(uint32_t x);
void load_matrices_4(uint32_t* r, uint32_t address);
void mma_m16n8k32(int32_t* c, const uint32_t* a, uint32_t b0, uint32_t b1, bool a_is_signed);

float float16_value(uint16_t bits);
uint16_t float16_bits(float x);
uint16_t bfloat16_bits(float x);
float divide_approximately(float a, float b);

}  // namespace emulation
