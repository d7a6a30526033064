// Gradients of key and value by mma.sync, each sum in the registers of one warp: the same bits from run to run.
//
// All products are transposed, S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T are left operands of
// dV = P^T dO and dK = dS^T Q in the very registers where they arise. Warps work in pairs on the same keys: the first
// of a pair has S^T and dV, the second dP^T and dK, two products each. The first hands P^T over through shared memory.
// So a warp has the registers for one sum of 32 keys, where both sums would leave it 16, and every operand that it
// fetches from shared memory serves 32 keys: ldmatrix has half the bandwidth that mma.sync would want for 16. K or V,
// of which a warp needs just one, stay in its registers where there is room.
#pragma once

#include <type_traits>

#include "cuda/backward_elements_sm90.cuh"
#include "cuda/mma_tiles.cuh"
#include "cuda/rows.cuh"

namespace tf {
namespace cuda {

// A job is kBlockN keys of a KV head, against all rows of all query heads of its group that see any of them.
// kPairs pairs of warps; kStep rows of a tile at a time; kHold: K and V stay in registers. Grid: jobs (job_of with
// last_first = false), tiles = blocks of keys of the longest sequence of keys.
template <class E, int kHeadDim, bool kModified, int kBlockM_, int kBlockN_, int kPairs, int kStep, bool kHold,
          int kMinBlocks_>
struct BackwardDkdvSm80 {
    static constexpr int kThreads = 64 * kPairs, kMinBlocks = kMinBlocks_, kBlockM = kBlockM_, kBlockN = kBlockN_;
    static constexpr int kKeys = kBlockN / kPairs, kM = kKeys / 16;  // of a warp: keys, and mma's groups of 16
    static constexpr int kTile = kBlockM * kHeadDim * 2, kResident = kBlockN * kHeadDim * 2;
    static constexpr int kStages = 2;

    static constexpr int kStageBytes = kStages * 2 * kTile, kHeldBytes = kHold ? 0 : 2 * kResident;
    using Table = std::conditional_t<kModified, ModifiedRows<kBlockM>, PlainRows<kBlockM>>;
    static constexpr int kWeightBytes = kBlockN * kBlockM * 2;
    static constexpr int kWeightOffset = kStageBytes + kHeldBytes, kTableOffset = kWeightOffset + kWeightBytes;
    static constexpr int kWorkOffset = kTableOffset + kStages * static_cast<int>(sizeof(Table));
    static constexpr int kSpanOffset = kWorkOffset + 256;
    static constexpr int kSharedBytes = kSpanOffset + (kModified ? 0 : 2 * kBlockN * 4);

    static_assert(kKeys % 16 == 0 && kBlockM % kStep == 0 && kStep % 16 == 0, "whole groups of mma");
    static_assert(kPairs * (kBlockM / kStep) <= 15, "a named barrier for each pair and step");
    static_assert(2 * kResident <= kStageBytes, "the stages hold K and V at first, their gradients in the end");
    static_assert(kBlockM <= kThreads, "a thread for each row's numbers");

    using Sums = float[kM][kHeadDim / 2];
    using Scores = float[kM][kStep / 2];
    using Fragments = uint32_t[kStep / 16][4];  // of 16 keys, P^T or dS^T: 16 rows at a time are the k of a product

    struct Warp {
        bool values;    // the first of its pair: S^T and dV
        int pair, key;  // its first key in the sequence
    };

    // What is fixed for a job. In shared memory: in registers it would take the place of sums. Rows are counted as the
    // sequence's packed rows, all the group's heads.
    struct Work {
        DeviceSequence s;
        int kv_head, first_key, stored;  // `stored` keys of the sequence have a gradient
        int row_begin, row_end;          // the rows that see some of the keys
        BlockRange blocks;
        uint64_t seed;
    };

    static TF_DEVICE Work work_of(const Arguments& a) {
        const Job job = job_of(a, ptx::block_x(), false);
        Work w{};
        w.s = sequence_of(a, job.batch);
        w.kv_head = job.kv_head;
        w.first_key = job.tile * kBlockN;
        w.stored = a.problem.packed ? w.s.len_k : static_cast<int>(a.problem.seqlen_k);
        const int first = max_of(w.first_key, static_cast<int>(w.s.mask.start));
        const int last = min_of(w.first_key + kBlockN, static_cast<int>(w.s.mask.end)) - 1;
        const TileRange range = rows_of(a, w.s, first, last);
        w.row_begin = static_cast<int>(range.begin);
        w.row_end = static_cast<int>(range.end);
        w.blocks = blocks_of<kBlockM>(range, false);
        if (kModified && a.problem.dropout_p > 0.0) w.seed = static_cast<uint64_t>(*a.seed);
        return w;
    }

