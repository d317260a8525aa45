// A launch, as the driver in Python asks for it (emulator.py has the same structures).
#pragma once
#include "device.h"

namespace emulation {

constexpr int kMaxSharedBytes = 227 * 1024;

// Global memory that the kernel may use.
struct Buffer {
    const char* name;
    uint8_t* begin;
    int64_t bytes;
    int32_t writable;
};

struct Request {
    int32_t grid[3];
    int32_t threads;
    int32_t shared_bytes;
    uint32_t seed;    // of the order in which blocks and warps run
    const void* const* arguments;
    const Buffer* buffers;
    int32_t num_buffers;
};

using Enter = void (*)(const void* const* arguments);
using DynamicShared = uint8_t* (*)();    // of the calling thread

int run(const Request& request, Enter enter, DynamicShared dynamic_shared, char* message, int message_bytes);

}  // namespace emulation
