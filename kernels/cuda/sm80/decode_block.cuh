// What a block of decode attention does, however sub-blocks come into its shared memory and blocks are joined.
//
// Each block works out its run of the list of units (decode_work.cuh) from the lengths of the sequences, so a CUDA graph
// replays with other lengths; each of its warps has a run of that and a ring of sub-blocks of its own, and attends as
// decode_tile.cuh says. What a warp attends to of one segment is a piece. A piece that is the whole segment becomes
// output at once. Of the others a warp has two at most, its first and its last; the warps of the block join theirs, in
// the order of units. Every order is fixed by the lengths and the grid, so results are the same from run to run.
//
// WARPS, STAGES  warps of a block; sub-blocks in a warp's ring        other macros: decode_tile.cuh
#pragma once
#include "common/reduce.cuh"
#include "sm80/decode_tile.cuh"
#include "sm80/decode_work.cuh"

constexpr int kThreads = WARPS * kWarpSize;
constexpr int kPieces = 2 * WARPS;
constexpr int kDimsOfLane = HEAD_DIM / kWarpSize;  // where a warp has one query's sum
constexpr int kPieceFloats = QUERIES * HEAD_DIM;
constexpr int kRingBytes = STAGES * Page::kBlockBytes;
static_assert(kPieces <= kWarpSize, "a lane looks after each piece");
static_assert(STAGES < kWarpSize, "the first copies come from one set of places");
static_assert(kPieceFloats * 4 <= kRingBytes, "a warp's last piece lies in its ring");

using Work = WorkList<kThreads>;

// A piece's segment: begin (-1: there is no such piece), end, sequence, group.
struct SharedState {
    int4 pieces[kPieces];
    int warp_totals[kWarpSize], starts[kThreads + 1];
    float2 stats[kPieces][QUERIES];  // top and sum of each query
};

