// The tiles of the backward pass on Hopper, the float32 sums of dquery that blocks of keys add to, and their way into
// dquery.
//
// Warpgroups hold dquery of a tile as products leave it in registers, and so it lies in memory: a tile is a run of
// pieces, 64 rows by 64 columns each, and a piece is what 128 threads held of it, four floats of each thread after four
// floats of the next. Then each piece is one instruction's copy, from and to memory without gaps, and threads write it
// without bank conflicts.
#pragma once

#include "cuda/backward_elements_sm90.cuh"
#include "cuda/rows.cuh"

namespace tf {
namespace cuda {

template <int kHeadDim>
struct BackwardTilesSm90 {
    static constexpr int kBlockM = kHeadDim == 64 ? 128 : 64, kBlockN = kHeadDim == 256 ? 64 : 128;
    static constexpr int kPieceFloats = 64 * 64, kPieces = kBlockM * kHeadDim / kPieceFloats;

    // Tiles of packed rows of all sequences and KV heads. Packed sequences begin at the tile that their first row would
    // fall into, and one further for each sequence before them, since each may fill its last tile in part only.
    static TF_INLINE int64_t tiles_of_head(const Problem& p) {
        return p.packed ? p.total_q * p.group_size / kBlockM + p.batch : ceil_div(p.seqlen_q * p.group_size, kBlockM);
    }
    static TF_INLINE int64_t tile_count(const Problem& p) {
        return tiles_of_head(p) * p.num_kv_heads * (p.packed ? 1 : p.batch);
    }
    static TF_DEVICE int64_t first_tile(const Problem& p, const DeviceSequence& s, int kv_head) {
        const int64_t head = s.batch * p.num_kv_heads + kv_head;
        const int64_t before = p.packed ? s.first_query * p.group_size / kBlockM + s.index : 0;
        return head * tiles_of_head(p) + before;
    }
};

// The first `count` of eight elements to memory, all at once where rows are aligned.
template <class E>
TF_DEVICE void store_chunk(E* target, int count, const Vector16& chunk, bool aligned) {
    if (aligned && count == 8) {
        *reinterpret_cast<Vector16*>(target) = chunk;
    } else {
        scatter_chunk(target, 0, count, chunk);
    }
}

// dquery = sums * softmax_scale. Grid: jobs, tiles = tiles of packed rows of the longest sequence.
template <class E, int kHeadDim>
struct BackwardPostprocess {
    using Tiles = BackwardTilesSm90<kHeadDim>;
    static constexpr int kThreads = 256, kMinBlocks = 2, kBlockM = Tiles::kBlockM, kBlockN = 0, kSharedBytes = 0;

    // What a unit is: 8 columns of two rows, 8 apart, are 16 floats in a row in memory.
    static constexpr int kUnits = kBlockM * kHeadDim / 16, kEach = kUnits / kThreads;

    static TF_DEVICE void run(const Arguments& a, char*) {
        const Problem& p = a.problem;
        const Job job = job_of(a, ptx::block_x(), false);
        const DeviceSequence s = sequence_of(a, job.batch);
        const PackedRows rows = packed_rows(a, s, job, kBlockM);
        if (rows.count == 0) return;
        const int64_t tile = Tiles::first_tile(p, s, job.kv_head) + job.tile;
        const float* const sums = a.dquery_sum + tile * kBlockM * kHeadDim;
        TF_UNROLL
        for (int i = 0; i < kEach; ++i) {
            // In a piece: 8 groups of 8 columns, 4 warps of 16 rows, 8 pairs of rows.
            const int unit = i * kThreads + ptx::thread(), piece = unit / 256;
            const int group = unit / 32 % 8, row_in_piece = unit / 8 % 4 * 16 + unit % 8;
            const int row = row_in_piece + (kHeadDim == 64 ? piece * 64 : 0);
            const int column = group * 8 + (kHeadDim == 64 ? 0 : piece * 64);
            const int count = min_of(8, static_cast<int>(p.head_dim) - column);
            if (count <= 0) continue;
            const Four* const source = reinterpret_cast<const Four*>(sums + unit * 16);
            Four four[4];
            TF_UNROLL
            for (int t = 0; t < 4; ++t) four[t] = source[t];
            TF_UNROLL
            for (int r = 0; r < 2; ++r) {
                if (!rows.has(row + 8 * r)) continue;
                Vector16 chunk;
                TF_UNROLL
                for (int t = 0; t < 4; ++t) {
                    chunk.word[t] =
                        ptx::pack<E>(four[t].x[2 * r] * p.softmax_scale, four[t].x[2 * r + 1] * p.softmax_scale);
                }
                E* const target = mutable_row_at<E>(p.dquery, s.batch, rows.head(row + 8 * r),
                                                    s.first_query + rows.position(row + 8 * r));
                store_chunk(target + column, count, chunk, a.aligned);
            }
        }
    }
};

}  // namespace cuda
}  // namespace tf
