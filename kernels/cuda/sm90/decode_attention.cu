// Hopper's decode attention: as sm80/decode_attention.cu, with the same results up to the order of sums, but
// - a warp's ring is filled by bulk copies, one a sub-block, which cost a lane one instruction;
// - one launch: what a segment has in several blocks is joined by the block that comes last with its part, for each
//   query on its own. The order of the sum is that of the units, whoever comes last;
// - it lets the next kernel start, and itself starts on what cannot change any more while the last one ends.
//
// A block leaves up to two partial sums, of the segment that it finds begun (part 0) and of the one that it leaves
// unfinished (part 1). Counters, of the block where a segment begins, are zero between launches.
#include "common/global_memory.cuh"
#include "sm80/decode_block.cuh"
#include "sm90/async.cuh"

constexpr int kPartsAtOnce = 8;

struct BulkRing {
    const uint8_t* kv_pages;
    const Work& work;
    Places& places;
    uint32_t slots, barriers;
    bool is_read_once;
    int stage, parity;

    DEVICE void make() const {
        if (threadIdx.x % kWarpSize < STAGES) barrier_init(barriers + 8 * (threadIdx.x % kWarpSize), 1);
        barriers_made();
        __syncwarp();
    }

    DEVICE void fill(int slot) {
        if (places.is_done()) return;
        const int64_t place = places.next(work);
        if (threadIdx.x % kWarpSize != 0) return;
        const uint8_t* const from = kv_pages + place * Page::kBlockBytes;
        const uint32_t to = slots + slot * Page::kBlockBytes, barrier = barriers + 8 * slot;
        barrier_expect(barrier, Page::kBlockBytes);
        if (is_read_once)
            bulk_copy_once(to, from, Page::kBlockBytes, barrier);
        else
            bulk_copy(to, from, Page::kBlockBytes, barrier);
    }

    DEVICE uint32_t wait() const {
        barrier_wait(barriers + 8 * stage, parity);
        return slots + stage * Page::kBlockBytes;
    }

