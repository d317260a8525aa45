// Which output tiles and which inputs of the sum a block works on.
//
// The unit is one step of one tile: the inputs of a pipeline stage. A block takes whole tiles, gridDim.x apart, and
// then its share of the tiles after the last `whole` one (stream-K): every block gets the same number of consecutive
// units of these, so that a tile may be shared between blocks.
#pragma once
#include "common/types.cuh"

// a / b for a >= 0, b > 0 and a quotient below 2^20, with which the float division is off by less than one. Exact, and
// a third of what the compiler makes of `/`; a block that changes its tile has nothing else to do meanwhile.
DEVICE int quotient(int a, int b) {
    const int near = __float2int_rz(__fdividef(__int2float_rn(a), __int2float_rn(b)));
    const int rest = a - near * b;
    return near + (rest >= b) - (rest < 0);
}

struct Schedule {
    int k_steps, tiles_n, tiles_m;
    // Of the tiles from `whole` on, the first `longer` blocks have units_each + 1 units, the others units_each. The
    // host divides, since a division by the number of blocks would be done again by every thread.
    int whole, units_each, longer;

    DEVICE int first_unit(int block) const { return block * units_each + min(block, longer); }

    // The block that holds the first unit of a shared tile. No other shared tile begins in the same block.
    DEVICE int owner(int tile) const {
        const int unit = (tile - whole) * k_steps, in_longer = longer * (units_each + 1);
        return unit < in_longer ? unit / (units_each + 1) : longer + (unit - in_longer) / units_each;
    }

    // Tiles of the same channels come one after the other, in bands of 8, so that blocks that run at the same time
    // share weights and activations in the L2.
    DEVICE void place(int tile, int& tile_n, int& tile_m) const {
        constexpr int kBand = 8;
        const int band = quotient(tile, kBand * tiles_n);
        const int height = min(kBand, tiles_m - band * kBand);
        const int inside = tile - band * kBand * tiles_n;
        tile_n = quotient(inside, height);
        tile_m = band * kBand + inside - tile_n * height;
    }
};

// Walks the units of a block: runs of steps of one tile.
struct Cursor {
    int tile, step;    // where the run began
    int run, left;     // units of this run that are left, and of those after it; 0 at the end

    DEVICE explicit Cursor(const Schedule& schedule) : tile(blockIdx.x), step(0), run(schedule.k_steps), left(0) {
        if (tile >= schedule.whole) enter_shared(schedule);
    }

    DEVICE void next_run(const Schedule& schedule) {
        if (tile < schedule.whole) {
            tile += gridDim.x;
            run = schedule.k_steps;
            if (tile >= schedule.whole) enter_shared(schedule);
        } else {
            ++tile;
            step = 0;
            run = min(schedule.k_steps, left);
            left -= run;
        }
    }

    DEVICE void enter_shared(const Schedule& schedule) {
        const int first = schedule.first_unit(blockIdx.x), units = schedule.first_unit(blockIdx.x + 1) - first;
        const int tiles = first / schedule.k_steps;
        tile = schedule.whole + tiles;
        step = first - tiles * schedule.k_steps;
        run = min(schedule.k_steps - step, units);
        left = units - run;
    }
};