    static TF_DEVICE char* stage(char* shared, int number) { return shared + number % kStages * 2 * kTile; }
    static TF_DEVICE Table& table(char* shared, int number) {
        return reinterpret_cast<Table*>(shared + kTableOffset)[number % kStages];
    }
    // Where scores are raw products: the packed rows that see each of the keys.
    struct Spans {
        int lo[kBlockN], count[kBlockN];
    };
    static TF_DEVICE Spans& spans(char* shared) { return *reinterpret_cast<Spans*>(shared + kSpanOffset); }

    // ------------------------------------------------------------------------------------- what comes from memory

    static TF_DEVICE PackedRows tile_rows(const Arguments& a, const Work& w, int number) {
        const int group = static_cast<int>(a.problem.group_size);
        return {number * kBlockM, kBlockM, group, w.kv_head * group};
    }
    static TF_DEVICE bool in_range(const Work& w, int number, int row) {
        const int packed = number * kBlockM + row;
        return packed >= w.row_begin && packed < w.row_end;
    }

    // Q and dout of one tile of rows; zeros for rows that see none of the keys, be they NaN.
    static TF_DEVICE void load_tile(const Arguments& a, const Work& w, char* shared, int number) {
        const Problem& p = a.problem;
        const PackedRows rows = tile_rows(a, w, number);
        char* const tile = stage(shared, number);
        RowAddresses<kBlockM> query, dout;
        TF_UNROLL
        for (int i = 0; i < RowAddresses<kBlockM>::kEach; ++i) {
            const int row = i * 32 + ptx::lane(), head = rows.head(row), at = w.s.first_query + rows.position(row);
            const bool there = row < kBlockM && in_range(w, number, row);
            query.at[i] = there ? reinterpret_cast<uint64_t>(row_at<E>(p.query, w.s.batch, head, at)) : 0;
            dout.at[i] = there ? reinterpret_cast<uint64_t>(row_at<E>(p.dout, w.s.batch, head, at)) : 0;
        }
        load(a, tile, query, p.query, static_cast<int>(p.head_dim));
        load(a, tile + kTile, dout, p.dout, static_cast<int>(p.head_dim_v));
    }
    template <int kRows>
    static TF_DEVICE void load(const Arguments& a, char* tile, const RowAddresses<kRows>& addresses,
                               const Operand& operand, int columns) {
        load_rows_at<E, kRows, kHeadDim, kThreads>(tile, 0, ptx::thread(), addresses, columns, in_chunks(a, columns),
                                                   operand.data);
    }

    // A thread's row of a tile: first its numbers, long before anybody wants them, then all of it into the table.
    static TF_DEVICE RowNumbers numbers_of(const Arguments& a, const Work& w, int number) {
        const int row = ptx::thread();
        const PackedRows rows = tile_rows(a, w, number);
        return read_row_numbers(a, w.s, rows.head(row), rows.position(row), row < kBlockM && in_range(w, number, row));
    }
    static TF_DEVICE void keep_numbers(const Arguments& a, const Work& w, char* shared, int number,
                                       const RowNumbers& numbers) {
        const int row = ptx::thread();
        if (row >= kBlockM) return;
        Table& t = table(shared, number);
        if constexpr (kModified) {
            const PackedRows rows = tile_rows(a, w, number);
            write_modified_row(a, w.s, t, row, rows.head(row), rows.position(row), in_range(w, number, row), numbers);
        } else {
            t.write(row, numbers);
        }
    }
    static TF_DEVICE void keep_spans(const Arguments& a, const Work& w, char* shared) {
        for (int i = ptx::thread(); i < kBlockN; i += kThreads) {
            const int key = w.first_key + i;
            TileRange range{0, 0, 0, 0};
            if (key >= w.s.mask.start && key < w.s.mask.end) range = rows_of(a, w.s, key, key);
            spans(shared).lo[i] = static_cast<int>(range.begin);
            spans(shared).count[i] = static_cast<int>(range.end - range.begin);
        }
    }

