// How decode attention is shared out, without a plan made beforehand: each block reads the lengths of all sequences.
//
// A unit of work is a sub-block of a page (32 tokens of a sequence) for one query group: the queries, at most 4 or 8,
// that one pass computes for a KV head. Units are numbered sequence by sequence, in it group by group, in it along the
// tokens; blocks, and in them warps, take equal runs of that list. The units of a group of a sequence are a segment.
#pragma once
#include "common/kv_page.cuh"
#include "common/types.cuh"

struct Share {
    int first, count;
};

// Run `index` of `total` items cut into `parts` runs, the first total % parts of them longer by one.
DEVICE Share share_of(int total, int parts, int index) {
    const int each = total / parts, longer = total % parts;
    return {index * each + min(index, longer), each + (index < longer ? 1 : 0)};
}

// The run that `item` is in.
DEVICE int part_of(int item, int total, int parts) {
    const int each = total / parts, longer = total % parts, border = longer * (each + 1);
    return item < border ? item / (each + 1) : longer + (item - border) / each;
}

// Units begin .. end - 1 of the list; the first is sub-block `first_block` of the sequence.
struct Segment {
    int sequence, group, length, first_block, begin, end;
};

// Which heads a query group has: `queries` of them from `first_head` on.
struct HeadShape {
    int kv_heads, queries_of_kv, passes, queries_of_pass;

    DEVICE int groups() const { return kv_heads * passes; }
    DEVICE int heads() const { return kv_heads * queries_of_kv; }
    // Most have one pass, and a division takes long.
    DEVICE int kv_head(int group) const { return passes == 1 ? group : group / passes; }
    DEVICE int first_query(int group) const { return passes == 1 ? 0 : group % passes * queries_of_pass; }
    DEVICE int first_head(int group) const { return kv_head(group) * queries_of_kv + first_query(group); }
    DEVICE int queries(int group) const { return min(queries_of_pass, queries_of_kv - first_query(group)); }
};

template <int kThreads>
struct WorkList {
    const int* kv_lens;
    int sequences, max_tokens, window, groups;
    const int* starts;  // in shared memory: the first unit of each thread's sequences, and the number of all units

    // Every thread counts the units of so many consecutive sequences.
    DEVICE int sequences_of_thread() const { return (sequences + kThreads - 1) / kThreads; }

    DEVICE int length(int sequence) const { return max(0, min(kv_lens[sequence], max_tokens)); }
    DEVICE int first_token(int length) const { return window > 0 ? max(0, length - window) : 0; }
    DEVICE int first_block(int length) const { return first_token(length) / kBlockTokens; }
    DEVICE int blocks(int length) const {
        return (length + kBlockTokens - 1) / kBlockTokens - first_block(length);
    }

    // Fill the list of starts; all threads of the block take part. Returns the number of all units.
    DEVICE int build(int (&shared_starts)[kThreads + 1], int (&warp_totals)[kWarpSize]) {
        const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, each = sequences_of_thread();
        int mine = 0;
        for (int i = 0; i < each; ++i) {
            const int sequence = threadIdx.x * each + i;
            if (sequence < sequences) mine += blocks(length(sequence));
        }
        mine *= groups;
        int up_to = mine;  // of this warp's threads, this one included
#pragma unroll
        for (int distance = 1; distance < kWarpSize; distance *= 2) {
            const int other = __shfl_up_sync(kFullMask, up_to, distance);
            if (lane >= distance) up_to += other;
        }
        if (lane == kWarpSize - 1) warp_totals[warp] = up_to;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kThreads / kWarpSize; ++i) up_to += i < warp ? warp_totals[i] : 0;
        shared_starts[threadIdx.x] = up_to - mine;
        if (threadIdx.x == kThreads - 1) shared_starts[kThreads] = up_to;
        __syncthreads();
        starts = shared_starts;
        return starts[kThreads];
    }

    // The thread whose sequences `unit`, less than the number of all units, is in; the same in all lanes of a warp.
    DEVICE int find(int unit) const {
        constexpr int kWarps = kThreads / kWarpSize;
        const int lane = threadIdx.x % kWarpSize;
        const int row = kWarps * (__popc(__ballot_sync(kFullMask, starts[kWarps * lane] <= unit)) - 1);
        const bool is_before = lane < kWarps && starts[row + min(lane, kWarps - 1)] <= unit;
        return row + __popc(__ballot_sync(kFullMask, is_before)) - 1;
    }

    // The segment that `unit` is in, from what find() gave for it or for a unit a little before.
    DEVICE Segment locate(int unit, int low) const {
#pragma unroll 1
        while (starts[low + 1] <= unit) ++low;
        int sequence = low * sequences_of_thread(), start = starts[low];
        int tokens = length(sequence), count = blocks(tokens);
#pragma unroll 1
        while (unit >= start + count * groups) {
            start += count * groups;
            tokens = length(++sequence);
            count = blocks(tokens);
        }
        const int group = (unit - start) / count, begin = start + group * count;
        return {sequence, group, tokens, first_block(tokens), begin, begin + count};
    }

    // The segment after `segment`, which is not the last; the same in all lanes of a warp.
    DEVICE Segment following(const Segment& segment) const {
        if (segment.group + 1 == groups) return locate(segment.end, find(segment.end));
        const int count = segment.end - segment.begin;
        return {segment.sequence,    segment.group + 1, segment.length,
                segment.first_block, segment.end,       segment.end + count};
    }
};
