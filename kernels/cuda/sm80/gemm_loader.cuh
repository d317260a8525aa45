// Copies the stages of a block's units from global to shared memory, unit after unit.
//
// A stage holds kGroups * 128 inputs: weights (packed stripes as they are; int8 rows swizzled, a plane of 128 bytes a
// row for each group), activations (rows swizzled, a plane for each group), and for progressive weights the scale bytes
// and the zero bytes of each group. What a thread copies lies at fixed distances in shared memory and at one distance
// in global memory, so that a copy costs one address: these instructions compete with the tensor cores for issue slots.
#pragma once
#include "common/async_copy.cuh"
#include "common/types.cuh"
#include "common/gemm_schedule.cuh"
#include "sm80/gemm_weights.cuh"

struct Operands {
    const uint8_t* weight;       // packed, or int8 [N, K]
    const int8_t* act_codes;     // [M, K]
    const uint8_t* s2_scales;    // [K / 128, N]
    const uint8_t* s2_zeros;     // [K / 128, N]
    int m, n, k;
};

// Rows of bytes [rows, K]: kRows rows by kGroups * 128 columns at a time, swizzled, a plane for each group. Where a
// thread has several copies, two of them are of one row, 64 bytes apart: a warp still fills whole sectors of 32 bytes.
template <int kRows, int kGroups, int kThreads>
struct RowCopies {
    static constexpr int kHalves = kRows * 8 * kGroups >= 2 * kThreads ? 2 : 1;
    static constexpr int kChunks = 8 / kHalves;    // of 16 bytes, side by side
    static constexpr int kRowThreads = kChunks * kGroups, kRowsAtOnce = kThreads / kRowThreads;
    static constexpr int kCopies = (kRows + kRowsAtOnce - 1) / kRowsAtOnce * kHalves;
    static_assert(kRowsAtOnce % 8 == 0 || kRowsAtOnce >= kRows, "the swizzle of a thread's rows is the same");

    const uint8_t* from;    // the thread's first row and chunk
    uint32_t stride;        // bytes from one of the thread's rows to its next
    int rows_left;          // valid rows from there on
    int columns_left;       // valid columns from there on

    static DEVICE int row() { return threadIdx.x / kRowThreads; }
    static DEVICE int group() { return threadIdx.x % kRowThreads / kChunks; }
    static DEVICE int chunk() { return threadIdx.x % kChunks; }

    DEVICE void enter(const void* rows, int first_row, int num_rows, int k) {
        const int column = group() * kGroup + chunk() * 16;
        from = static_cast<const uint8_t*>(rows) + (static_cast<int64_t>(first_row + row()) * k + column);
        stride = static_cast<uint32_t>(k) * kRowsAtOnce;
        rows_left = num_rows - first_row - row();
        columns_left = k - column;
    }

    // Where the thread's first copy goes.
    static DEVICE int place() { return group() * (kRows * 128) + swizzled(row(), chunk()); }

    // to: shared address of the rows plus place(). Rows past the end are not read: what they give is not stored.
    // Columns past K are zeros if kZeros, else not read.
    template <bool kZeros>
    DEVICE void copy(uint32_t to, int i) const {
        const int more = i / kHalves * kRowsAtOnce, half = i % kHalves;
        if (more >= rows_left || (kRows % kRowsAtOnce != 0 && row() + more >= kRows)) return;
        const uint8_t* source = from + (static_cast<uint64_t>(stride) * (i / kHalves) + half * 64);
        to = (half == 0 ? to : to ^ 64) + more * 128;    // the swizzle of chunk + 4 is an exclusive or
        if (kGroups == 1)
            copy_async_16(to, source);
        else if (kZeros)
            copy_async_16(to, columns_left > 0 ? source : source - group() * kGroup, columns_left > 0);
        else if (columns_left > 0)
            copy_async_16(to, source);
    }

    DEVICE void next_step() {
        from += kGroups * kGroup;
        columns_left -= kGroups * kGroup;
    }
};

