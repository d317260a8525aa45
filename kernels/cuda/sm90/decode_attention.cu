// Hopper's decode attention: as sm80/decode_attention.cu, with the same results up to the order of sums, but
// - a warp's ring is filled by bulk copies, one a sub-block, which cost a lane one instruction;
// - one launch: what a segment has in several blocks is joined by the block where it ends;
// - it lets the next kernel start, and itself starts on what cannot change any more while the last one ends;
// - of a short list some blocks have nothing, and end: joining parts of a segment takes longer than some more units.
#include "common/global_memory.cuh"
#include "sm80/decode_block.cuh"
#include "sm90/async.cuh"

constexpr int kPartsAtOnce = 8;
constexpr int kLeastUnits = 4;  // of a block that has any
constexpr uint32_t kNothing = 0xFFFFFFFFu, kNaN = 0x7FFFFFFFu;

struct BulkRing {
    const uint8_t* kv_pages;
    Places& places;
    uint32_t slots, barriers;
    bool is_read_once;
    int stage, parity;

    DEVICE void make() const {
        if (threadIdx.x % kWarpSize == 0) {  // which will also expect bytes: racecheck cannot follow that to another lane
#pragma unroll
            for (int i = 0; i < STAGES; ++i) barrier_init(barriers + 8 * i, 1);
        }
        barriers_made();
        __syncwarp();
    }

    template <bool kFirst>
    DEVICE void fill(int slot) const {
        if (places.is_done()) return;
        const int64_t place = kFirst ? places.next_of_first() : places.next();
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
        fill<false>(stage);
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// What a block leaves of the segment that goes on in later blocks, for the one where the segment ends, which waits for it
// and sums up. Words are kNothing until they are written, so that they need no flag beside them and no order among them,
// and again after they were read. Only blocks before one's own are waited for: those have started.
struct Slots {
    float* sums;    // [grid, QUERIES, D]
    float2* stats;  // {top, sum} [grid, QUERIES]

    DEVICE void leave(int block, int i, const Joined& joined) const {
        const int lane = threadIdx.x % kWarpSize, row = block * QUERIES + i;
        leave_numbers(sums + row * HEAD_DIM + kDimsOfLane * lane, joined.values);
        const float of_query[2] = {joined.top, joined.sum};
        if (lane == 0) leave_numbers(reinterpret_cast<float*>(stats + row), of_query);
    }

    // The parts of query i in blocks `first` and after, and then `own`.
    DEVICE Joined take(int first, int i, const Joined& own) const {
        const int lane = threadIdx.x % kWarpSize, parts = blockIdx.x - first;
        Joined all;
#pragma unroll 1
        for (int begin = 0; begin < parts; begin += kPartsAtOnce) {
            float2 of_part[kPartsAtOnce];
            float more[kPartsAtOnce][kDimsOfLane];
            bool is_missing;
            do {
                is_missing = false;
#pragma unroll
                for (int k = 0; k < kPartsAtOnce; ++k) {
                    const int row = (first + begin + (begin + k < parts ? k : 0)) * QUERIES + i;
                    float numbers[2];
                    is_missing |= !look(reinterpret_cast<const float*>(stats + row), numbers);
                    is_missing |= !look(sums + row * HEAD_DIM + kDimsOfLane * lane, more[k]);
                    of_part[k] = make_float2(numbers[0], numbers[1]);
                }
            } while (__any_sync(kFullMask, is_missing));
#pragma unroll
            for (int k = 0; k < kPartsAtOnce; ++k) {
                if (begin + k >= parts) {
                    of_part[k] = make_float2(-kInfinity, 0.0f);
                    continue;
                }
                const int row = (first + begin + k) * QUERIES + i;
                clear<kDimsOfLane>(sums + row * HEAD_DIM + kDimsOfLane * lane);
                if (lane == 0) clear<2>(reinterpret_cast<float*>(stats + row));
            }
            all.add(of_part, more);
        }
        const float2 of_own[1] = {make_float2(own.top, own.sum)};
        float values[1][kDimsOfLane];
#pragma unroll
        for (int j = 0; j < kDimsOfLane; ++j) values[0][j] = own.values[j];
        all.add(of_own, values);
        return all;
    }

  private:
    template <int kCount>
    static DEVICE void leave_numbers(float* to, const float (&numbers)[kCount]) {
        uint32_t words[kCount];
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            const uint32_t word = __float_as_uint(numbers[j]);
            words[j] = word == kNothing ? kNaN : word;
        }
        store_relaxed(to, words);
    }

    template <int kCount>
    static DEVICE void clear(float* to) {
        uint32_t words[kCount];
#pragma unroll
        for (int j = 0; j < kCount; ++j) words[j] = kNothing;
        store_relaxed(to, words);
    }

    template <int kCount>
    static DEVICE bool look(const float* from, float (&numbers)[kCount]) {
        uint32_t words[kCount];
        load_relaxed(from, words);
        bool is_there = true;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            is_there &= words[j] != kNothing;
            numbers[j] = __uint_as_float(words[j]);
        }
        return is_there;
    }
};

