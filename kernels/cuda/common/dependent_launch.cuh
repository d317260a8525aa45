// Programmatic dependent launch (PTX ISA, "griddepcontrol"): a kernel launched with that attribute may start before the
// one before has ended. Both functions do nothing where it was launched without, and on devices before Hopper.
//
// A kernel waits before it reads what a kernel may have written and before it writes anything. Blocks that do neither
// may end without, but one waits at least: that the one before has ended then means that all earlier ones have, too.
#pragma once
#include "common/types.cuh"

// The next kernel of the stream may start as soon as all blocks came here or ended.
DEVICE void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernel before has ended and all it wrote can be seen. Loads that follow must be those of
// common/global_memory.cuh, or of pointers that are not both const and __restrict__: the compiler may take the others
// for reads of what never changes, and move them up.
DEVICE void wait_for_last_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
