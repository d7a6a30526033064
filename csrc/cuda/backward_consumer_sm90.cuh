// The backward pass for Hopper: the warpgroups that compute.
//
// Up to head_dim 128 a consumer owns 64 keys, so that P^T and dS^T are left operands of dV and dK in the registers
// where they arise; dS, which dQ sums over all keys, is what consumers exchange. At head_dim 256 the sums of 64 keys
// fill the registers of both consumers, which share the keys: each has half of the rows for P and dS, and half of the
// columns of every sum.
#pragma once

#include "cuda/backward_shape_sm90.cuh"
#include "cuda/wgmma_tiles.cuh"

namespace tf {
namespace cuda {

template <class Shape>
struct BackwardConsumerSm90 {
    using E = typename Shape::Element;
    using Scores = typename Shape::Scores;
    using Fragments = typename Shape::Fragments;
    using Sums = typename Shape::Sums;
    using Dquery = typename Shape::Dquery;
    using Barriers = typename Shape::Barriers;
    using Shared = typename Shape::Shared;
    using Work = typename Shape::Work;
    static constexpr int kHeadDim = Shape::kHeadDim, kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN;
    static constexpr int kScoreRows = Shape::kScoreRows, kSumColumns = Shape::kSumColumns, kPieces = Shape::kPieces;
    static constexpr bool kModified = Shape::kModified, kShareKeys = Shape::kShareKeys;

    struct Consumer {
        int number, thread;  // of the consumer, and of its 128
        RingPosition<2> query_at;
        RingPosition<Shape::kDoutStages> dout_at;
        RingPosition<1> weights_at;
        float factor;  // base2_factor
        KeyRows key_rows;
        KeptBits<kScoreRows> kept;  // by dropout, of a tile

        // Of the keys and of the rows that it has scores of: the first, in the block and in a tile.
        TF_DEVICE int first_key() const { return kShareKeys ? 0 : 64 * number; }
        TF_DEVICE int first_row() const { return kShareKeys ? kScoreRows * number : 0; }
        TF_DEVICE int warp_key() const { return first_key() + thread / 32 * 16; }
    };

    // After a wait for products, to which all lanes come together.
    template <int kStages>
    static TF_DEVICE void release(RingBarriers<kStages>& barriers, RingPosition<kStages>& at) {
        barriers.release(at);
        at.advance();
    }

    // Keys that some rows do not see, and rows that are another sequence's, may hold NaN, and 0 * NaN is NaN. Where one
    // is seen, the numbers of its row are NaN already. By all consumers.
    template <int kRows>
    static TF_DEVICE void make_finite(char* tile, int first_row, int thread) {
        constexpr int kChunks = kHeadDim / 8;
        TF_NO_UNROLL
        for (int i = first_row * kChunks + thread; i < kRows * kChunks; i += 256) {
            Vector16& chunk = *reinterpret_cast<Vector16*>(tile + chunk_offset<kRows>(i / kChunks, i % kChunks));
            Vector16 clean;
            TF_UNROLL
            for (int word = 0; word < 4; ++word) clean.word[word] = finite_or_zero<E>(chunk.word[word]);
            chunk = clean;
        }
    }
    static TF_DEVICE void clean_keys(const Arguments& a, const Work& w, const Shared& shared) {
        const bool all_seen = w.tiles.first == w.tiles.full && w.tiles.partial == w.tiles.stop &&
                              !(kModified && (w.s.holes || a.problem.bias.data != nullptr));
        if (all_seen) return;
        make_finite<kBlockN>(shared.key(), 0, ptx::thread() - 128);
        ptx::fence_async_proxy();
        ptx::barrier_sync(Shape::kConsumers, 256);
    }
    static TF_DEVICE void clean_tile(const Shared& shared, const Consumer& me, int rows) {
        shared.barriers().dout.wait_full(me.dout_at);
        make_finite<kBlockM>(shared.query(me.query_at.stage), rows, ptx::thread() - 128);
        make_finite<kBlockM>(shared.dout(me.dout_at.stage), rows, ptx::thread() - 128);
        ptx::fence_async_proxy();
        ptx::barrier_sync(Shape::kConsumers, 256);
    }

    // Where a thread's words of P^T or dS^T lie in a tile of keys by rows, as pack_rows numbers them.
    struct WeightPlaces {
        char* tile;
        int first;  // all others follow by constants