    DEVICE void refill() {
        fill(stage);
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

struct Partials {
    float* sums;
    float2* stats;
    int* counters;

    // Leave a query's part of a segment, `parts` of which lie in blocks `first` and after. Where all others are there
    // already, returns true with the whole in `values` and `sum`.
    DEVICE bool join(int first, int parts, int i, float top, float& sum, float (&values)[kDimsOfLane]) const {
        const int lane = threadIdx.x % kWarpSize;
        const auto row_of = [&](int part) { return (2 * (first + part) + (part == 0 ? 1 : 0)) * QUERIES + i; };
        const int own = row_of(blockIdx.x - first);
#pragma unroll
        for (int j = 0; j < kDimsOfLane; ++j) sums[own * HEAD_DIM + kDimsOfLane * lane + j] = values[j];
        if (lane == 0) stats[own] = make_float2(top, sum);

        int* const counter = counters + first * QUERIES + i;
        int earlier = 0;
        __syncwarp();
        if (lane == 0) earlier = add_acquire_release(counter, 1);
        if (__shfl_sync(kFullMask, earlier, 0) + 1 < parts) return false;
        if (lane == 0) *counter = 0;
        __syncwarp();

        top = -kInfinity, sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kDimsOfLane; ++j) values[j] = 0.0f;
        for (int begin = 0; begin < parts; begin += kPartsAtOnce) {
            float2 of_part[kPartsAtOnce];
            float more[kPartsAtOnce][kDimsOfLane];
            float raised = top;
#pragma unroll
            for (int k = 0; k < kPartsAtOnce; ++k) {
                const bool is_there = begin + k < parts;
                const int row = row_of(is_there ? begin + k : begin);
                of_part[k] = stats[row];
#pragma unroll
                for (int j = 0; j < kDimsOfLane; ++j) more[k][j] = sums[row * HEAD_DIM + kDimsOfLane * lane + j];
                if (!is_there) of_part[k] = make_float2(-kInfinity, 0.0f);
            }
#pragma unroll
            for (int k = 0; k < kPartsAtOnce; ++k) raised = fmaxf(raised, of_part[k].x);
            const float before = power_of_2(top - raised);
            top = raised, sum *= before;
#pragma unroll
            for (int j = 0; j < kDimsOfLane; ++j) values[j] *= before;
#pragma unroll
            for (int k = 0; k < kPartsAtOnce; ++k) {
                const float weight = power_of_2(of_part[k].x - top);
                sum = fmaf(weight, of_part[k].y, sum);
#pragma unroll
                for (int j = 0; j < kDimsOfLane; ++j) values[j] = fmaf(weight, more[k][j], values[j]);
            }
        }
        return true;
    }
};

// As for qoq_decode_attention_sm80, with counters [grid, QUERIES]. fresh_tokens: -1, or how many of the last tokens of
// a sequence the kernel before may still be writing; kv_lens, page_table and the other tokens must then be settled.
// Pointers are not __restrict__: no load may be moved to before the wait.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    qoq_decode_attention_sm90(const uint16_t* query, const uint8_t* kv_pages, const int* page_table, const int* kv_lens,
                              uint16_t* output, float* partial_sums, float2* partial_stats, int* counters,
                              int sequences, int max_pages, int num_pages, int kv_heads, int queries_of_kv, int passes,
                              int queries_of_pass, int query_stride, int window, int fresh_tokens,
                              float softmax_scale) {
    extern __shared__ __align__(128) uint8_t dynamic_shared[];
    __shared__ SharedState shared;
    __shared__ uint64_t barriers[WARPS][STAGES];
    float* const first_pieces = reinterpret_cast<float*>(dynamic_shared + WARPS * kRingBytes);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const HeadShape heads{kv_heads, queries_of_kv, passes, queries_of_pass};
    const Rows rows{query, output, query_stride, heads};

    allow_next_kernel();
    if (fresh_tokens < 0) wait_for_last_kernel();
    Work work{kv_lens, sequences, max_pages * kPageTokens, window, heads.groups(), nullptr};
    const int total = work.build(shared.starts, shared.warp_totals);
    const Run of_block = Run{0, total}.part(gridDim.x, blockIdx.x), of_warp = of_block.part(WARPS, warp);
    if (lane < 2) shared.pieces[2 * warp + lane].x = -1;

    Places places{page_table, max_pages, num_pages, kv_heads, passes, of_warp};
    const int settled = places.begin(work, max(fresh_tokens, 0));
    BulkRing ring{kv_pages, work, places, shared_address(dynamic_shared + warp * kRingBytes),
                  shared_address(barriers[warp]), passes == 1, 0, 0};
    ring.make();
    const int early = fresh_tokens < 0 ? STAGES : min(STAGES, settled);
    int filled = 0;
    for (; filled < early; ++filled) ring.fill(filled);
    if (fresh_tokens >= 0) wait_for_last_kernel();
    for (; filled < STAGES; ++filled) ring.fill(filled);
    places.look_ahead(work);

    const auto last_sums = [&](int w) { return reinterpret_cast<float*>(dynamic_shared + w * kRingBytes); };
    attend(ring, work, rows, of_warp, shared, first_pieces + warp * kPieceFloats, last_sums(warp),
           softmax_scale * 1.44269504f);  // to exponents of 2
    __syncthreads();

    const Partials partials{partial_sums, partial_stats, counters};
    join_pieces(
        shared, heads,
        [&](int piece) { return piece % 2 ? last_sums(piece / 2) : first_pieces + piece / 2 * kPieceFloats; },
        [&](const Segment& segment, int i, float top, float sum, float (&values)[kDimsOfLane]) {
            if (segment.begin < of_block.first || segment.end > of_block.end) {
                const int first = part_of(segment.begin, total, gridDim.x);
                const int parts = part_of(segment.end - 1, total, gridDim.x) - first + 1;
                if (!partials.join(first, parts, i, top, sum, values)) return;
            }
            rows.finish(segment, i, values, sum);
        });
    rows.clear_empty(work);
}
