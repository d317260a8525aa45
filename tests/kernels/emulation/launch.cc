// One instantiation of a kernel and the function that launches it on the emulated device.
//
// SOURCE  the kernel, relative to kernels/cuda    ENTRY  its function; template arguments as for NVRTC
#include <utility>

#include "common/types.cuh"
#include "launch.h"

// What a kernel declares as its dynamic shared memory.
__align__(128) thread_local uint8_t shared[emulation::kMaxSharedBytes];

#include SOURCE

// Arguments are read outside the memory that the kernel may read.
template <class... Types, size_t... kAt>
__attribute__((no_sanitize("thread"), noinline)) void call(void (*kernel)(Types...), const void* const* arguments,
                                                           std::index_sequence<kAt...>) {
    kernel(*static_cast<const Types*>(arguments[kAt])...);
}

template <class... Types>
constexpr auto positions(void (*)(Types...)) {
    return std::index_sequence_for<Types...>();
}

static void enter(const void* const* arguments) { call(ENTRY, arguments, positions(ENTRY)); }

static uint8_t* dynamic_shared() { return shared; }

// 0, or 1 with a message.
extern "C" __attribute__((visibility("default"))) int qoq_emulate(const emulation::Request* request, char* message,
                                                                  int message_bytes) {
    return emulation::run(*request, enter, dynamic_shared, message, message_bytes);
}