        TF_DEVICE uint32_t& operator()(int word) const {
            const int chunk = word / 2;
            return *reinterpret_cast<uint32_t*>(tile + (first ^ chunk % 8 * 16) + chunk / 8 * kBlockN * 128 +
                                                word % 2 * 1024);
        }
    };
    static TF_DEVICE WeightPlaces weight_places(char* tile, const Consumer& me) {
        const int key = me.warp_key() + ptx::lane() / 4, t = ptx::lane() % 4;
        return {tile, ptx::forget(key * 128 + (key % 8 * 16 ^ me.first_row() * 2) + 4 * t)};
    }
    static TF_DEVICE void write_weights(char* tile, const Consumer& me, const Fragments& weights) {
        const WeightPlaces place = weight_places(tile, me);
        TF_UNROLL
        for (int i = 0; i < kScoreRows / 4; ++i) place(i) = weights[i / 4][i % 4];
    }
    static TF_DEVICE void weights_written(Barriers& barriers) {
        ptx::fence_async_proxy();
        ptx::sync_warp();
        if (ptx::lane() == 0) ptx::mbarrier_arrive(&barriers.weights.full[0]);
    }

    static TF_DEVICE void stage_pieces(const Shared& shared, const Consumer& me, const Dquery& dq) {
        Four* const target = reinterpret_cast<Four*>(shared.piece(me.number)) + me.thread;
        TF_UNROLL
        for (int piece = 0; piece < kPieces; ++piece) {
            ptx::barrier_sync(Shape::kPieceEmpty + me.number, 160);
            TF_UNROLL
            for (int i = 0; i < 8; ++i) {
                const int e = 32 * piece + 4 * i;
                target[128 * i] = Four{{dq[e], dq[e + 1], dq[e + 2], dq[e + 3]}};
            }
            ptx::fence_async_proxy();
            ptx::barrier_arrive(Shape::kPieceFull + me.number, 160);
        }
    }

    // S^T = K Q^T and dP^T = V dO^T, issued.
    static TF_DEVICE void issue_scores(const char* keys, const char* rows, const Consumer& me, Scores& scores) {
        multiply<E, kScoreRows, kHeadDim>(scores, RowOperand<kBlockN>(keys + me.first_key() * 128),
                                          RowOperand<kBlockM>(rows + me.first_row() * 128), false);
        ptx::wgmma_commit();
    }
    // dQ = dS K, issued. dS is there with rows along the columns.
    static TF_DEVICE void issue_dquery(const Shared& shared, const Consumer& me, Dquery& dq) {
        const int rows = kHeadDim == 64 ? me.number * kBlockN * 128 : 0;
        const int columns = kHeadDim == 64 ? 0 : me.number * kPieces * kBlockN * 128;
        multiply<E, Shape::kDqColumns, kBlockN>(dq, ColumnOperand<kBlockN>(shared.ds() + rows),
                                                ColumnOperand<kBlockN>(shared.key() + columns), false);
        ptx::wgmma_commit();
    }

    static TF_DEVICE ElementPlaces<kBlockM> places(const Work& w, const Shared& shared, const Consumer& me) {
        return {shared.rows(me.query_at.stage), me.first_row(), w.first_key + me.warp_key()};
    }
    // S^T -> P^T packed, and what dS^T takes of it, in place.
    static TF_DEVICE void probabilities(const Arguments& a, const Work& w, const Shared& shared, int tile, Consumer& me,
                                        Scores& scores, Fragments& p) {
        const bool masked = tile < w.tiles.full || tile >= w.tiles.partial;
        if constexpr (kModified) {
            if (a.problem.softcap != 0.0f) shared.barriers().weights.wait_empty(me.weights_at);
            me.kept = modified_probabilities<E, kScoreRows>(a, w.s, places(w, shared, me), masked,
                                                            weight_places(shared.ds(), me), scores, p);
        } else {
            if (masked) hide_scores<kScoreRows>(me.key_rows, tile * kBlockM + me.first_row(), scores);
            plain_probabilities<kScoreRows>(shared.rows(me.query_at.stage), me.first_row(), me.factor, scores);
            pack_rows<E, kScoreRows>(scores, p);
        }
    }
    // dP^T -> dS^T, packed.
    static TF_DEVICE void gradients(const Arguments& a, const Work& w, const Shared& shared, int tile,
                                    const Consumer& me, const Scores& scores, const Fragments& p, Scores& dp,
                                    Fragments& ds) {
        const bool masked = tile < w.tiles.full || tile >= w.tiles.partial;
        if constexpr (kModified) {
            modified_gradients<kScoreRows>(a, places(w, shared, me), me.kept, scores, dp);
        } else if constexpr (kHeadDim == 64) {
            // Registers are short: P again from the operand.
            plain_gradients<kScoreRows>(
                shared.rows(me.query_at.stage), me.first_row(), masked,
                [&](int e) { return e % 2 == 0 ? low_of<E>(p[e / 8][e / 2 % 4]) : high_of<E>(p[e / 8][e / 2 % 4]); },
                dp);
        } else {
            plain_gradients<kScoreRows>(
                shared.rows(me.query_at.stage), me.first_row(), masked, [&](int e) { return scores[e]; }, dp);
        }
        pack_rows<E, kScoreRows>(dp, ds);
    }

