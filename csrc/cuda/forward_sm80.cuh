// Forward pass for sm_80 and later, by mma.sync: online softmax over blocks of keys (Milakov & Gimelshein 2018; Dao et
// al. 2022), prefill and decoding alike.
//
// Warps stand in a grid of kWarpsM x kWarpsN. Along M each has rows of its own. Along N they share the rows and divide
// the keys of each block, each with sums of its own that are joined in the end as the partial results of splits are
// (Flash-Decoding, Dao et al. 2023): so a few query rows still keep four warps and the whole memory bus busy.
#pragma once

#include "cuda/key_blocks.cuh"
#include "cuda/merge.cuh"
#include "cuda/mma_tiles.cuh"
#include "cuda/softmax.cuh"

namespace tf {
namespace cuda {

// A split has more blocks than this, or there would be more to join than to compute.
constexpr int kMinSplitBlocks = 4;

// The part of a tile's blocks that split `split` takes: near-equal shares, the first ones first.
TF_DEVICE BlockRange share_of(BlockRange blocks, int splits, int split) {
    if (splits == 1) return blocks;
    const int count = blocks.stop - blocks.first;
    const int share = max_of((count + splits - 1) / splits, kMinSplitBlocks + 1);
    const int first = blocks.first + split * share, stop = blocks.stop;
    blocks.stop = min_of(stop, first + share);
    blocks.first = min_of(stop, first);
    return blocks;
}

// One row of a warp: lane i keeps row i % 16, or row i where a warp has 32. Four registers a thread where each row in
// four threads would take 32, for what only edge blocks and the end ask for.
struct LaneRow {
    int position, head, lo, hi;

    TF_DEVICE LaneRow(const DeviceSequence& s, const PackedRows& rows, int row)
        : position(rows.position(row)), head(rows.head(row)) {
        const Interval keys = row_interval(s.mask, position);
        lo = static_cast<int>(keys.lo);
        hi = rows.has(row) ? static_cast<int>(keys.hi) : lo;
    }

    // The thread's two rows of the 16 from `first` on. By all lanes.
    TF_DEVICE ThreadRows of_thread(const DeviceSequence& s, int first) const {
        ThreadRows r;
        TF_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int from = first + ptx::lane() / 4 + 8 * i;
            r.position[i] = ptx::shuffle(position, from), r.head[i] = ptx::shuffle(head, from);
            r.lo[i] = ptx::shuffle(lo, from), r.hi[i] = ptx::shuffle(hi, from);
            r.inside[i] = r.position[i] < s.len_q;
        }
        return r;
    }
};

template <class E, int kHeadDim, bool kModified, int kBlockM_, int kBlockN_, int kStages, int kWarpsM, int kWarpsN>
struct ForwardSm80 {
    static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kThreads = 32 * kWarpsM * kWarpsN;
    static constexpr int kM = kBlockM / (16 * kWarpsM);  // groups of 16 rows of a warp
    static constexpr int kRows = 16 * kM;                // of a warp
    static constexpr int kKeys = kBlockN / kWarpsN;      // of a block, for a warp
    static_assert(kBlockM % (16 * kWarpsM) == 0 && kM <= 2 && kBlockN % (16 * kWarpsN) == 0, "whole fragments");
    // Q is read from shared memory again for each block where registers are short.
    static constexpr bool kQueryStays = kM == 1 && kHeadDim <= 128;

    // Shared memory: Q, then K and V of each stage. In the end, the sums of the warps that share rows.
    static constexpr int kQueryBytes = kBlockM * kHeadDim * 2, kTileBytes = kBlockN * kHeadDim * 2;
    static constexpr int kSumsRow = kHeadDim + 8;  // eight more: rows of a fragment lie in different banks
    static constexpr int kNumbers = kWarpsN * kBlockM;
    static constexpr int kJoinBytes = kWarpsN == 1 ? 0 : kNumbers * (kSumsRow + 3) * 4;
    static constexpr int kSharedBytes = max_of(kQueryBytes + 2 * kStages * kTileBytes, kJoinBytes);

