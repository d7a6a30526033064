// Joins partial results of the same rows: those of warps that shared a block's keys, and those of splits.
#pragma once

#include "cuda/rows.cuh"
#include "cuda/softmax.cuh"

namespace tf {
namespace cuda {

struct alignas(16) Float4 {
    float x, y, z, w;
};

// Part i of row r: the sums over its keys, relative to the maximum top, and the total of its exponentials. Rows are
// counted in the tile (shared memory), or by their place in lse (`global`).
struct Parts {
    const float* sums;
    const float* top;
    const float* total;
    int count, sums_row;             // parts; floats from one row's sums to the next
    int64_t sums_part, number_part;  // floats from one part to the next
    bool global;

    TF_DEVICE int64_t place(const Arguments& a, const DeviceSequence& s, const PackedRows& rows, int row) const {
        if (!global) return row;
        return a.problem.lse_index(s.index, rows.head(row), s.first_query, rows.position(row));
    }
};

// The splits of a tile, as they lie in global memory.
TF_DEVICE Parts split_parts(const Arguments& a) {
    const Problem& p = a.problem;
    const int64_t count = p.num_heads * p.total_q;
    return {
        a.partial_sums, a.partial_top, a.partial_total, a.splits, static_cast<int>(p.head_dim_v), count * p.head_dim_v,
        count,          true};
}

// Puts a warp's accumulator of 16 x kColumns where row r (of these 16) begins at target(r); nullptr where there is
// none.
template <int kColumns, class RowTarget>
TF_DEVICE void write_sums(const float (&sums)[kColumns / 2], int columns, RowTarget&& target) {
    float* begin[2] = {target(ptx::lane() / 4), target(ptx::lane() / 4 + 8)};
    TF_UNROLL
    for (int e = 0; e < kColumns / 2; ++e) {
        if (begin[row_of(e)] != nullptr && column_of(e) < columns) begin[row_of(e)][column_of(e)] = sums[e];
    }
}

// The weights of the parts of each row into weights[row * parts.count + part], and what is stored of a row: of the
// result if `final`, else of this split. By all warps of the block.
template <int kWarps>
TF_DEVICE void join_numbers(const Arguments& a, const DeviceSequence& s, const PackedRows& rows, const Parts& parts,
                            float factor, bool final, int split, float* weights) {
    const int lane = ptx::lane();
    for (int row = ptx::warp(); row < rows.count; row += kWarps) {
        const int64_t place = parts.place(a, s, rows, row);
        float top = -kInfinity, total = 0.0f;
        for (int i = lane; i < parts.count; i += 32) {
            top = __builtin_fmaxf(top, parts.top[i * parts.number_part + place]);
        }
        for (int x = 16; x > 0; x /= 2) top = __builtin_fmaxf(top, ptx::shuffle_xor(top, x));
        const float limit = top == -kInfinity ? 0.0f : top;
        for (int i = lane; i < parts.count; i += 32) {
            const int64_t at = i * parts.number_part + place;
            const float weight = ptx::exp2((parts.top[at] - limit) * factor);
            total += parts.total[at] * weight;
            weights[row * parts.count + i] = weight;
        }
        for (int x = 16; x > 0; x /= 2) total += ptx::shuffle_xor(total, x);
        if (final) {
            const RowEnd end = finish_row(a, top, total, rows.head(row), true, factor);
            for (int i = lane; i < parts.count; i += 32) weights[row * parts.count + i] *= end.scale;
            if (lane == 0) store_row_numbers(a, s, rows.head(row), rows.position(row), end);
        } else if (lane == 0) {
            const Parts splits = split_parts(a);
            const int64_t at = split * splits.number_part + splits.place(a, s, rows, row);
            a.partial_top[at] = top;
            a.partial_total[at] = total;
        }
    }
}

// Eight columns of a row: the weighted sum of its parts first, first + step, ...
TF_DEVICE void join_chunk(const Parts& parts, int64_t place, const float* weights, int chunk, int columns, int first,
                          int step, float (&x)[8]) {
    constexpr int kAtOnce = 4;  // reads on their way
    TF_UNROLL
    for (int e = 0; e < 8; ++e) x[e] = 0.0f;
    const float* sums = parts.sums + place * parts.sums_row + chunk * 8;
    const bool vectors = parts.sums_row % 4 == 0 && chunk * 8 + 8 <= columns;
    for (int i = first; i < parts.count; i += kAtOnce * step) {
        float weight[kAtOnce], y[kAtOnce][8];
        TF_UNROLL
        for (int u = 0; u < kAtOnce; ++u) {
            const int part = i + u * step;
            const float* from = sums + (part < parts.count ? part : first) * parts.sums_part;
            weight[u] = part < parts.count ? weights[part] : 0.0f;
            TF_UNROLL
            for (int e = 0; e < 8; e += 4) {
                if (vectors) {
                    const Float4 four = *reinterpret_cast<const Float4*>(from + e);
                    y[u][e] = four.x, y[u][e + 1] = four.y, y[u][e + 2] = four.z, y[u][e + 3] = four.w;
                    continue;
                }
                TF_UNROLL
                for (int k = e; k < e + 4; ++k) y[u][k] = chunk * 8 + k < columns ? from[k] : 0.0f;
            }
        }
        TF_UNROLL
        for (int u = 0; u < kAtOnce; ++u) {
            TF_UNROLL
            for (int e = 0; e < 8; ++e) {
                // A part without keys has written no sums.
                x[e] += weight[u] == 0.0f ? 0.0f : weight[u] * y[u][e];
            }
        }
    }
}

// Joins the parts of all rows, by all threads of the block: into `out` and lse if `final`, else into what split `split`
// stores. `weights` is scratch in shared memory for rows x parts; the parts are complete and visible to all threads.
template <class E, int kWarps>
TF_DEVICE void join_parts(const Arguments& a, const DeviceSequence& s, const PackedRows& rows, const Parts& parts,
                          float factor, bool final, int split, float* weights) {
    constexpr int kThreads = 32 * kWarps;
    const Problem& p = a.problem;
    join_numbers<kWarps>(a, s, rows, parts, factor, final, split, weights);
    ptx::sync_threads();

    const int columns = static_cast<int>(p.head_dim_v), chunks = (columns + 7) / 8, units = rows.count * chunks;
    // Where there are more threads than chunks of the result, several take a chunk's parts in turn.
    int lanes = 1;
    while (lanes < 32 && lanes < parts.count && 2 * lanes * units <= kThreads) lanes *= 2;
    const bool vectors = in_chunks(a, columns);
    const Parts splits = split_parts(a);
    for (int base = 0; base < units; base += kThreads / lanes) {
        const int unit = min_of(base + ptx::thread() / lanes, units - 1), row = unit / chunks, chunk = unit % chunks;
        float x[8];
        join_chunk(parts, parts.place(a, s, rows, row), weights + row * parts.count, chunk, columns,
                   ptx::thread() % lanes, lanes, x);
        for (int mask = lanes / 2; mask > 0; mask /= 2) {
            TF_UNROLL
            for (int e = 0; e < 8; ++e) x[e] += ptx::shuffle_xor(x[e], mask);
        }
        if (ptx::thread() % lanes != 0 || base + ptx::thread() / lanes >= units) continue;
        if (final) {
            E* out = mutable_row_at<E>(p.out, s.batch, rows.head(row), s.first_query + rows.position(row));
            Vector16 vector;
            TF_UNROLL
            for (int i = 0; i < 4; ++i) vector.word[i] = ptx::pack<E>(x[2 * i], x[2 * i + 1]);
            if (vectors) {
                *reinterpret_cast<Vector16*>(out + chunk * 8) = vector;
            } else {
                scatter_chunk(out, chunk, columns, vector);
            }
        } else {
            float* sums = a.partial_sums + split * splits.sums_part + splits.place(a, s, rows, row) * columns;
            TF_UNROLL
            for (int e = 0; e < 8; ++e) {
                if (chunk * 8 + e < columns) sums[chunk * 8 + e] = x[e];
            }
        }
    }
}

// Counts this block among the splits of `job`; true in the last one, which then sees what all of them have written.
// `flag` is scratch in shared memory. The counter is 0 again in the end, for the next launch.
TF_DEVICE bool is_last_split(const Arguments& a, int job, int* flag) {
    ptx::fence_device();
    ptx::sync_threads();
    if (ptx::thread() == 0) {
        const bool last = ptx::atomic_add(&a.arrived[job], 1) == a.splits - 1;
        if (last) a.arrived[job] = 0;
        *flag = last;
    }
    ptx::sync_threads();
    const bool last = *flag != 0;
    ptx::fence_device();
    return last;
}

}  // namespace cuda
}  // namespace tf