DEVICE void store_values(uint16_t* to, const float (&values)[Page::kDimsOfGroup], float factor) {
#pragma unroll
    for (int i = 0; i < Page::kDimsOfGroup; i += 8) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            words[j] = Format::pair(values[i + 2 * j] * factor, values[i + 2 * j + 1] * factor);
        *reinterpret_cast<uint4*>(to + i) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

DEVICE void store_values(float* to, const float (&values)[Page::kDimsOfGroup]) {
#pragma unroll
    for (int i = 0; i < Page::kDimsOfGroup; i += 4)
        *reinterpret_cast<float4*>(to + i) = make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
}

// query [sequences, heads, D], rows of heads query_stride values apart; output [sequences, heads, D].
struct Rows {
    const uint16_t* query;
    uint16_t* output;
    int query_stride;
    HeadShape heads;

    // Columns without a query repeat the last one.
    DEVICE RawQuery load(const Segment& segment) const {
        const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
        const int column = min(kTwice ? g % 4 : g, heads.queries(segment.group) - 1);
        const uint16_t* from = query + static_cast<int64_t>(segment.sequence) * query_stride +
                               (heads.first_head(segment.group) + column) * HEAD_DIM + 8 * t;
        RawQuery raw;
#pragma unroll
        for (int i = 0; i < kParts; ++i) raw.parts[i] = *reinterpret_cast<const uint4*>(from + 32 * i);
        return raw;
    }

    DEVICE uint16_t* output_of(const Segment& segment, int i) const {
        const int64_t head = static_cast<int64_t>(segment.sequence) * heads.heads() + heads.first_head(segment.group);
        return output + (head + i) * HEAD_DIM;
    }

    // The output of query i of a segment, from sums that a warp has.
    DEVICE void finish(const Segment& segment, int i, const float (&values)[kDimsOfLane], float sum) const {
        uint32_t* const to =
            reinterpret_cast<uint32_t*>(output_of(segment, i)) + kDimsOfLane / 2 * (threadIdx.x % kWarpSize);
        const float factor = __frcp_rn(sum);
#pragma unroll
        for (int j = 0; j < kDimsOfLane / 2; ++j)
            to[j] = Format::pair(values[2 * j] * factor, values[2 * j + 1] * factor);
    }

    // Zeros for sequences of no tokens; all threads of the first `blocks` blocks call.
    DEVICE void clear_empty(const Work& work, int blocks) const {
#pragma unroll 1
        for (int sequence = blockIdx.x; sequence < work.sequences; sequence += blocks) {
            if (work.length(sequence) > 0) continue;
            const int64_t first = static_cast<int64_t>(sequence) * heads.heads() * HEAD_DIM;
            uint4* const to = reinterpret_cast<uint4*>(output + first);
#pragma unroll 1
            for (int i = threadIdx.x; i < heads.heads() * HEAD_DIM / 8; i += kThreads) to[i] = make_uint4(0, 0, 0, 0);
        }
    }
};

// Units first .. end - 1 of the list.
struct Run {
    int first, end;

    DEVICE int count() const { return end - first; }
    DEVICE Run part(int parts, int index) const {
        const Share share = share_of(count(), parts, index);
        return {first + share.first, first + share.first + share.count};
    }
};

// Where the sub-blocks of a warp's run lie, numbered as in kv_pages. Lane i knows it of unit i of 32; what was read of
// the page table for the next 32 is not looked at before they come.
struct Places {
    const Work& work;
    const int* page_table;
    int max_pages, num_pages;
    const HeadShape& heads;
    Run run;
    int taken, near, far_page, far_rest;

    // Read where the first ones are. Gives the segment of the first, and how many of the first ones have none of the
    // last `fresh` tokens of their sequences.
    DEVICE Segment begin(int fresh, int& settled) {
        const int lane = threadIdx.x % kWarpSize;
        Segment segment{};
        int after = 0;
        taken = 0;
        far_rest = -1;
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {  // one copy of the code, which is cold
            near = far_place();
            const Segment found = read(half * kWarpSize);
            if (half == 0) segment = found, after = found.length - (block_in(found, lane) + 1) * kBlockTokens;
        }
        const uint32_t unsettled = __ballot_sync(kFullMask, max(after, 0) < fresh);
        settled = unsettled ? __ffs(unsettled) - 1 : kWarpSize;
        return {__shfl_sync(kFullMask, segment.sequence, 0),    __shfl_sync(kFullMask, segment.group, 0),
                __shfl_sync(kFullMask, segment.length, 0),      __shfl_sync(kFullMask, segment.first_block, 0),
                __shfl_sync(kFullMask, segment.begin, 0),       __shfl_sync(kFullMask, segment.end, 0)};
    }

    DEVICE bool is_done() const { return taken == run.count(); }

    // The next of the first ones, fewer than 32.
    DEVICE int next_of_first() { return __shfl_sync(kFullMask, near, taken++); }

    DEVICE int next() {
        const int place = __shfl_sync(kFullMask, near, taken % kWarpSize);
        if (++taken % kWarpSize == 0) {
            near = far_place();
            read(taken + kWarpSize);
        }
        return place;
    }

  private:
    DEVICE int block_in(const Segment& segment, int index) const {
        return segment.first_block + run.first + index - segment.begin;
    }

    // Of unit `start` + lane.
    DEVICE Segment read(int start) {
        far_rest = -1;
        if (start >= run.count()) return {};
        const int low = work.find(run.first + start), index = start + threadIdx.x % kWarpSize;
        if (index >= run.count()) return {};
        const Segment segment = work.locate(run.first + index, low);
        const int block = block_in(segment, index);
        far_page = page_table[static_cast<int64_t>(segment.sequence) * max_pages + block / 2];
        far_rest = heads.kv_head(segment.group) * 2 + block % 2;
        return segment;
    }

    DEVICE int far_place() const {
        if (far_rest < 0) return 0;
        if (static_cast<uint32_t>(far_page) >= static_cast<uint32_t>(num_pages)) __trap();
        return far_page * heads.kv_heads * 2 + far_rest;
    }
};

// Attend to a warp's run, which is not empty, from `segment` and its query on. `ring.wait()` gives the address of the next sub-block in shared memory once it is there, and
// `ring.refill()` is called when all lanes have read it. Pieces of segments go to `shared`, with their sums in
// `first_sums` for the first of the run and in `last_sums` for the last, when nothing is in the ring any more.
template <class Ring>
DEVICE void attend(Ring& ring, const Work& work, const Rows& rows, const Run& run, Segment segment, RawQuery raw,
                   SharedState& shared, float* first_sums, float* last_sums, float softmax_scale) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, g = lane / 4, t = lane % 4;
    int unit = run.first;
    while (true) {
        const Query prepared = prepare(raw, softmax_scale);
        Attention attention;
        const int begin = unit, end = min(segment.end, run.end);
        const int first_token = work.first_token(segment.length);
        Segment next = segment;
        for (; unit < end; ++unit) {
            if (unit + 1 == end && end < run.end) {  // while the last unit is computed
                next = work.following(segment);
                raw = rows.load(next);
            }
            const uint32_t block = ring.wait();
            const int token = (segment.first_block + unit - segment.begin) * kBlockTokens;
            attention.add(prepared, block, first_token - token, segment.length - token);
            __syncwarp();
            ring.refill();
        }

        attention.fold();
        const bool is_whole = begin == segment.begin && end == segment.end, is_first = begin == run.first;
        const int piece = 2 * warp + (is_first ? 0 : 1);
        float* const sums = is_first ? first_sums : last_sums;
#pragma unroll
        for (int i = 0; i < kTilesOfLane; ++i) {
            const int c = kTwice ? t / 2 : i, index = kTwice ? 2 * (t % 2) + c : 2 * t + c;
            float values[Page::kDimsOfGroup];
            attention.values(c, values);
            const float sum = c ? attention.sum[1] : attention.sum[0];
            if (is_whole) {
                if (index < rows.heads.queries(segment.group))
                    store_values(rows.output_of(segment, index) + Page::kDimsOfGroup * g, values, __frcp_rn(sum));
            } else {
                store_values(sums + index * HEAD_DIM + Page::kDimsOfGroup * g, values);
                if (g == 0) shared.stats[piece][index] = make_float2(c ? attention.top[1] : attention.top[0], sum);
            }
        }
        if (!is_whole && lane == 0)
            shared.pieces[piece] = make_int4(segment.begin, segment.end, segment.sequence, segment.group);
        if (unit == run.end) break;
        segment = next;
    }
}