    // K and V of the job's keys, zeros beyond the sequence: into the stages, or to where they stay.
    static TF_DEVICE void load_resident(const Arguments& a, const Work& w, char* target) {
        const Problem& p = a.problem;
        const auto load = [&](const Operand& operand, int64_t columns, char* tile) {
            load_rows_between<E, kBlockN, kHeadDim, kThreads>(
                tile, row_at<E>(operand, w.s.batch, w.kv_head, w.s.first_key), operand.row, w.first_key, 0, w.s.len_k,
                static_cast<int>(columns), in_chunks(a, static_cast<int>(columns)));
        };
        load(p.key, p.head_dim, target);
        load(p.value, p.head_dim_v, target + kResident);
        ptx::cp_async_commit();
    }

    // ------------------------------------------------------------------------------------- elements

    // A warp takes its 16 keys by 16. `row`: the step's first row in the table; `key`: the first of the 16.
    //
    // S^T -> P^T for dV, and for dS^T its weights: P^T times the softcap's derivative, negative (-0 too) where dropout
    // drops. Without these two, P^T itself.
    static TF_DEVICE void plain_weights(const Arguments& a, const Work& w, char* shared, int number, int row, int key,
                                        bool masked, float (&scores)[kStep / 2], uint32_t (&weights)[kStep / 16][4]) {
        if (masked) {
            const Spans& all = spans(shared);
            const int own = key - w.first_key + ptx::lane() / 4;
            hide_scores<kStep>({{all.lo[own], all.lo[own + 8]}, {all.count[own], all.count[own + 8]}},
                               number * kBlockM + row, scores);
        }
        plain_probabilities<kStep>(table(shared, number), row, base2_factor(a, false), scores);
        pack_rows<E, kStep>(scores, weights);
    }
    static TF_DEVICE void modified_weights(const Arguments& a, const Work& w, char* shared, int number, int row,
                                           int key, bool masked, float (&scores)[kStep / 2],
                                           uint32_t (&kept)[kStep / 16][4], uint32_t (&weights)[kStep / 16][4]) {
        const ElementPlaces<kBlockM> at{table(shared, number), row, key};
        const bool softcap = a.problem.softcap != 0.0f, dropout = a.problem.dropout_p > 0.0;
        uint32_t slopes[kStep / 4];
        modify_transposed<kStep>(a, w.s, at, [&](int i, uint32_t pair) { slopes[i] = pair; }, scores);
        if (masked) {
            TF_UNROLL
            for (int e = 0; e < kStep / 2; ++e) {
                const int r = at.row_at(e), k = at.key_at(e);
                if (k < at.table.lo[r] || k >= at.table.hi[r]) scores[e] = -kInfinity;
            }
        }
        TF_UNROLL
        for (int j = 0; j < kStep / 8; ++j) {
            const uint32_t keep = dropout ? kept_of_keys(a, w.seed, w.s, at.table, row + 8 * j, key) : 15u;
            TF_UNROLL
            for (int e = 4 * j; e < 4 * j + 4; e += 2) {
                float p[2], weight[2];
                TF_UNROLL
                for (int i = 0; i < 2; ++i) {
                    const int r = at.row_at(e + i);
                    p[i] = probability(scores[e + i], at.table.top[r], at.table.log2_sum[r], kLog2E);
                    weight[i] = p[i];
                    if (softcap && p[i] != 0.0f) {  // the slope of what is hidden may be NaN
                        weight[i] *= i == 0 ? low_of<Float16>(slopes[e / 2]) : high_of<Float16>(slopes[e / 2]);
                    }
                    if (!dropout) continue;
                    const bool stays = keep >> (e % 4 + i) & 1u;
                    p[i] = stays ? p[i] * a.dropout_keep : 0.0f;
                    weight[i] = stays ? weight[i] : -weight[i];
                }
                kept[e / 8][e / 2 % 4] = ptx::pack<E>(p[0], p[1]);
                weights[e / 8][e / 2 % 4] = ptx::pack<E>(weight[0], weight[1]);
            }
        }
    }

