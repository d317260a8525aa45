// What blocks of a cluster tell each other through shared memory (PTX ISA, "mapa", "st.async", "barrier.cluster").
#pragma once
#include "common/types.cuh"

// This block's number in its cluster.
DEVICE int cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}

// All threads of the cluster meet: what was stored before arriving can be read after waiting.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE void meet_cluster() {
    cluster_arrive();
    cluster_wait();
}

// Where block `rank` of the cluster has what lies at the shared address `own` of this one.
DEVICE uint32_t address_in(int rank, uint32_t own) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(own), "r"(rank));
    return address;
}

// A word for another block, whose barrier counts its 4 bytes. Addresses from `address_in`.
DEVICE void send(uint32_t to, uint32_t barrier, uint32_t word) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(to), "r"(word),
                 "r"(barrier) : "memory");
}

// Into the shared memory of another block, which sees it after both have met. Addresses from `address_in`.
DEVICE void store_in_block(uint32_t to, int2 values) {
    asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(values.x), "r"(values.y) : "memory");
}

DEVICE void store_in_block(uint32_t to, int4 values) {
    asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(values.x), "r"(values.y),
                 "r"(values.z), "r"(values.w) : "memory");
}