    // Blocks of a multiprocessor, by what a thread surely needs: sums, scores, Q, and about 80 more.
    static constexpr int kRegisters = kM * (kHeadDim + kKeys) / 2 + (kQueryStays ? kHeadDim / 4 : 0) + 80;
    static constexpr int kMinBlocks =
        max_of(1, min_of(65536 / (kThreads * min_of(256, kRegisters)), 227 * 1024 / (kSharedBytes + 1024)));

    using Keys = KeyBlocks<E, kModified, (kWarpsN > 1), kBlockN, kHeadDim, kThreads>;

    // What a block is to do.
    struct Work {
        Job job;
        DeviceSequence s;
        PackedRows rows;

        TF_DEVICE Work(const Arguments& a, int number)
            : job(job_of(a, number, true)), s(sequence_of(a, job.batch)), rows(packed_rows(a, s, job, kBlockM)) {}
    };

    // What a warp knows of its rows.
    struct State {
        LaneRow row;
        SoftmaxState softmax[kM];
        float sums[kM][kHeadDim / 2];
        uint32_t query[kQueryStays ? kHeadDim / 16 : 1][kM][4];

        explicit TF_DEVICE State(const LaneRow& row) : row(row) {
            TF_UNROLL
            for (int m = 0; m < kM; ++m) {
                TF_UNROLL
                for (int e = 0; e < kHeadDim / 2; ++e) sums[m][e] = 0.0f;
            }
        }
    };

    static TF_DEVICE void load_query(const Arguments& a, const DeviceSequence& s, const PackedRows& rows, int warp_m,
                                     int warp_n, char* tile) {
        // The warps that share rows divide them, and see each other's only after a barrier.
        const Problem& p = a.problem;
        const int dim = static_cast<int>(p.head_dim), first = warp_m * kRows;
        const RowAddresses<kRows> addresses = packed_addresses<E, kRows>(p.query, s, rows, first);
        load_rows_at<E, kBlockM, kHeadDim, 32 * kWarpsN>(tile, first, warp_n * 32 + ptx::lane(), addresses, dim,
                                                         in_chunks(a, dim), p.query.data);
    }

    // scores = Q K^T of the warp's rows and its part of a block.
    static TF_DEVICE void multiply_keys(const State& state, uint32_t query_base, uint32_t key_base,
                                        float (&scores)[kM][kKeys / 2]) {
        TF_UNROLL
        for (int m = 0; m < kM; ++m) {
            TF_UNROLL
            for (int e = 0; e < kKeys / 2; ++e) scores[m][e] = 0.0f;
        }
        TF_UNROLL
        for (int k = 0; k < kHeadDim; k += 16) {
            auto load = [&](uint32_t (&b)[4], int n) { load_b<kBlockN>(b, key_base, n, k); };
            if constexpr (kQueryStays) {
                multiply_step<E, kM, kKeys>(scores, state.query[k / 16], load);
            } else {
                uint32_t q[kM][4];
                TF_UNROLL
                for (int m = 0; m < kM; ++m) load_a<kBlockM>(q[m], query_base, 16 * m, k);
                multiply_step<E, kM, kKeys>(scores, q, load);
            }
        }
    }

    // Probabilities as the left operand of the second product, for each step of 16 keys.
    using Weights = uint32_t[kKeys / 16][kM][4];

    static TF_DEVICE void pack(const float (&p)[kKeys / 2], int m, Weights& weights) {
        TF_UNROLL
        for (int k = 0; k < kKeys / 16; ++k) {
            TF_UNROLL
            for (int i = 0; i < 4; ++i) weights[k][m][i] = ptx::pack<E>(p[8 * k + 2 * i], p[8 * k + 2 * i + 1]);
        }
    }