// Packed stripes of 32 channels, 2048 bytes a group: kStripes stripes by kGroups groups at a time, as they are.
template <int kStripes, int kGroups, int kThreads>
struct StripeCopies {
    static constexpr int kStripesAtOnce = kStripes < kThreads / kWarpSize ? kStripes : kThreads / kWarpSize;
    static constexpr int kStripeThreads = kThreads / kStripesAtOnce;
    static constexpr int kCopiesOfStripe = 128 * kGroups / kStripeThreads;
    static constexpr int kCopies = kStripes / kStripesAtOnce * kCopiesOfStripe;
    static_assert(kStripes % kStripesAtOnce == 0 && kCopiesOfStripe * kStripeThreads == 128 * kGroups, "even shares");

    const uint8_t* from;    // the thread's first stripe and chunk
    int stripes_left, bytes_left;

    DEVICE void enter(const uint8_t* weight, int first_stripe, int num_stripes, int k) {
        const int stripe = first_stripe + static_cast<int>(threadIdx.x) / kStripeThreads;
        const int chunk = threadIdx.x % kStripeThreads;
        from = weight + (static_cast<int64_t>(stripe) * (k * 16) + chunk * 16);
        stripes_left = num_stripes - stripe;
        bytes_left = k * 16 - chunk * 16;
    }

    static DEVICE int place() {
        return threadIdx.x / kStripeThreads * (2048 * kGroups) + threadIdx.x % kStripeThreads * 16;
    }

    // to: shared address of the stripes plus place()
    DEVICE void copy(uint32_t to, int i, int k) const {
        const int more = i / kCopiesOfStripe * kStripesAtOnce, inside = i % kCopiesOfStripe * kStripeThreads * 16;
        if (more >= stripes_left || (kGroups > 1 && inside >= bytes_left)) return;
        copy_async_16(to + more * (2048 * kGroups) + inside,
                      from + static_cast<uint64_t>(static_cast<uint32_t>(k)) * (more * 16) + inside);
    }

    DEVICE void next_step() {
        from += 2048 * kGroups;
        bytes_left -= 2048 * kGroups;
    }
};

// The scale bytes and the zero bytes of kBlockN channels, one copy a thread.
template <int kBlockN, int kGroups>
struct ScaleCopies {
    static constexpr int kChunks = kBlockN / 16, kCopies = 2 * kChunks * kGroups;
    const uint8_t* from;
    int groups_left;    // from the thread's on; counted only where a stage has several

    DEVICE void enter(const Operands& operands, int first_channel, int first_group) {
        const int copy = threadIdx.x, group = copy / kChunks % kGroups;
        const int channel = min(first_channel + copy % kChunks * 16, operands.n - 16);
        from = (copy < kCopies / 2 ? operands.s2_scales : operands.s2_zeros) +
               (static_cast<int64_t>(first_group + group) * operands.n + channel);
        groups_left = copy < kCopies ? operands.k / kGroup - first_group - group : 0;
    }

    DEVICE void copy(uint32_t to) const {
        if (groups_left > 0) copy_async_16(to + threadIdx.x * 16, from);
    }

    DEVICE void next_step(int n) {
        from += n * kGroups;
        if (kGroups > 1) groups_left -= kGroups;
    }
};

template <int kFormat, int kBlockN, int kBlockM, int kGroups, int kThreads>
struct Loader {
    static constexpr bool kPacked = kFormat != kInt8, kHasScales = kFormat == kProgressive;
    static constexpr int kWeightBytes = kBlockN * (kPacked ? 64 : 128) * kGroups;
    static constexpr int kActBytes = kBlockM * kGroup * kGroups;
    static constexpr int kScaleBytes = kHasScales ? kBlockN * kGroups : 0;
    static constexpr int kActsAt = kWeightBytes, kScalesAt = kWeightBytes + kActBytes;
    static constexpr int kStageBytes = (kScalesAt + 2 * kScaleBytes + 127) / 128 * 128;