// The sum of parts of a query's output, a warp's: each lane has kDimsOfLane dimensions. Parts are added in order.
struct Joined {
    float top, sum, values[kDimsOfLane];

    DEVICE Joined() : top(-kInfinity), sum(0.0f), values{} {}

    // {top, sum} of each part and its values; parts that are not there have {-infinity, 0}, and values that are numbers
    // if those of the others are.
    template <int kParts>
    DEVICE void add(const float2 (&stats)[kParts], const float (&parts)[kParts][kDimsOfLane]) {
        float raised = top;
#pragma unroll
        for (int k = 0; k < kParts; ++k) raised = fmaxf(raised, stats[k].x);
        const float before = power_of_2(top - raised);
        top = raised, sum *= before;
#pragma unroll
        for (int j = 0; j < kDimsOfLane; ++j) values[j] *= before;
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
            const float weight = power_of_2(stats[k].x - top);
            sum = fmaf(weight, stats[k].y, sum);
#pragma unroll
            for (int j = 0; j < kDimsOfLane; ++j) values[j] = fmaf(weight, parts[k][j], values[j]);
        }
    }
};

// Join the pieces of each segment, which `sums_of(piece)` has. A warp has each query of a segment in turn and calls
// `finish(segment, i, joined)`; of the segment, sequence and group, begin and end are known. The last segment comes
// first: other blocks may wait for it, and this one for them with the first.
template <class SumsOf, class Finish>
DEVICE void join_pieces(const SharedState& shared, const HeadShape& heads, SumsOf&& sums_of, Finish&& finish) {
    constexpr int kAtOnce = 4;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    // Lane i of every warp looks after piece i; a segment's pieces are neighbours, and the first of them leads.
    const int4 piece = lane < kPieces ? shared.pieces[lane] : make_int4(-1, 0, 0, 0);
    const uint32_t present = __ballot_sync(kFullMask, piece.x >= 0), earlier = present & ((1u << lane) - 1);
    const int previous = __shfl_sync(kFullMask, piece.x, earlier ? 31 - __clz(earlier) : lane);
    const bool leads = piece.x >= 0 && (earlier == 0 || previous != piece.x);
    int turn = 0;
    uint32_t pieces_left = present;
#pragma unroll 1
    for (uint32_t left = __ballot_sync(kFullMask, leads); left != 0;) {
        const int leader = 31 - __clz(left);
        const uint32_t members = pieces_left & ~((1u << leader) - 1);
        left &= (1u << leader) - 1;
        pieces_left &= (1u << leader) - 1;
        const Segment segment{__shfl_sync(kFullMask, piece.z, leader), __shfl_sync(kFullMask, piece.w, leader), 0, 0,
                              __shfl_sync(kFullMask, piece.x, leader), __shfl_sync(kFullMask, piece.y, leader)};
        const int queries = heads.queries(segment.group);
#pragma unroll 1
        for (int i = (warp - turn + WARPS) % WARPS; i < queries; i += WARPS) {
            Joined joined;
#pragma unroll 1
            for (uint32_t rest = members; rest != 0;) {
                float2 stats[kAtOnce];
                float parts[kAtOnce][kDimsOfLane];
#pragma unroll
                for (int k = 0; k < kAtOnce; ++k) {
                    const int member = rest ? __ffs(rest) - 1 : leader;
                    const float* sums = sums_of(member) + i * HEAD_DIM + kDimsOfLane * lane;
                    stats[k] = rest ? shared.stats[member][i] : make_float2(-kInfinity, 0.0f);
#pragma unroll
                    for (int j = 0; j < kDimsOfLane; ++j) parts[k][j] = sums[j];
                    rest &= rest - 1;
                }
                joined.add(stats, parts);
            }
            finish(segment, i, joined);
        }
        turn = (turn + queries) % WARPS;
    }
}
