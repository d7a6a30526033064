// The gradient of the query by mma.sync (and of a bias, by addition to memory), each sum in the registers of one warp.
//
// As in the forward pass a job is a tile of packed rows that meets one block of keys after the other. Warps stand in a
// grid of kWarpsM x kWarpsN: along M each has rows of its own, along N they share the rows and divide the keys of each
// block, each with sums of its own that are added in the end, in the order of the warps. So a warp has 32 rows, for
// which each operand from shared memory serves twice, in tiles of rows that are not large.
#pragma once

#include <type_traits>

#include "cuda/gradients.cuh"
#include "cuda/mma_tiles.cuh"
#include "cuda/rows.cuh"

namespace tf {
namespace cuda {

// kChunk keys at a time go through a warp. K has two stages, V one or two. Grid: jobs (job_of with last_first = true),
// tiles = tiles of kBlockM packed rows of the longest sequence of rows.
template <class E, int kHeadDim, bool kModified, int kBlockM_, int kBlockN_, int kWarpsM, int kWarpsN, int kChunk,
          int kValueStages, int kMinBlocks_>
struct BackwardDqSm80 {
    static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kMinBlocks = kMinBlocks_;
    static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
    static constexpr int kRows = kBlockM / kWarpsM, kM = kRows / 16;  // of a warp
    static constexpr int kKeys = kBlockN / kWarpsN;                   // of a block, for a warp

    // What is known of the rows of the tile.
    struct PlainTable {
        float top[kBlockM], log2_sum[kBlockM], delta[kBlockM];
        int position[kBlockM];
    };
    struct ModifiedTable : PlainTable {
        int head[kBlockM];
    };
    using Table = std::conditional_t<kModified, ModifiedTable, PlainTable>;

    // Shared memory: Q and dout, the stages of K, those of V, what is known of the rows. In the end, sums.
    static constexpr int kRowBytes = kBlockM * kHeadDim * 2, kKeyBytes = kBlockN * kHeadDim * 2;
    static constexpr int kKeyOffset = 2 * kRowBytes, kValueOffset = kKeyOffset + 2 * kKeyBytes;
    static constexpr int kTableOffset = kValueOffset + kValueStages * kKeyBytes;
    static constexpr int kWorkOffset = kTableOffset + static_cast<int>(sizeof(Table));
    static constexpr int kSharedBytes = kWorkOffset + 256;

    static_assert(kRows % 16 == 0 && kRows <= 32 && kKeys % kChunk == 0 && kChunk % 16 == 0, "whole groups of mma");
    static_assert(kValueStages == 2 || kKeys == kChunk, "all of V is read before it is loaded anew");
    static_assert(kBlockM <= kThreads, "a thread for each row's numbers");
    static_assert((kWarpsN - 1) * kBlockM * kHeadDim * 4 <= kTableOffset, "room for the sums");

    using Sums = float[kM][kHeadDim / 2];
    using Scores = float[kM][kChunk / 2];

    // What is fixed for a job. In shared memory: in registers it would take the place of sums.
    struct Work {
        DeviceSequence s;
        PackedRows rows;
        int kv_head, begin, end;  // the keys that some row sees
        BlockRange blocks;
        KeyLimits limits;
        uint64_t seed;
    };
    struct Warp {
        int m, n, own;  // its place in the grid, and its first row of the tile
    };
    static TF_DEVICE Warp warp_of() {
        const int m = ptx::warp() / kWarpsN;
        return {m, ptx::warp() % kWarpsN, m * kRows};
    }

    static TF_DEVICE Work work_of(const Arguments& a) {
        const Job job = job_of(a, ptx::block_x(), true);
        Work w{};
        w.s = sequence_of(a, job.batch);
        w.rows = packed_rows(a, w.s, job, kBlockM);
        const TileRange range = keys_of(w.s, w.rows);
        w.kv_head = job.kv_head;
        w.begin = static_cast<int>(range.begin);
        w.end = static_cast<int>(range.end);
        w.blocks = blocks_of<kBlockN>(range, false);
        w.limits = key_limits(w.s.mask);
        if (kModified && a.problem.dropout_p > 0.0) w.seed = static_cast<uint64_t>(*a.seed);
        return w;
    }

    static TF_DEVICE char* key_tile(char* shared, int block) { return shared + kKeyOffset + block % 2 * kKeyBytes; }
    static TF_DEVICE char* value_tile(char* shared, int block) {
        return shared + kValueOffset + block % kValueStages * kKeyBytes;
    }
    static TF_DEVICE Table& table(char* shared) { return *reinterpret_cast<Table*>(shared + kTableOffset); }

