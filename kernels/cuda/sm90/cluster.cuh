// Blocks of a cluster: their barrier, and stores into each other's shared memory (PTX ISA, "barrier.cluster", "mapa").
#pragma once
#include "common/types.cuh"

DEVICE int rank_in_cluster() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}

// All threads of all blocks meet: what was stored before arriving can be read after waiting.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// To the place that is `address` in this block's shared memory, in that of block `rank`.
DEVICE void store_in_block(uint32_t address, int rank, int2 values) {
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(there), "r"(values.x), "r"(values.y) : "memory");
}

DEVICE void store_in_block(uint32_t address, int rank, int4 values) {
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(there), "r"(values.x), "r"(values.y),
                 "r"(values.z), "r"(values.w) : "memory");
}
