// Attention of one new token a sequence to its keys and values in a paged 4-bit or 8-bit cache.
//
// One block an SM. Each works out its run of the list of units (decode_work.cuh) from the lengths of the sequences, so
// a CUDA graph replays with other lengths. A warp goes through its run with a ring of its own in shared memory, filled
// by cp.async some sub-blocks ahead, and attends as decode_tile.cuh says. What a warp attends to of one segment is a
// piece. A piece that is the whole segment becomes output at once. Of the others a warp has two at most, its first and
// its last; the warps of the block join theirs, in the order of units. What a segment has in other blocks is joined by
// decode_combine.cu: a block leaves up to two sums, of the segment that it finds begun (part 0) and of the one that it
// leaves unfinished (part 1), and for the latter a tail {blocks that go on with it, sequence, group, 0}; -1 for none.
// Every order is fixed by the lengths and the grid, so results are the same from run to run.
//
// WARPS, STAGES  warps of a block; sub-blocks in a warp's ring        other macros: decode_tile.cuh
#include "common/async_copy.cuh"
#include "common/reduce.cuh"
#include "sm80/decode_tile.cuh"
#include "sm80/decode_work.cuh"

constexpr int kThreads = WARPS * kWarpSize;
constexpr int kPieces = 2 * WARPS;
constexpr int kDimsOfLane = HEAD_DIM / kWarpSize;
constexpr int kPieceFloats = QUERIES * HEAD_DIM;
constexpr int kRingBytes = STAGES * Page::kBlockBytes;
static_assert(kPieces <= kWarpSize, "a lane looks after each piece");
static_assert(STAGES < kWarpSize, "the first copies come from one set of places");
static_assert(kPieceFloats * 4 <= kRingBytes, "a warp's last piece lies in its ring");