    // Rows of `operand` that a warp shares with those beside it.
    static TF_DEVICE void load_rows_of(const Arguments& a, const Work& w, const Warp& warp, const Operand& operand,
                                       int columns, char* tile) {
        const RowAddresses<kRows> addresses = packed_addresses<E, kRows>(operand, w.s, w.rows, warp.own);
        load_rows_at<E, kBlockM, kHeadDim, 32 * kWarpsN>(tile, warp.own, warp.n * 32 + ptx::lane(), addresses, columns,
                                                         in_chunks(a, columns), operand.data);
    }

    static TF_DEVICE void keep_numbers(const Arguments& a, const Work& w, Table& rows) {
        const int row = ptx::thread();
        if (row >= kBlockM) return;
        const int head = w.rows.head(row), position = w.rows.position(row);
        const RowNumbers numbers = read_row_numbers(a, w.s, head, position, w.rows.has(row));
        rows.top[row] = numbers.top;
        rows.log2_sum[row] = numbers.log2_sum;
        rows.delta[row] = numbers.delta;
        rows.position[row] = position;
        if constexpr (kModified) rows.head[row] = head;
    }

    static TF_DEVICE void load_block(const Arguments& a, const Work& w, const Operand& operand, int64_t columns,
                                     int block, char* tile) {
        if (block >= w.blocks.stop) return;
        load_rows_between<E, kBlockN, kHeadDim, kThreads>(
            tile, row_at<E>(operand, w.s.batch, w.kv_head, w.s.first_key), operand.row, block * kBlockN, w.begin, w.end,
            static_cast<int>(columns), in_chunks(a, static_cast<int>(columns)));
    }

    // ------------------------------------------------------------------------------------- elements

    // Scores and dP of 16 rows and the keys from `n` on -> dS, in `scores`. `row`: the thread's first row of the tile.
    static TF_DEVICE void plain_gradient(const Arguments& a, const Work& w, const Table& rows, int row, int n,
                                         bool masked, float (&scores)[kChunk / 2], float (&dp)[kChunk / 2]) {
        const float factor = base2_factor(a, false);
        const float top[2] = {rows.top[row], rows.top[row + 8]};
        const float log2_sum[2] = {rows.log2_sum[row], rows.log2_sum[row + 8]};
        const float delta[2] = {rows.delta[row], rows.delta[row + 8]};
        if (masked) {
            ThreadRows limits{};
            TF_UNROLL
            for (int r = 0; r < 2; ++r) {
                limits.lo[r] = w.limits.lo(rows.position[row + 8 * r]);
                limits.hi[r] = w.limits.hi(rows.position[row + 8 * r]);
            }
            mask_scores<kChunk>(limits, n, scores);
        }
        TF_UNROLL
        for (int e = 0; e < kChunk / 2; ++e) {
            scores[e] = probability(scores[e], top[row_of(e)], log2_sum[row_of(e)], factor);
        }
        if (masked) {  // what a row does not see may be NaN
            TF_UNROLL
            for (int e = 0; e < kChunk / 2; ++e) dp[e] = scores[e] == 0.0f ? 0.0f : dp[e];
        }
        TF_UNROLL
        for (int e = 0; e < kChunk / 2; ++e) scores[e] *= dp[e] - delta[row_of(e)];
    }

    static TF_DEVICE void modified_gradient(const Arguments& a, const Work& w, const Table& rows, int row, int n,
                                            float (&scores)[kChunk / 2], float (&dp)[kChunk / 2]) {
        const Problem& p = a.problem;
        ThreadRows at;
        TF_UNROLL
        for (int r = 0; r < 2; ++r) {
            at.position[r] = rows.position[row + 8 * r];
            at.head[r] = rows.head[row + 8 * r];
            at.lo[r] = w.limits.lo(at.position[r]);
            at.hi[r] = w.limits.hi(at.position[r]);
            at.inside[r] = at.position[r] < w.s.len_q;
        }
        if (p.dropout_p > 0.0) {
            TF_UNROLL
            for (int j = 0; j < kChunk / 8; ++j) {
                const uint32_t kept = kept_of_rows(a, w.seed, w.s, rows, row, n + 8 * j);
                TF_UNROLL
                for (int e = 0; e < 4; ++e) dp[4 * j + e] *= kept >> e & 1u ? a.dropout_keep : 0.0f;
            }
        }
        TF_UNROLL
        for (int e = 0; e < kChunk / 2; ++e) dp[e] -= rows.delta[row + 8 * row_of(e)];
        cap_scores<kChunk>(p, scores);
        float slopes[kChunk / 2];
        if (p.softcap != 0.0f) {
            TF_UNROLL
            for (int e = 0; e < kChunk / 2; ++e) slopes[e] = softcap_slope(p, scores[e]);
        }
        modify_capped<kChunk>(a, w.s, at, n, scores);
        mask_scores<kChunk>(at, n, scores);
        TF_UNROLL
        for (int e = 0; e < kChunk / 2; ++e) {
            const int r = row + 8 * row_of(e);
            const float weight = probability(scores[e], rows.top[r], rows.log2_sum[r], kLog2E);
            scores[e] = weight == 0.0f ? 0.0f : weight * dp[e];  // what a row does not see may be NaN
        }
        if (p.dbias != nullptr) add_to_dbias(p, w, at, n, scores);
        if (p.softcap != 0.0f) {
            TF_UNROLL
            for (int e = 0; e < kChunk / 2; ++e) scores[e] = scores[e] == 0.0f ? 0.0f : scores[e] * slopes[e];
        }
    }

