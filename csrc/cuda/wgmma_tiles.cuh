// Matrix products of a warpgroup whose operands are tiles of shared memory (cuda/tile.cuh: chunk_offset).
#pragma once

#include "cuda/tile.cuh"

namespace tf {
namespace cuda {

// A tile as an operand of wgmma. Its M or N runs along the tile's rows and the sum along its columns, or, kTransposed,
// M or N along the columns and the sum along the rows. kTileRows: rows of the tile in memory; the operand may begin at
// any row that is a multiple of 8 (`tile` + 128 bytes a row), and at any group of 64 columns (kTileRows * 128 bytes).
template <int kTileRows, bool kTransposed>
struct TileOperand {
    uint32_t low, high;  // of the descriptor

    explicit TF_DEVICE TileOperand(const char* tile) {
        const uint64_t descriptor = ptx::matrix_descriptor(tile, kTransposed ? kTileRows * 128 : 16, 1024);
        low = static_cast<uint32_t>(descriptor);
        high = static_cast<uint32_t>(descriptor >> 32);
    }

    // The descriptor of entries 16k to 16k + 15 of the sum. Addresses count 16 bytes, in the lowest 14 bits, and never
    // carry into other fields.
    TF_DEVICE uint64_t step(int k) const {
        const int bytes = kTransposed ? k * 16 * 128 : k / 4 * kTileRows * 128 + k % 4 * 32;
        return static_cast<uint64_t>(high) << 32 | (low + static_cast<uint32_t>(bytes / 16));
    }
};
template <int kTileRows>
using RowOperand = TileOperand<kTileRows, false>;
template <int kTileRows>
using ColumnOperand = TileOperand<kTileRows, true>;

// d (64 x N) = a b, or d += a b, over kSum entries; asynchronous, and to be followed by wgmma_commit.
template <class E, int N, int kSum, int kRowsA, bool kTransposedA, int kRowsB, bool kTransposedB>
TF_DEVICE void multiply(float (&d)[N / 2], const TileOperand<kRowsA, kTransposedA>& a,
                        const TileOperand<kRowsB, kTransposedB>& b, bool accumulate) {
    ptx::wgmma_fence();
    TF_UNROLL
    for (int k = 0; k < kSum / 16; ++k) {
        ptx::wgmma<E, N, kTransposedA, kTransposedB>(d, a.step(k), b.step(k), accumulate || k > 0);
    }
}
// The same with `a` in registers, fragments of 16 columns as pack_rows makes them.
template <class E, int N, int kSum, int kRowsB, bool kTransposedB>
TF_DEVICE void multiply(float (&d)[N / 2], const uint32_t (&a)[kSum / 16][4],
                        const TileOperand<kRowsB, kTransposedB>& b, bool accumulate) {
    ptx::wgmma_fence();
    TF_UNROLL
    for (int k = 0; k < kSum / 16; ++k) ptx::wgmma<E, N, kTransposedB>(d, a[k], b.step(k), accumulate || k > 0);
}

// A thread has two neighbouring columns in each group of eight. Four threads of a row exchange theirs, so that each has
// all of one group and stores 16 bytes: word i of thread t and word t of thread i change places.
TF_DEVICE void exchange_in_quad(uint32_t (&word)[4]) {
    TF_UNROLL
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = (ptx::lane() & bit) != 0;
        TF_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int low = bit == 1 ? 2 * i : i, high = low + bit;
            const uint32_t other = ptx::shuffle_xor(upper ? word[low] : word[high], bit);
            word[low] = upper ? other : word[low];
            word[high] = upper ? word[high] : other;
        }
    }
}

}  // namespace cuda
}  // namespace tf