    // sums += P V. `hidden`: with kModified, values of keys that none of the warp's rows sees are taken as 0.
    static TF_DEVICE void multiply_values(State& state, uint32_t value_base, const Weights& weights, bool hidden) {
        TF_UNROLL
        for (int k = 0; k < kKeys / 16; ++k) {
            if (kModified && hidden) {
                uint32_t keep[2];
                seen_keys(weights[k], keep);
                multiply_step<E, kM, kHeadDim>(state.sums, weights[k], [&](uint32_t (&b)[4], int n) {
                    load_b_transposed<kBlockN>(b, value_base, n, 16 * k);
                    TF_UNROLL
                    for (int i = 0; i < 4; ++i) b[i] &= keep[i % 2];
                });
            } else {
                multiply_step<E, kM, kHeadDim>(state.sums, weights[k], [&](uint32_t (&b)[4], int n) {
                    load_b_transposed<kBlockN>(b, value_base, n, 16 * k);
                });
            }
        }
    }

    // A bias hides keys one by one. Of 16 keys, a thread holds the probabilities of the same four as it holds values in
    // a B fragment; the other rows' probabilities are in the lanes with the same lane % 4.
    static TF_DEVICE void seen_keys(const uint32_t (&weights)[kM][4], uint32_t (&keep)[2]) {
        TF_UNROLL
        for (int i = 0; i < 2; ++i) {  // pairs of keys: the first eight, the next
            uint32_t any = 0;
            TF_UNROLL
            for (int m = 0; m < kM; ++m) any |= weights[m][2 * i] | weights[m][2 * i + 1];
            TF_UNROLL
            for (int x = 4; x < 32; x *= 2) any |= ptx::shuffle_xor(any, x);
            keep[i] = ((any & 0xffffu) != 0 ? 0xffffu : 0u) | ((any >> 16) != 0 ? 0xffff0000u : 0u);
        }
    }

    // ---------------------------------------------------------------------------------------------- the end

    // The warps' rows, each warp by itself: out through the tile of Q, of whose rows this warp alone has read its own.
    // Lane i finishes row i: four lanes have the same rows of the sums.
    static TF_DEVICE void store_rows(const Arguments& a, const DeviceSequence& s, const PackedRows& rows, State& state,
                                     float factor, char* tile) {
        const Problem& p = a.problem;
        const int first = ptx::warp() * kRows, columns = static_cast<int>(p.head_dim_v);
        const int lane = ptx::lane(), row = first + lane % kRows;
        float top = 0.0f, total = 0.0f;
        TF_UNROLL
        for (int i = 0; i < 2 * kM; ++i) {  // rows 8i..8i+7 of the warp
            const float t = ptx::shuffle(state.softmax[i / 2].top[i % 2], lane % 8 * 4);
            const float u = ptx::shuffle(quad_sum(state.softmax[i / 2].total[i % 2]), lane % 8 * 4);
            if (lane % kRows / 8 == i) top = t, total = u;
        }
        const LaneRow mine(s, rows, row);
        const RowEnd end = finish_row(a, top, total, mine.head, rows.has(row), factor);
        if (rows.has(row) && lane < kRows) store_row_numbers(a, s, mine.head, mine.position, end);
        TF_UNROLL
        for (int m = 0; m < kM; ++m) {
            float scale[2];
            TF_UNROLL
            for (int r = 0; r < 2; ++r) scale[r] = ptx::shuffle(end.scale, 16 * m + 8 * r + lane / 4);
            scale_rows<kHeadDim>(state.sums[m], scale);
            TF_UNROLL
            for (int e = 0; e < kHeadDim / 2; e += 2) {
                const int to = first + 16 * m + lane / 4 + 8 * row_of(e);
                uint32_t* pair = reinterpret_cast<uint32_t*>(tile + chunk_offset<kBlockM>(to, e / 4));
                pair[lane % 4] = ptx::pack<E>(state.sums[m][e], state.sums[m][e + 1]);
            }
        }
        const RowAddresses<kRows> addresses = packed_addresses<E, kRows>(p.out, s, rows, first);
        store_rows_at<E, kBlockM, kHeadDim>(tile, first, addresses, columns, in_chunks(a, columns));
    }