    static TF_DEVICE void add_to_dbias(const Problem& p, const Work& w, const ThreadRows& at, int n,
                                       const float (&gradients)[kChunk / 2]) {
        TF_UNROLL
        for (int r = 0; r < 2; ++r) {
            const int64_t row = w.s.index * p.dbias_batch + at.head[r] * p.dbias_head + at.position[r] * p.dbias_row;
            TF_UNROLL
            for (int e = 0; e < kChunk / 2; ++e) {
                if (row_of(e) != r || gradients[e] == 0.0f) continue;
                ptx::atomic_add(p.dbias + row + (n + column_of(e)) * p.dbias_key, gradients[e]);
            }
        }
    }

    // ------------------------------------------------------------------------------------- a block of keys

    // product = rows (of Q or dout) times keys (of K or V), for the warp's rows and kChunk keys.
    static TF_DEVICE void multiply(uint32_t rows_base, uint32_t keys_base, Scores& product) {
        TF_UNROLL
        for (int k = 0; k < kHeadDim; k += 16) {
            uint32_t own[kM][4];
            TF_UNROLL
            for (int m = 0; m < kM; ++m) load_a<kBlockM>(own[m], rows_base, 16 * m, k);
            multiply_step<E, kM, kChunk>(product, own,
                                         [&](uint32_t (&b)[4], int n) { load_b<kBlockN>(b, keys_base, n, k); });
        }
    }

    // sums += dS K. `hidden`: some keys may be NaN though no row sees them.
    static TF_DEVICE void add_keys(const Scores& ds, uint32_t keys_base, bool hidden, Sums& sums) {
        TF_UNROLL
        for (int k = 0; k < kChunk; k += 16) {
            uint32_t weights[kM][4];
            TF_UNROLL
            for (int m = 0; m < kM; ++m) {
                TF_UNROLL
                for (int i = 0; i < 4; ++i) {
                    weights[m][i] = ptx::pack<E>(ds[m][k / 2 + 2 * i], ds[m][k / 2 + 2 * i + 1]);
                }
            }
            multiply_step<E, kM, kHeadDim>(sums, weights, [&](uint32_t (&b)[4], int n) {
                load_b_transposed<kBlockN>(b, keys_base, n, k);
                if (hidden) {
                    TF_UNROLL
                    for (int i = 0; i < 4; ++i) b[i] = finite_or_zero<E>(b[i]);
                }
            });
        }
    }

    // ------------------------------------------------------------------------------------- the end

    // The sums of warps that share rows, in shared memory as they lie in registers: 16 bytes a lane.
    static TF_DEVICE void join(const Warp& warp, char* shared, Sums& sums) {
        Vector16* const all = reinterpret_cast<Vector16*>(shared);
        const auto place = [&](int n, int m, int e) {
            return all + (((n - 1) * kWarpsM + warp.m) * kM + m) * (kHeadDim / 8 * 32) + e / 4 * 32 + ptx::lane();
        };
        if (warp.n > 0) {
            TF_UNROLL
            for (int m = 0; m < kM; ++m) {
                TF_UNROLL
                for (int e = 0; e < kHeadDim / 2; e += 4) {
                    *reinterpret_cast<Floats*>(place(warp.n, m, e)) =
                        Floats{{sums[m][e], sums[m][e + 1], sums[m][e + 2], sums[m][e + 3]}};
                }
            }
        }
        ptx::sync_threads();
        if (warp.n > 0) return;
        for (int n = 1; n < kWarpsN; ++n) {
            TF_UNROLL
            for (int m = 0; m < kM; ++m) {
                TF_UNROLL
                for (int e = 0; e < kHeadDim / 2; e += 4) {
                    const Floats other = *reinterpret_cast<const Floats*>(place(n, m, e));
                    TF_UNROLL
                    for (int i = 0; i < 4; ++i) sums[m][e + i] += other.x[i];
                }
            }
        }
    }
    struct alignas(16) Floats {
        float x[4];
    };

