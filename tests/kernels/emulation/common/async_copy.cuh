// In place of kernels/cuda/common/async_copy.cuh.
#pragma once
#include "common/types.cuh"

DEVICE uint32_t shared_address(const void* pointer) { return emulation::shared_address(pointer); }

DEVICE void copy_async_16(uint32_t shared, const void* global, bool valid) {
    emulation::copy_async(shared, global, valid);
}

DEVICE void copy_async_16(uint32_t shared, const void* global) { emulation::copy_async(shared, global, true); }

DEVICE void commit_copies() { emulation::commit_copies(); }

template <int kPending>
DEVICE void wait_for_copies() {
    emulation::wait_for_copies(kPending);
}
