// Results from the registers of matrix products to rows of memory, without shared memory in between.
#pragma once

#include "cuda/rows.cuh"
#include "cuda/wgmma_tiles.cuh"

namespace tf {
namespace cuda {

// One of the two rows of accumulators that a thread has a part of (row_of), times `scale`, to `target`; its first
// `columns`. All threads of a warp take part; `inside` says whether this one's row exists. A scale of 0 makes zeros,
// whatever the numbers are. Every 32 columns, the four threads of a row write 64 bytes: whole sectors.
template <class E, int N>
TF_DEVICE void store_row(const float (&x)[N / 2], int row, float scale, bool inside, E* target, int columns) {
    TF_UNROLL
    for (int group = 0; group < N / 32; ++group) {
        uint32_t word[4];
        TF_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int e = 16 * group + 4 * i + 2 * row;
            word[i] = ptx::pack<E>(x[e] * scale, x[e + 1] * scale);
        }
        exchange_in_quad(word);
        const int chunk = 4 * group + ptx::lane() % 4;
        const Vector16 vector = scale == 0.0f ? Vector16{} : Vector16{{word[0], word[1], word[2], word[3]}};
        if (!inside) continue;
        if (chunk * 8 + 8 <= columns) {
            *reinterpret_cast<Vector16*>(target + chunk * 8) = vector;
        } else if (chunk * 8 < columns) {
            scatter_chunk(target, chunk, columns, vector);
        }
    }
}

}  // namespace cuda
}  // namespace tf