    // The warp's rows, by way of `tile`.
    static TF_DEVICE void store(const Arguments& a, const Work& w, const Warp& warp, char* tile, Sums& sums) {
        const Problem& p = a.problem;
        const int columns = static_cast<int>(p.head_dim);
        TF_UNROLL
        for (int m = 0; m < kM; ++m) {
            TF_UNROLL
            for (int e = 0; e < kHeadDim / 2; e += 2) {
                const int row = warp.own + 16 * m + ptx::lane() / 4 + 8 * row_of(e);
                uint32_t* pair = reinterpret_cast<uint32_t*>(tile + chunk_offset<kBlockM>(row, e / 4));
                pair[ptx::lane() % 4] = ptx::pack<E>(sums[m][e] * p.softmax_scale, sums[m][e + 1] * p.softmax_scale);
            }
        }
        store_rows_at<E, kBlockM, kHeadDim>(tile, warp.own, packed_addresses<E, kRows>(p.dquery, w.s, w.rows, warp.own),
                                            columns, in_chunks(a, columns));
    }

    static TF_DEVICE void finish(const Arguments& a, const Work& w, const Warp& warp, char* shared, Sums& sums) {
        if constexpr (kWarpsN > 1) join(warp, shared, sums);
        if (warp.n == 0) store(a, w, warp, shared + (kWarpsN - 1) * kBlockM * kHeadDim * 4, sums);
    }

    static TF_DEVICE void run(const Arguments& a, char* shared) {
        const Problem& p = a.problem;
        Work& w = *reinterpret_cast<Work*>(shared + kWorkOffset);
        if (ptx::thread() == 0) w = work_of(a);
        ptx::sync_threads();
        if (w.rows.count == 0) return;
        const Warp warp = warp_of();
        load_rows_of(a, w, warp, p.query, static_cast<int>(p.head_dim), shared);
        load_rows_of(a, w, warp, p.dout, static_cast<int>(p.head_dim_v), shared + kRowBytes);
        keep_numbers(a, w, table(shared));
        const uint32_t query_base = row_base(ptx::shared_address(shared) + warp.own * 128);
        const BlockRange& blocks = w.blocks;

        Sums sums{};
        for (int block = blocks.first - 1; block < blocks.stop; ++block) {  // the first round only loads
            ptx::cp_async_wait<0>();
            ptx::sync_threads();  // this block has come, and all have done with the one before
            const bool starts = block < blocks.first;
            load_block(a, w, p.key, p.head_dim, block + 1, key_tile(shared, block + 1));
            if (kValueStages == 2) load_block(a, w, p.value, p.head_dim_v, block + 1, value_tile(shared, block + 1));
            ptx::cp_async_commit();

            const uint32_t key = ptx::shared_address(key_tile(shared, block)) + warp.n * kKeys * 128;
            const uint32_t value = ptx::shared_address(value_tile(shared, block)) + warp.n * kKeys * 128;
            TF_UNROLL
            for (int n = 0; n < kKeys; n += kChunk) {
                Scores scores{}, dp{};
                if (!starts) {
                    multiply(query_base, column_base(key + n * 128), scores);
                    multiply(query_base + kRowBytes, column_base(value + n * 128), dp);
                }
                if (kValueStages == 1) {
                    if (!starts) ptx::sync_threads();  // all have done with V
                    load_block(a, w, p.value, p.head_dim_v, block + 1, value_tile(shared, block + 1));
                    ptx::cp_async_commit();
                }
                if (starts) break;
                const int first = block * kBlockN + warp.n * kKeys + n;
                const int row = warp.own + ptx::forget(ptx::lane()) / 4;  // found anew: registers are short
                const bool masked = block < blocks.full || block >= blocks.partial;
                TF_UNROLL
                for (int m = 0; m < kM; ++m) {
                    if constexpr (kModified) {
                        modified_gradient(a, w, table(shared), row + 16 * m, first, scores[m], dp[m]);
                    } else {
                        plain_gradient(a, w, table(shared), row + 16 * m, first, masked, scores[m], dp[m]);
                    }
                }
                add_keys(scores, row_base(key + n * 128), kModified && (p.bias.data != nullptr || w.s.holes), sums);
            }
        }
        ptx::cp_async_wait<0>();
        ptx::sync_threads();
        finish(a, w, warp_of(), shared, sums);
    }
};

}  // namespace cuda
}  // namespace tf
