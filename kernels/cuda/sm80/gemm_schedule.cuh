// Which output tiles and which inputs of the sum a block works on.
//
// The unit is one step of one tile: the inputs of a pipeline stage. "Stream" (stream-K) gives every block the same
// number of consecutive units, so a tile may be shared between blocks; otherwise a block takes whole tiles, gridDim.x
// apart.
#pragma once
#include "common/types.cuh"

struct Schedule {
    int k_steps, tiles_n, tiles_m;
    // "Stream": the first `longer` blocks have units_each + 1 units, the others units_each. The host divides, since a
    // division by the number of blocks would be done again by every thread.
    int stream, units_each, longer;

    DEVICE int first_unit(int block) const { return block * units_each + min(block, longer); }

    // The block that holds the first unit of `tile`. No other shared tile begins in the same block.
    DEVICE int owner(int tile) const {
        const int unit = tile * k_steps, in_longer = longer * (units_each + 1);
        return unit < in_longer ? unit / (units_each + 1) : longer + (unit - in_longer) / units_each;
    }

    // Tiles of the same channels come one after the other, in bands of 32, so that blocks that run at the same time
    // share weights and activations in the L2.
    DEVICE void place(int tile, int& tile_n, int& tile_m) const {
        constexpr int kBand = 32;
        const int band = tile / (kBand * tiles_n);
        const int height = min(kBand, tiles_m - band * kBand);
        const int inside = tile - band * kBand * tiles_n;
        tile_n = inside / height;
        tile_m = band * kBand + inside % height;
    }
};

// Walks the units of a block in order.
struct Cursor {
    int tile, step, left;
    int k_steps, stride;

    DEVICE Cursor(const Schedule& schedule) : k_steps(schedule.k_steps) {
        if (schedule.stream) {
            const int first = schedule.first_unit(blockIdx.x);
            left = schedule.first_unit(blockIdx.x + 1) - first;
            tile = first / k_steps;
            step = first - tile * k_steps;
            stride = 1;
        } else {
            const int tiles = schedule.tiles_n * schedule.tiles_m;
            tile = blockIdx.x;
            step = 0;
            stride = gridDim.x;
            left = tile < tiles ? ((tiles - 1 - tile) / stride + 1) * k_steps : 0;
        }
    }

    // Returns whether the next unit belongs to another tile.
    DEVICE bool advance() {
        --left;
        if (++step < k_steps) return false;
        step = 0;
        tile += stride;
        return true;
    }
};
