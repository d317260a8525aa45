// Attention of one new token a sequence to its keys and values in a paged 4-bit or 8-bit cache.
//
// One block an SM, which does what decode_block.cuh says; cp.async fills a warp's ring some sub-blocks ahead. What a
// segment has in other blocks is joined by decode_combine.cu: a block leaves up to two sums, of the segment that it
// finds begun (part 0) and of the one that it leaves unfinished (part 1), and for the latter a tail {blocks that go on
// with it, sequence, group, 0}; -1 for none.
#include "common/async_copy.cuh"
#include "sm80/decode_block.cuh"

struct CopyRing {
    const uint8_t* kv_pages;
    Places& places;
    uint32_t slots;
    int stage;

    template <bool kFirst>
    DEVICE void fill(int slot) {
        if (!places.is_done()) {
            const int lane = threadIdx.x % kWarpSize;
            const int64_t place = kFirst ? places.next_of_first() : places.next();
            const uint8_t* from = kv_pages + place * Page::kBlockBytes + lane * Page::kPieceBytes;
            const uint32_t to = slots + slot * Page::kBlockBytes + lane * Page::kPieceBytes;
#pragma unroll
            for (int offset = 0; offset < Page::kEntries; offset += Page::kChunkBytes)
                copy_async_16(to + offset, from + offset);
            if (lane < kTileTokens) copy_async_16(to + Page::kEntries, from + Page::kEntries);
        }
        commit_copies();
    }

    // A lane copied the codes that it reads; scales and zeros come from other lanes.
    DEVICE uint32_t wait() const {
        wait_for_copies<STAGES - 1>();
        __syncwarp();
        return slots + stage * Page::kBlockBytes;
    }

    DEVICE void refill() {
        fill<false>(stage);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
};

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
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const HeadShape heads{kv_heads, queries_of_kv, passes, queries_of_pass};
    const Rows rows{query, output, query_stride, heads};

    Work work{kv_lens, sequences, max_pages * kPageTokens, window, heads.groups(), nullptr};
    const int total = work.build(shared.starts, shared.warp_totals);
    const Run of_block = Run{0, total}.part(gridDim.x, blockIdx.x), of_warp = of_block.part(WARPS, warp);
    if (lane < 2) shared.pieces[2 * warp + lane].x = -1;

    Places places{work, page_table, max_pages, num_pages, heads, of_warp};
    int settled;
    const Segment first = places.begin(0, settled);
    CopyRing ring{kv_pages, places, shared_address(dynamic_shared + warp * kRingBytes), 0};
#pragma unroll 1
    for (int stage = 0; stage < STAGES; ++stage) ring.fill<true>(stage);
    rows.clear_empty(work, gridDim.x);

    const auto last_sums = [&](int w) { return reinterpret_cast<float*>(dynamic_shared + w * kRingBytes); };
    if (of_warp.count() > 0)
        attend(ring, work, rows, of_warp, first, rows.load(first), shared, first_pieces + warp * kPieceFloats,
               last_sums(warp), softmax_scale * 1.44269504f);  // to exponents of 2
    if (threadIdx.x == 0) tails[blockIdx.x] = make_int4(-1, 0, 0, 0);
    __syncthreads();
    join_pieces(
        shared, heads,
        [&](int piece) { return piece % 2 ? last_sums(piece / 2) : first_pieces + piece / 2 * kPieceFloats; },
        [&](const Segment& segment, int i, const Joined& joined) {
            const bool is_begun = segment.begin < of_block.first, goes_on = segment.end > of_block.end;
            if (!is_begun && !goes_on) {
                rows.finish(segment, i, joined.values, joined.sum);
                return;
            }
            const int row = (2 * blockIdx.x + (is_begun ? 0 : 1)) * QUERIES + i;
#pragma unroll
            for (int j = 0; j < kDimsOfLane; ++j)
                partial_sums[row * HEAD_DIM + kDimsOfLane * lane + j] = joined.values[j];
            if (lane != 0) return;
            partial_stats[row] = make_float2(joined.top, joined.sum);
            if (!is_begun && i == 0) {
                const int parts_after = part_of(segment.end - 1, total, gridDim.x) - static_cast<int>(blockIdx.x);
                tails[blockIdx.x] = make_int4(parts_after, segment.sequence, segment.group, 0);
            }
        });
}