    // The same rows as one split's.
    static TF_DEVICE void store_split(const Arguments& a, const DeviceSequence& s, const PackedRows& rows,
                                      const State& state) {
        const Parts splits = split_parts(a);
        const int first = ptx::warp() * kRows;
        TF_UNROLL
        for (int m = 0; m < kM; ++m) {
            const auto place = [&](int row) { return splits.place(a, s, rows, first + 16 * m + row); };
            const auto has = [&](int row) { return rows.has(first + 16 * m + row); };
            write_sums<kHeadDim>(state.sums[m], splits.sums_row, [&](int row) {
                float* sums = a.partial_sums + ptx::block_y() * splits.sums_part;
                return has(row) ? sums + place(row) * splits.sums_row : nullptr;
            });
            TF_UNROLL
            for (int r = 0; r < 2; ++r) {
                const int row = ptx::lane() / 4 + 8 * r;
                const float total = quad_sum(state.softmax[m].total[r]);
                if (!has(row) || ptx::lane() % 4 != 0) continue;
                const int64_t at = ptx::block_y() * splits.number_part + place(row);
                a.partial_top[at] = state.softmax[m].top[r];
                a.partial_total[at] = total;
            }
        }
    }

    // The rows of warps that shared them, through shared memory, as the result or as one split's.
    static TF_DEVICE void join_warps(const Arguments& a, const DeviceSequence& s, const PackedRows& rows,
                                     const State& state, float factor, char* shared) {
        float* const sums = reinterpret_cast<float*>(shared);
        float* const top = sums + kNumbers * kSumsRow;
        float* const total = top + kNumbers;
        const int warp_m = ptx::warp() / kWarpsN, warp_n = ptx::warp() % kWarpsN;
        ptx::sync_threads();  // all have done with the tiles
        TF_UNROLL
        for (int m = 0; m < kM; ++m) {
            const int first = warp_n * kBlockM + warp_m * kRows + 16 * m;
            write_sums<kHeadDim>(state.sums[m], kHeadDim, [&](int row) { return sums + (first + row) * kSumsRow; });
            TF_UNROLL
            for (int r = 0; r < 2; ++r) {
                const float whole = quad_sum(state.softmax[m].total[r]);
                const int row = first + ptx::lane() / 4 + 8 * r;
                if (ptx::lane() % 4 == 0) top[row] = state.softmax[m].top[r], total[row] = whole;
            }
        }
        ptx::sync_threads();
        const Parts parts = {sums, top, total, kWarpsN, kSumsRow, kBlockM * kSumsRow, kBlockM, false};
        join_parts<E, kThreads / 32>(a, s, rows, parts, factor, a.splits == 1, ptx::block_y(), total + kNumbers);
    }

    static TF_DEVICE void finish(const Arguments& a, State& state, bool empty, char* shared) {
        // Found again, which takes less than to keep it in registers.
        const Work work(a, ptx::forget(ptx::block_x()));
        const DeviceSequence& s = work.s;
        const PackedRows& rows = work.rows;
        const float factor = base2_factor(a, kModified);
        if (a.splits > 1 && empty) {
            const Parts splits = split_parts(a);
            for (int row = ptx::thread(); row < rows.count; row += kThreads) {
                const int64_t at = ptx::block_y() * splits.number_part + splits.place(a, s, rows, row);
                a.partial_top[at] = -kInfinity;
                a.partial_total[at] = 0.0f;
            }
        } else if constexpr (kWarpsN > 1) {
            join_warps(a, s, rows, state, factor, shared);
        } else if (a.splits == 1) {
            store_rows(a, s, rows, state, factor, shared);
        } else {
            store_split(a, s, rows, state);
        }
        if (a.splits == 1 || !is_last_split(a, ptx::block_x(), reinterpret_cast<int*>(shared))) return;
        float* const weights = reinterpret_cast<float*>(shared) + 4;
        join_parts<E, kThreads / 32>(a, s, rows, split_parts(a), factor, true, 0, weights);
    }

    // ---------------------------------------------------------------------------------------------- all of it