    static TF_DEVICE void clean_rows(const Arguments& a, const Work& w, const Shared& shared, const Consumer& me,
                                     int tile) {
        const int rows = w.s.len_q * static_cast<int>(a.problem.group_size) - tile * kBlockM;
        if (a.problem.packed && rows < kBlockM) clean_tile(shared, me, rows);
    }

    // S and P of a tile, and meanwhile what becomes of dQ of the tile before; dP, issued, unless something changes
    // scores.
    static TF_DEVICE void begin_tile(const Arguments& a, const Work& w, const Shared& shared, int tile, Consumer& me,
                                     Scores& scores, Fragments& p, Scores& dp, Dquery& dq) {
        shared.barriers().query.wait_full(me.query_at);
        clean_rows(a, w, shared, me, tile);
        issue_scores(shared.key(), shared.query(me.query_at.stage), me, scores);
        ptx::wgmma_wait<1>();  // dQ is there for long; ptxas wants to hear it here
        ptx::wgmma_pin(dq);
        if (tile > w.tiles.first) {
            stage_pieces(shared, me, dq);
        } else {
            ptx::mbarrier_wait(&shared.barriers().value_full, 0);
        }
        shared.barriers().dout.wait_full(me.dout_at);
        if constexpr (!kModified) {
            issue_scores(shared.value(), shared.dout(me.dout_at.stage), me, dp);
            ptx::wgmma_wait<1>();
        } else {
            ptx::wgmma_wait<0>();
        }
        ptx::wgmma_pin(scores);
        probabilities(a, w, shared, tile, me, scores, p);
    }
    // Waits for the last three products of a tile.
    static TF_DEVICE void end_tile(const Shared& shared, Consumer& me, Sums& dk, Sums& dv, Dquery& dq) {
        Barriers& barriers = shared.barriers();
        ptx::wgmma_wait<2>();
        ptx::wgmma_pin(dv);
        release(barriers.dout, me.dout_at);
        ptx::wgmma_wait<1>();
        ptx::wgmma_pin(dk);
        release(barriers.query, me.query_at);
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(dq);
        release(barriers.weights, me.weights_at);
    }

    // A tile. What is not a product runs beside one: the exponentials beside dP, dS beside dV, the exchange of dS
    // beside dK, and what becomes of dQ beside S of the next tile. If something changes scores, dP comes later, for
    // want of registers.
    static TF_DEVICE void step_by_keys(const Arguments& a, const Work& w, const Shared& shared, int tile, Consumer& me,
                                       Sums& dk, Sums& dv, Dquery& dq) {
        Barriers& barriers = shared.barriers();
        const char *const query = shared.query(me.query_at.stage), *const dout = shared.dout(me.dout_at.stage);
        Scores scores, dp;
        Fragments p, ds;
        begin_tile(a, w, shared, tile, me, scores, p, dp, dq);
        multiply<E, kSumColumns, kScoreRows>(dv, p, ColumnOperand<kBlockM>(dout), true);
        ptx::wgmma_commit();
        if constexpr (!kModified) {
            ptx::wgmma_wait<1>();
        } else {
            if constexpr (kHeadDim == 64) ptx::wgmma_wait<0>();
            issue_scores(shared.value(), dout, me, dp);
            ptx::wgmma_wait<0>();
            ptx::wgmma_pin(dv);
        }
        ptx::wgmma_pin(dp);
        gradients(a, w, shared, tile, me, scores, p, dp, ds);
        barriers.weights.wait_empty(me.weights_at);
        write_weights(shared.ds(), me, ds);
        weights_written(barriers);
        multiply<E, kSumColumns, kScoreRows>(dk, ds, ColumnOperand<kBlockM>(query), true);
        ptx::wgmma_commit();
        barriers.weights.wait_full(me.weights_at);
        issue_dquery(shared, me, dq);
        end_tile(shared, me, dk, dv, dq);
    }