    using Stripes = StripeCopies<kBlockN / kStripe, kGroups, kThreads>;
    using WeightRows = RowCopies<kBlockN, kGroups, kThreads>;
    using ActRows = RowCopies<kBlockM, kGroups, kThreads>;
    using Scales = ScaleCopies<kBlockN, kGroups>;
    static constexpr int kWeightCopies = kPacked ? Stripes::kCopies : WeightRows::kCopies;
    static constexpr int kCopies = kWeightCopies + ActRows::kCopies;
    static_assert(!kHasScales || Scales::kCopies <= kThreads, "scales take one copy a thread");

    Operands operands;
    Cursor cursor;
    Stripes stripes = {};
    WeightRows weight_rows = {};
    ActRows act_rows = {};
    Scales scales = {};
    uint32_t weight_place, act_place;

    DEVICE Loader(const Operands& operands, const Schedule& schedule) : operands(operands), cursor(schedule) {
        // Computed once: the compiler would do it again for every stage.
        weight_place = kept(kPacked ? Stripes::place() : WeightRows::place());
        act_place = kept(kActsAt + ActRows::place());
        enter_tile(schedule);
    }

    DEVICE void enter_tile(const Schedule& schedule) {
        if (cursor.run == 0) {
            stop();
            return;
        }
        int tile_n, tile_m;
        schedule.place(cursor.tile, tile_n, tile_m);
        const int k = operands.k, first_input = cursor.step * (kGroup * kGroups);
        act_rows.enter(operands.act_codes, tile_m * kBlockM, operands.m, k);
        act_rows.from += first_input;
        act_rows.columns_left -= first_input;
        if (kPacked) {
            stripes.enter(operands.weight, tile_n * (kBlockN / kStripe), operands.n / kStripe, k);
            stripes.from += static_cast<int64_t>(first_input) * 16;
            stripes.bytes_left -= first_input * 16;
        } else {
            weight_rows.enter(operands.weight, tile_n * kBlockN, operands.n, k);
            weight_rows.from += first_input;
            weight_rows.columns_left -= first_input;
        }
        if (kHasScales) scales.enter(operands, tile_n * kBlockN, cursor.step * kGroups);
    }

    // Part `part` of `parts` (constants once unrolled) of the current unit's stage, to shared memory at `stage`.
    // Past the last unit nothing is left to copy: predicates rather than a branch, around which nothing is scheduled.
    DEVICE void copy(uint32_t stage, int part, int parts) const {
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
            if (i < kCopies * part / parts || i >= kCopies * (part + 1) / parts) continue;
            if (i >= kWeightCopies)
                act_rows.template copy<true>(stage + act_place, i - kWeightCopies);
            else if (kPacked)
                stripes.copy(stage + weight_place, i, operands.k);
            else
                weight_rows.template copy<false>(stage + weight_place, i);
        }
        if (kHasScales && part == parts - 1) scales.copy(stage + kScalesAt);
    }

    // The unit's copies were all issued: close their group and go to the next unit of the run.
    DEVICE void finish() {
        commit_copies();
        act_rows.next_step();
        if (kPacked) stripes.next_step();
        if (!kPacked) weight_rows.next_step();
        if (kHasScales) scales.next_step(operands.n);
    }

    // Units that can be finished before `leave` must be called for them.
    DEVICE int run() const { return cursor.run; }

    DEVICE void leave(int units, const Schedule& schedule) {
        cursor.run -= units;
        if (cursor.run > 0) return;
        cursor.next_run(schedule);
        enter_tile(schedule);
    }

    // Nothing is left to copy: from here on groups are empty.
    DEVICE void stop() {
        cursor.run = 1 << 30;
        act_rows.rows_left = 0;
        stripes.stripes_left = 0;
        weight_rows.rows_left = 0;
        scales.groups_left = 0;
    }
};