    // dP^T and the weights -> dS^T, in their place.
    static TF_DEVICE void plain_gradient(const Table& rows, int row, bool masked, float (&dp)[kStep / 2],
                                         uint32_t (&weights)[kStep / 16][4]) {
        const auto p = [&](int e) {
            const uint32_t pair = weights[e / 8][e / 2 % 4];
            return e % 2 == 0 ? low_of<E>(pair) : high_of<E>(pair);
        };
        plain_gradients<kStep>(rows, row, masked, p, dp);
        pack_rows<E, kStep>(dp, weights);
    }
    static TF_DEVICE void modified_gradient(const Arguments& a, const Table& rows, int row, float (&dp)[kStep / 2],
                                            uint32_t (&weights)[kStep / 16][4]) {
        const float keep = a.problem.dropout_p > 0.0 ? a.dropout_keep : 1.0f;
        TF_UNROLL
        for (int e = 0; e < kStep / 2; ++e) {
            const uint32_t pair = weights[e / 8][e / 2 % 4];
            const float weight = e % 2 == 0 ? low_of<E>(pair) : high_of<E>(pair);
            const bool dropped = pair >> (e % 2 * 16 + 15) & 1u;
            const float delta = rows.delta[row + 2 * (ptx::lane() % 4) + column_base_of(e)];
            const float x = __builtin_fabsf(weight) * ((dropped ? 0.0f : dp[e] * keep) - delta);
            dp[e] = weight == 0.0f ? 0.0f : x;
        }
        pack_rows<E, kStep>(dp, weights);
    }

    // ------------------------------------------------------------------------------------- a tile of rows

    // A warp's own K or V as left operands: from registers, or from shared memory each time.
    struct Resident {
        uint32_t a[kHold ? kHeadDim / 16 : 1][kM][4];
        uint32_t base;

        TF_DEVICE void fetch(uint32_t (&target)[kM][4], int k) const {
            TF_UNROLL
            for (int m = 0; m < kM; ++m) load_a<kBlockN>(target[m], base, 16 * m, k);
        }
        TF_DEVICE void hold() {
            if constexpr (kHold) {
                TF_UNROLL
                for (int k = 0; k < kHeadDim / 16; ++k) fetch(a[k], 16 * k);
            }
        }
    };

    // sums += (elements of resident times `first`) times `second`, for kStep rows. The two warps of a pair differ in
    // which tiles these are and in what they do with the elements.
    static TF_DEVICE void step(const Arguments& a, const Work& w, const Warp& warp, char* shared, int number, int row,
                               bool masked, const Resident& resident, Sums& sums) {
        const uint32_t tile = ptx::shared_address(stage(shared, number));
        const uint32_t first = column_base(tile + (warp.values ? 0 : kTile));
        const uint32_t second = row_base(tile + (warp.values ? kTile : 0));

        Scores scores{};
        TF_UNROLL
        for (int k = 0; k < kHeadDim / 16; ++k) {
            const auto load = [&](uint32_t (&b)[4], int n) { load_b<kBlockM>(b, first + row * 128, n, 16 * k); };
            if constexpr (kHold) {
                multiply_step<E, kM, kStep>(scores, resident.a[k], load);
            } else {
                uint32_t own[kM][4];
                resident.fetch(own, 16 * k);
                multiply_step<E, kM, kStep>(scores, own, load);
            }
        }

        // The weights lie in shared memory as in the registers of their 16 rows by 16 keys: 16 bytes a lane.
        Fragments fragments[kM];
        Vector16* const place = reinterpret_cast<Vector16*>(shared + kWeightOffset) +
                                (row / 16 * kPairs + warp.pair) * kM * 32 + ptx::lane();
        const int barrier = 1 + row / kStep * kPairs + warp.pair;
        if (warp.values) {
            TF_UNROLL
            for (int m = 0; m < kM; ++m) {
                Fragments weights;
                if constexpr (kModified) {
                    modified_weights(a, w, shared, number, row, warp.key + 16 * m, masked, scores[m], fragments[m],
                                     weights);
                    publish(place + m * 32, weights);
                } else {
                    plain_weights(a, w, shared, number, row, warp.key + 16 * m, masked, scores[m], fragments[m]);
                    publish(place + m * 32, fragments[m]);
                }
            }
            ptx::barrier_arrive(barrier, 64);
        } else {
            ptx::barrier_sync(barrier, 64);
            TF_UNROLL
            for (int m = 0; m < kM; ++m) {
                take(place + m * 32, fragments[m]);
                if constexpr (kModified) {
                    modified_gradient(a, table(shared, number), row, scores[m], fragments[m]);
                } else {
                    plain_gradient(table(shared, number), row, masked, scores[m], fragments[m]);
                }
            }
        }
        TF_UNROLL
        for (int k = 0; k < kStep / 16; ++k) {
            uint32_t own[kM][4];
            TF_UNROLL
            for (int m = 0; m < kM; ++m) {
                TF_UNROLL
                for (int i = 0; i < 4; ++i) own[m][i] = fragments[m][k][i];
            }
            multiply_step<E, kM, kHeadDim>(sums, own, [&](uint32_t (&b)[4], int n) {
                load_b_transposed<kBlockM>(b, second + row * 128, n, 16 * k);
            });
        }
    }