// A piece's segment: begin (-1: there is no such piece), end, sequence, group.
struct SharedState {
    int starts[kThreads + 1], warp_totals[kWarpSize];
    int4 pieces[kPieces];
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

// query [sequences, heads, D], rows of heads query_stride values apart; kv_pages [num_pages, kv_heads, page bytes];
// page_table [sequences, max_pages]; kv_lens [sequences]; output [sequences, heads, D]; all of 16-byte alignment.
// partial_sums float32 [grid, 2, QUERIES, D], partial_stats {top, sum} [grid, 2, QUERIES], tails [grid].
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    qoq_decode_attention_sm80(const uint16_t* __restrict__ query, const uint8_t* __restrict__ kv_pages,
                              const int* __restrict__ page_table, const int* __restrict__ kv_lens,
                              uint16_t* __restrict__ output, float* __restrict__ partial_sums,
                              float2* __restrict__ partial_stats, int4* __restrict__ tails, int sequences,
                              int max_pages, int num_pages, int kv_heads, int queries_of_kv, int passes,
                              int queries_of_pass, int query_stride, int window, float softmax_scale) {
    extern __shared__ __align__(16) uint8_t dynamic_shared[];
    __shared__ SharedState shared;
    float* const first_pieces = reinterpret_cast<float*>(dynamic_shared + WARPS * kRingBytes);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, g = lane / 4, t = lane % 4;
    const HeadShape heads{kv_heads, queries_of_kv, passes, queries_of_pass};
    softmax_scale *= 1.44269504f;  // to exponents of 2

    WorkList<kThreads> work{kv_lens, sequences, max_pages * kPageTokens, window, heads.groups(), nullptr};
    const int total = work.build(shared.starts, shared.warp_totals);
    const Share of_block = share_of(total, gridDim.x, blockIdx.x);
    const Share of_warp = share_of(of_block.count, WARPS, warp);
    const int first_unit = of_block.first + of_warp.first, end_unit = first_unit + of_warp.count;
    if (lane < 2) shared.pieces[2 * warp + lane].x = -1;

    // Sub-blocks are numbered as they lie in kv_pages. Lane i knows where unit i of 32 is, now and for the next 32.
    const auto block_of = [&](int index) {
        if (index >= of_warp.count) return 0;
        const Segment segment = work.locate(first_unit + index);
        const int block = segment.first_block + first_unit + index - segment.begin;
        const int page = __ldg(page_table + static_cast<int64_t>(segment.sequence) * max_pages + block / 2);
        if (static_cast<uint32_t>(page) >= static_cast<uint32_t>(num_pages)) __trap();
        return (page * kv_heads + segment.group / passes) * 2 + block % 2;
    };
    int near = block_of(lane), far = 0, copied = 0;
    const uint32_t ring = shared_address(dynamic_shared + warp * kRingBytes);
    const auto copy_next = [&](uint32_t to) {
        if (copied < of_warp.count) {
            const int block = __shfl_sync(kFullMask, near, copied % kWarpSize);
            const uint8_t* from = kv_pages + static_cast<int64_t>(block) * Page::kBlockBytes + lane * Page::kPieceBytes;
            to += lane * Page::kPieceBytes;
#pragma unroll
            for (int offset = 0; offset < Page::kEntries; offset += Page::kChunkBytes)
                copy_async_16(to + offset, from + offset);
            if (lane < kTileTokens) copy_async_16(to + Page::kEntries, from + Page::kEntries);
            if (++copied % kWarpSize == 0) {
                near = far;
                far = block_of(copied + kWarpSize + lane);
            }
        }
        commit_copies();
    };
    for (int stage = 0; stage < STAGES; ++stage) copy_next(ring + stage * Page::kBlockBytes);
    far = block_of(kWarpSize + lane);

    const auto load_query = [&](const Segment& segment) {
        // Columns without a query repeat the last one.
        const int column = min(kTwice ? g % 4 : g, heads.queries(segment.group) - 1);
        const uint16_t* from = query + static_cast<int64_t>(segment.sequence) * query_stride +
                               (heads.first_head(segment.group) + column) * HEAD_DIM + 8 * t;
        RawQuery raw;
#pragma unroll
        for (int i = 0; i < kParts; ++i) raw.parts[i] = __ldg(reinterpret_cast<const uint4*>(from + 32 * i));
        return raw;
    };
    const auto output_of = [&](const Segment& segment, int i) {
        const int64_t head = static_cast<int64_t>(segment.sequence) * heads.heads() + heads.first_head(segment.group);
        return output + (head + i) * HEAD_DIM;
    };

    if (of_warp.count > 0) {
        int unit = first_unit, stage = 0;
        Segment segment = work.locate(unit);
        RawQuery raw = load_query(segment);
        while (true) {
            const Query prepared = prepare(raw, softmax_scale);
            Attention attention;
            const int begin = unit, end = min(segment.end, end_unit);
            const int first_token = work.first_token(segment.length);
            Segment next = segment;
            for (; unit < end; ++unit) {
                if (unit + 1 == end && end < end_unit) {  // while the last unit is computed
                    next = work.following(segment);
                    raw = load_query(next);
                }
                // A lane copied the codes that it reads; scales and zeros come from other lanes.
                wait_for_copies<STAGES - 1>();
                __syncwarp();
                const int token = (segment.first_block + unit - segment.begin) * kBlockTokens;
                attention.add(prepared, ring + stage * Page::kBlockBytes, first_token - token, segment.length - token);
                __syncwarp();
                copy_next(ring + stage * Page::kBlockBytes);
                stage = stage + 1 == STAGES ? 0 : stage + 1;
            }

            attention.fold();
            const bool is_whole = begin == segment.begin && end == segment.end;
            const int piece = 2 * warp + (begin == first_unit ? 0 : 1);
            // The last piece of a warp comes after all its copies have arrived and have been read.
            float* const sums = begin == first_unit ? first_pieces + warp * kPieceFloats
                                                    : reinterpret_cast<float*>(dynamic_shared + warp * kRingBytes);
#pragma unroll
            for (int i = 0; i < kTilesOfLane; ++i) {
                const int c = kTwice ? t / 2 : i, index = kTwice ? 2 * (t % 2) + c : 2 * t + c;
                float values[Page::kDimsOfGroup];
                attention.values(c, values);
                const float sum = c ? attention.sum[1] : attention.sum[0];
                if (is_whole) {
                    if (index < heads.queries(segment.group))
                        store_values(output_of(segment, index) + Page::kDimsOfGroup * g, values, __frcp_rn(sum));
                } else {
                    store_values(sums + index * HEAD_DIM + Page::kDimsOfGroup * g, values);
                    if (g == 0)
                        shared.stats[piece][index] = make_float2(c ? attention.top[1] : attention.top[0], sum);
                }
            }
            if (!is_whole && lane == 0)
                shared.pieces[piece] = make_int4(segment.begin, segment.end, segment.sequence, segment.group);
            if (unit == end_unit) break;
            segment = next;
        }
    }
    __syncthreads();

    // Join the pieces of each segment. Lane i of every warp looks after piece i; a segment's pieces are neighbours,
    // and the first of them leads.
    const int4 piece = lane < kPieces ? shared.pieces[lane] : make_int4(-1, 0, 0, 0);
    const uint32_t present = __ballot_sync(kFullMask, piece.x >= 0), earlier = present & ((1u << lane) - 1);
    const int previous = __shfl_sync(kFullMask, piece.x, earlier ? 31 - __clz(earlier) : lane);
    const bool leads = piece.x >= 0 && (earlier == 0 || previous != piece.x);
    int turn = 0, parts_after = -1;
    Segment segment{};
    for (uint32_t left = __ballot_sync(kFullMask, leads); left != 0; left &= left - 1) {
        const int leader = __ffs(left) - 1;
        segment.begin = __shfl_sync(kFullMask, piece.x, leader);
        segment.end = __shfl_sync(kFullMask, piece.y, leader);
        segment.sequence = __shfl_sync(kFullMask, piece.z, leader);
        segment.group = __shfl_sync(kFullMask, piece.w, leader);
        const bool is_member = piece.x == segment.begin;
        const uint32_t members = __ballot_sync(kFullMask, is_member);
        const bool is_begun = segment.begin < of_block.first, goes_on = segment.end > of_block.first + of_block.count;
        parts_after = -1;
        if (!is_begun && goes_on)
            parts_after = part_of(segment.end - 1, total, gridDim.x) - static_cast<int>(blockIdx.x);
        for (int i = 0; i < heads.queries(segment.group); ++i, turn = turn + 1 == WARPS ? 0 : turn + 1) {
            if (turn != warp) continue;
            const float2 stats = is_member ? shared.stats[lane][i] : make_float2(-kInfinity, 0.0f);
            float top = stats.x;
#pragma unroll
            for (int lanes = 1; lanes < kWarpSize; lanes *= 2)
                top = fmaxf(top, __shfl_xor_sync(kFullMask, top, lanes));
            const float weight = is_member ? power_of_2(stats.x - top) : 0.0f, sum = warp_sum(weight * stats.y);
            float values[kDimsOfLane] = {};
            for (uint32_t rest = members; rest != 0; rest &= rest - 1) {
                const int member = __ffs(rest) - 1;
                const float of_member = __shfl_sync(kFullMask, weight, member);
                const float* sums = member % 2 ? reinterpret_cast<float*>(dynamic_shared + member / 2 * kRingBytes)
                                               : first_pieces + member / 2 * kPieceFloats;
#pragma unroll
                for (int j = 0; j < kDimsOfLane; ++j)
                    values[j] = fmaf(of_member, sums[i * HEAD_DIM + kDimsOfLane * lane + j], values[j]);
            }
            if (is_begun || goes_on) {
                const int row = (2 * blockIdx.x + (is_begun ? 0 : 1)) * QUERIES + i;
#pragma unroll
                for (int j = 0; j < kDimsOfLane; ++j)
                    partial_sums[row * HEAD_DIM + kDimsOfLane * lane + j] = values[j];
                if (lane == 0) partial_stats[row] = make_float2(top, sum);
            } else {
                uint32_t* const to = reinterpret_cast<uint32_t*>(output_of(segment, i)) + kDimsOfLane / 2 * lane;
                const float factor = __frcp_rn(sum);
#pragma unroll
                for (int j = 0; j < kDimsOfLane / 2; ++j)
                    to[j] = Format::pair(values[2 * j] * factor, values[2 * j + 1] * factor);
            }
        }
    }
    // The last segment is the one that may go on.
    if (threadIdx.x == 0) tails[blockIdx.x] = make_int4(parts_after, segment.sequence, segment.group, 0);

    for (int sequence = blockIdx.x; sequence < sequences; sequence += gridDim.x) {
        if (work.length(sequence) > 0) continue;
        uint4* const to = reinterpret_cast<uint4*>(output + static_cast<int64_t>(sequence) * heads.heads() * HEAD_DIM);
        for (int i = threadIdx.x; i < heads.heads() * HEAD_DIM / 8; i += kThreads) to[i] = make_uint4(0, 0, 0, 0);
    }
}