    static TF_DEVICE void step_by_rows(const Arguments& a, const Work& w, const Shared& shared, int tile, Consumer& me,
                                       Sums& dk, Sums& dv, Dquery& dq) {
        Barriers& barriers = shared.barriers();
        const int columns = 2 * me.number * kBlockM * 128;
        const char *const query = shared.query(me.query_at.stage), *const dout = shared.dout(0);
        Scores scores, dp;
        Fragments p, ds;
        begin_tile(a, w, shared, tile, me, scores, p, dp, dq);
        if constexpr (kModified) {
            issue_scores(shared.value(), dout, me, dp);
        }
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(dp);
        gradients(a, w, shared, tile, me, scores, p, dp, ds);
        barriers.weights.wait_empty(me.weights_at);
        write_weights(shared.p(), me, p);
        write_weights(shared.ds(), me, ds);
        weights_written(barriers);
        barriers.weights.wait_full(me.weights_at);
        multiply<E, kSumColumns, kBlockM>(dv, RowOperand<kBlockN>(shared.p()), ColumnOperand<kBlockM>(dout + columns),
                                          true);
        ptx::wgmma_commit();
        multiply<E, kSumColumns, kBlockM>(dk, RowOperand<kBlockN>(shared.ds()), ColumnOperand<kBlockM>(query + columns),
                                          true);
        ptx::wgmma_commit();
        issue_dquery(shared, me, dq);
        end_tile(shared, me, dk, dv, dq);
    }

    // A consumer's part of dK or dV, by 16 bytes a thread. Keys that are hidden get zeros.
    static TF_DEVICE void store(const Work& w, const Consumer& me, const Operand& operand, int64_t columns, float scale,
                                const Sums& sums) {
        const int first_column = kShareKeys ? kSumColumns * me.number : 0;
        TF_UNROLL
        for (int r = 0; r < 2; ++r) {
            const int key = w.first_key + me.warp_key() + ptx::lane() / 4 + 8 * r;
            const bool held = key >= w.s.mask.start && key < w.s.mask.end;
            E* const row = mutable_row_at<E>(operand, w.s.batch, w.job.kv_head, w.s.first_key + key);
            TF_UNROLL
            for (int group = 0; group < kSumColumns / 32; ++group) {
                Vector16 chunk;
                TF_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const int e = 16 * group + 4 * i + 2 * r;
                    chunk.word[i] = held ? ptx::pack<E>(sums[e] * scale, sums[e + 1] * scale) : 0u;
                }
                exchange_in_quad(chunk.word);
                const int column = first_column + 32 * group + 8 * (ptx::lane() % 4);
                const int count = min_of(8, static_cast<int>(columns) - column);
                if (key < w.stored && count > 0) store_chunk(row + column, count, chunk, true);
            }
        }
    }

    static TF_DEVICE void consume(const Arguments& a, const Shared& shared, int number) {
        Consumer me{};
        me.number = number;
        me.thread = ptx::thread() - 128 * (number + 1);
        Sums dk, dv;
        TF_UNROLL
        for (int e = 0; e < kSumColumns / 2; ++e) dk[e] = dv[e] = 0.0f;
        {
            const Work w = Shape::work_of(a, ptx::block_x());
            me.factor = base2_factor(a, kModified);
            me.key_rows = rows_of_keys(a, w.s, w.first_key + me.warp_key() + ptx::lane() / 4);
            if (w.tiles.first < w.tiles.stop) {
                ptx::mbarrier_wait(&shared.barriers().key_full, 0);
                clean_keys(a, w, shared);
            }
            Dquery dq;
            for (int i = w.tiles.first; i < w.tiles.stop; ++i) {
                if constexpr (kShareKeys) {
                    step_by_rows(a, w, shared, i, me, dk, dv, dq);
                } else {
                    step_by_keys(a, w, shared, i, me, dk, dv, dq);
                }
            }
            if (w.tiles.first < w.tiles.stop) stage_pieces(shared, me, dq);
        }
        // Where the job lies is found again: registers are short in between.
        const Work w = Shape::work_of(a, ptx::forget(ptx::block_x()));
        store(w, me, a.problem.dvalue, a.problem.head_dim_v, 1.0f, dv);
        store(w, me, a.problem.dkey, a.problem.head_dim, a.problem.softmax_scale, dk);
    }
};

}  // namespace cuda
}  // namespace tf