    static TF_DEVICE void publish(Vector16* place, const Fragments& weights) {
        TF_UNROLL
        for (int k = 0; k < kStep / 16; ++k) {
            const uint32_t (&f)[4] = weights[k];
            place[k * kPairs * kM * 32] = Vector16{{f[0], f[1], f[2], f[3]}};
        }
    }
    static TF_DEVICE void take(const Vector16* place, Fragments& weights) {
        TF_UNROLL
        for (int k = 0; k < kStep / 16; ++k) {
            const Vector16 f = place[k * kPairs * kM * 32];
            TF_UNROLL
            for (int i = 0; i < 4; ++i) weights[k][i] = f.word[i];
        }
    }

    // ------------------------------------------------------------------------------------- the gradients

    // A warp's sums into its rows of a tile in shared memory, from there to memory by 16 bytes. Keys that the padding
    // hides get zeros.
    static TF_DEVICE void store(const Arguments& a, const Work& w, const Warp& warp, char* shared, Sums& sums) {
        const Problem& p = a.problem;
        const Operand& operand = warp.values ? p.dvalue : p.dkey;
        const int columns = static_cast<int>(warp.values ? p.head_dim_v : p.head_dim);
        const float scale = warp.values ? 1.0f : p.softmax_scale;
        const int g = ptx::lane() / 4, t = ptx::lane() % 4, own = warp.key - w.first_key;
        char* const tile = shared + (warp.values ? kResident : 0);
        TF_UNROLL
        for (int m = 0; m < kM; ++m) {
            TF_UNROLL
            for (int e = 0; e < kHeadDim / 2; e += 2) {
                const int row = 16 * m + 8 * row_of(e) + g, key = warp.key + row;
                const bool held = key >= w.s.mask.start && key < w.s.mask.end;
                const uint32_t pair = held ? ptx::pack<E>(sums[m][e] * scale, sums[m][e + 1] * scale) : 0u;
                *reinterpret_cast<uint32_t*>(tile + chunk_offset<kBlockN>(own + row, e / 4) + 4 * t) = pair;
            }
        }
        const int key = warp.key + ptx::lane() % kKeys;
        const E* const row = row_at<E>(operand, w.s.batch, w.kv_head, w.s.first_key + key);
        const RowAddresses<kKeys> addresses{{key < w.stored ? reinterpret_cast<uint64_t>(row) : 0}};
        store_rows_at<E, kBlockN, kHeadDim>(tile, own, addresses, columns, in_chunks(a, columns));
    }

    static TF_DEVICE void run(const Arguments& a, char* shared) {
        Work& w = *reinterpret_cast<Work*>(shared + kWorkOffset);
        if (ptx::thread() == 0) w = work_of(a);
        ptx::sync_threads();
        if (w.first_key >= w.stored) return;
        const BlockRange& blocks = w.blocks;
        if constexpr (!kModified) keep_spans(a, w, shared);
        const int number = ptx::warp();
        Warp warp{number < kPairs, number % kPairs, 0};
        warp.key = w.first_key + warp.pair * kKeys;

        Resident resident;
        Sums sums{};
        if (blocks.first < blocks.stop) {
            char* const held = kHold ? shared : shared + kStageBytes;
            load_resident(a, w, held);
            resident.base =
                row_base(ptx::shared_address(held) + (warp.values ? 0 : kResident) + warp.pair * kKeys * 128);
            if constexpr (kHold) {
                ptx::cp_async_wait<0>();
                ptx::sync_threads();
                resident.hold();
            }
        }
        for (int i = blocks.first - 1; i < blocks.stop; ++i) {  // the first round only loads
            ptx::cp_async_wait<0>();
            ptx::sync_threads();  // tile i has come, and nobody reads tile i - 1 any more
            RowNumbers next{};
            if (i + 1 < blocks.stop) {
                load_tile(a, w, shared, i + 1);
                ptx::cp_async_commit();
                next = numbers_of(a, w, i + 1);
            }
            const bool masked = i < blocks.full || i >= blocks.partial;
            TF_NO_UNROLL
            for (int row = 0; row < kBlockM; row += kStep) {
                if (i >= blocks.first) step(a, w, warp, shared, i, row, masked, resident, sums);
                if (row == 0 && i + 1 < blocks.stop) keep_numbers(a, w, shared, i + 1, next);
            }
        }
        ptx::sync_threads();  // all have done with the last tile
        store(a, w, warp, shared, sums);
    }
};

}  // namespace cuda
}  // namespace tf