    static TF_DEVICE void run(const Arguments& a, char* shared) {
        const Problem& p = a.problem;
        const Work work(a, ptx::block_x());
        const DeviceSequence& s = work.s;
        const PackedRows& rows = work.rows;
        if (rows.count == 0) return;
        const TileRange range = keys_of(s, rows);
        const BlockRange blocks = share_of(blocks_of<kBlockN>(range, false), a.splits, ptx::block_y());
        const int warp_m = ptx::warp() / kWarpsN, warp_n = ptx::warp() % kWarpsN;
        char* const tiles = shared + kQueryBytes;
        auto key_tile = [&](int stage) { return tiles + stage * 2 * kTileBytes; };
        auto value_tile = [&](int stage) { return tiles + (stage * 2 + 1) * kTileBytes; };

        // Groups of copies: Q, then K and V of each block in turn. Always the same number, some of them empty.
        Keys keys(a, s, work.job.kv_head, range, blocks);
        if (blocks.first >= blocks.stop) {  // before there are copies to wait for
            State none(LaneRow(s, rows, warp_m * kRows + ptx::lane() % kRows));
            finish(a, none, true, shared);
            return;
        }
        load_query(a, s, rows, warp_m, warp_n, shared);
        ptx::cp_async_commit();
        TF_UNROLL
        for (int i = 0; i < kStages; ++i) {
            keys.find(blocks.first + i);
            keys.load_key(blocks.first + i, key_tile(i));
            ptx::cp_async_commit();
            if (i == kStages - 1) break;
            keys.load_value(blocks.first + i, value_tile(i));
            ptx::cp_async_commit();
        }

        State state(LaneRow(s, rows, warp_m * kRows + ptx::lane() % kRows));
        const float factor = base2_factor(a, kModified);
        const bool bias = kModified && p.bias.data != nullptr, dropout = kModified && p.dropout_p > 0.0;
        const uint64_t seed = dropout ? static_cast<uint64_t>(*a.seed) : 0;
        const uint32_t query_base = row_base(ptx::shared_address(shared) + warp_m * kRows * 128);
        const uint32_t key_base = column_base(ptx::shared_address(key_tile(0)) + warp_n * kKeys * 128);
        const uint32_t value_base = row_base(ptx::shared_address(value_tile(0)) + warp_n * kKeys * 128);
        if constexpr (kQueryStays) {
            ptx::cp_async_wait<2 * kStages - 1>();
            ptx::sync_threads();
            TF_UNROLL
            for (int k = 0; k < kHeadDim; k += 16) load_a<kBlockM>(state.query[k / 16][0], query_base, 0, k);
        }

        int stage = 0;
        for (int block = blocks.first; block < blocks.stop; ++block) {
            const uint32_t stage_offset = static_cast<uint32_t>(stage * 2 * kTileBytes);
            const int last = stage == 0 ? kStages - 1 : stage - 1;
            ptx::cp_async_wait<2 * (kStages - 1)>();
            ptx::sync_threads();  // this block's K is there, and all have done with the values of the one before
            keys.load_value(block + kStages - 1, value_tile(last));
            ptx::cp_async_commit();
            keys.find(block + kStages);

            float scores[kM][kKeys / 2];
            multiply_keys(state, query_base, key_base + stage_offset, scores);

            ptx::cp_async_wait<2 * (kStages - 1)>();
            ptx::sync_threads();  // this block's V is there, and all have done with its K
            keys.load_key(block + kStages, key_tile(stage));
            ptx::cp_async_commit();

            const int n = block * kBlockN + warp_n * kKeys;
            Weights weights;
            TF_UNROLL
            for (int m = 0; m < kM; ++m) {
                if constexpr (kModified) modify_scores<kKeys>(a, s, state.row.of_thread(s, 16 * m), n, scores[m]);
                if (keys.is_edge(block)) mask_scores<kKeys>(state.row.of_thread(s, 16 * m), n, scores[m]);
                float shrink[2];
                softmax_step<kKeys, true>(scores[m], state.softmax[m], factor, shrink);
                scale_rows<kHeadDim>(state.sums[m], shrink);
                if (dropout) drop<kKeys>(a, seed, s, state.row.of_thread(s, 16 * m), n, scores[m]);
                pack(scores[m], m, weights);
            }
            multiply_values(state, value_base + stage_offset, weights, bias);
            stage = stage + 1 == kStages ? 0 : stage + 1;
        }
        finish(a, state, false, shared);
    }
};

}  // namespace cuda
}  // namespace tf