// As for qoq_decode_attention_sm80, with slots in place of partial sums and tails. fresh_tokens: -1, or how many of the
// last tokens of a sequence earlier kernels may still be writing; kv_lens, page_table and the tokens before are settled.
// Pointers are not __restrict__: no load may be moved to before the wait.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    qoq_decode_attention_sm90(const uint16_t* query, const uint8_t* kv_pages, const int* page_table, const int* kv_lens,
                              uint16_t* output, float* slot_sums, float2* slot_stats, int sequences, int max_pages,
                              int num_pages, int kv_heads, int queries_of_kv, int passes, int queries_of_pass,
                              int query_stride, int window, int fresh_tokens, float softmax_scale) {
    extern __shared__ __align__(128) uint8_t dynamic_shared[];
    __shared__ SharedState shared;
    __shared__ uint64_t barriers[WARPS][STAGES];
    float* const first_pieces = reinterpret_cast<float*>(dynamic_shared + WARPS * kRingBytes);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const HeadShape heads{kv_heads, queries_of_kv, passes, queries_of_pass};
    const Rows rows{query, output, query_stride, heads};

    allow_next_kernel();
    if (lane < 2) shared.pieces[2 * warp + lane].x = -1;
    if (fresh_tokens < 0) wait_for_last_kernel();
    Work work{kv_lens, sequences, max_pages * kPageTokens, window, heads.groups(), nullptr};
    const int total = work.build(shared.starts, shared.warp_totals);
    const int blocks = min(static_cast<int>(gridDim.x), max(1, total / kLeastUnits)), block = blockIdx.x;
    if (block >= blocks) return;  // the first never does, and waits
    const Run of_block = Run{0, total}.part(blocks, block), of_warp = of_block.part(WARPS, warp);

    Places places{work, page_table, max_pages, num_pages, heads, of_warp};
    BulkRing ring{kv_pages, places, shared_address(dynamic_shared + warp * kRingBytes), shared_address(barriers[warp]),
                  passes == 1, 0, 0};
    ring.make();
    int settled;
    const Segment first = places.begin(fresh_tokens, settled);
    const int early = fresh_tokens < 0 ? STAGES : min(STAGES, settled);
#pragma unroll 1
    for (int stage = 0; stage < early; ++stage) ring.fill<true>(stage);
    if (fresh_tokens >= 0) wait_for_last_kernel();
    const RawQuery raw = rows.load(first);
#pragma unroll 1
    for (int stage = early; stage < STAGES; ++stage) ring.fill<true>(stage);
    rows.clear_empty(work, blocks);

    const auto last_sums = [&](int w) { return reinterpret_cast<float*>(dynamic_shared + w * kRingBytes); };
    if (of_warp.count() > 0)
        attend(ring, work, rows, of_warp, first, raw, shared, first_pieces + warp * kPieceFloats, last_sums(warp),
               softmax_scale * 1.44269504f);  // to exponents of 2
    __syncthreads();

    const Slots slots{slot_sums, slot_stats};
    join_pieces(
        shared, heads,
        [&](int piece) { return piece % 2 ? last_sums(piece / 2) : first_pieces + piece / 2 * kPieceFloats; },
        [&](const Segment& segment, int i, const Joined& joined) {
            if (segment.end > of_block.end) {
                slots.leave(blockIdx.x, i, joined);
            } else if (segment.begin < of_block.first) {
                const Joined all = slots.take(part_of(segment.begin, total, blocks), i, joined);
                rows.finish(segment, i, all.values, all.sum);
            } else {
                rows.finish(segment, i, joined.values, joined.sum);
            }
        });
}
