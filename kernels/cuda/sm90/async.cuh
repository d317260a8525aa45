// Barriers in shared memory, and bulk copies into it (PTX ISA, "mbarrier", "cp.async.bulk").
#pragma once
#include "common/async_copy.cuh"
#include "common/dependent_launch.cuh"
#include "common/types.cuh"

DEVICE void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Barriers that were just made become visible to the copy engine.
DEVICE void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The one arrival of a producer: the phase ends when `bytes` have been copied too.
DEVICE void barrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of this parity has ended. A barrier that was just made counts as having ended phase 1.
DEVICE void barrier_wait(uint32_t barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@!ended bra again;\n"
        "}" ::"r"(barrier), "r"(parity) : "memory");
}

// Addresses and `bytes` are multiples of 16.
DEVICE void bulk_copy(uint32_t to, const void* from, int bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
        "r"(bytes), "r"(barrier) : "memory");
}

// The same of what is read once: the L2 gives up its lines first. Any hint makes copies slower that the L2 can serve,
// even the hint to treat lines as usual: products of many tokens took 15 % longer with it.
DEVICE void bulk_copy_once(uint32_t to, const void* from, int bytes, uint32_t barrier) {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}

// Some of a block's threads meet, a multiple of a warp; barrier 0 is __syncthreads.
DEVICE void meet(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
