// Forward pass for Hopper: a warp group that copies by TMA, and two or three that compute by wgmma.
//
// The blocks of a tile go from the last to the first. Consumer warpgroups own 64 rows each; their scores, probabilities
// and sums stay in registers. Two things keep the tensor cores busy while the exponentials are taken (both ideas:
// Shah et al. 2024): within a warpgroup the product S = Q K^T of the next block is issued before O += P V of this one,
// so that the softmax of S runs beside the second product; and between warpgroups, turns are taken by named barriers,
// so that one issues its products while the other is in its softmax.
//
// A block stays on its multiprocessor and draws tile after tile (Arguments::queue): the copies of a tile's first blocks
// run while the consumers finish the tile before.
#pragma once

#include "cuda/forward_producer_sm90.cuh"
#include "cuda/row_stores.cuh"
#include "cuda/wgmma_tiles.cuh"

namespace tf {
namespace cuda {

template <class Shape>
struct ForwardConsumerSm90 {
    using E = typename Shape::E;
    using Shared = typename Shape::Shared;
    using Barriers = typename Shape::Barriers;
    using Tile = typename Shape::Tile;
    static constexpr int kHeadDim = Shape::kHeadDim, kConsumers = Shape::kConsumers, kBlockN = Shape::kBlockN,
                         kStages = Shape::kStages;
    static constexpr bool kModified = Shape::kModified, kTurns = Shape::kTurns;

    // What a consumer keeps from tile to tile, and what it has of a tile.
    struct Consumer {
        int number;
        RingPosition<kStages> key_at;  // the values to be used next are those of the block before
    };
    struct Sums {
        float o[kHeadDim / 2];
        uint32_t p[kBlockN / 16][4];
        SoftmaxState softmax;
        float factor;
    };

    // Products of all consumers take turns; a consumer waits for the one before it and tells the one after.
    static TF_DEVICE void wait_for_turn(const Consumer& me) {
        if (kTurns) ptx::barrier_sync(Shape::kTurn + me.number, 256);
    }
    static TF_DEVICE void pass_turn(int from) {
        if (kTurns) ptx::barrier_arrive(Shape::kTurn + (from + 1 == kConsumers ? 0 : from + 1), 256);
    }

    static TF_DEVICE void wait_for_query(const Arguments& a, const Shared& shared, const Tile& tile, Consumer& me) {
        const Problem& p = a.problem;
        if (packed_rows_are_boxes(p, p.query, 64)) {
            ptx::mbarrier_wait(&shared.barriers().query_full[me.number], tile.queries);
            return;
        }
        const int barrier = Shape::kQueryRows + me.number;
        ptx::barrier_sync(barrier, 128);  // products of the last tile may still be read by other warps
        load_rows<E, 64, kHeadDim, 128>(
            shared.query(me.number), ptx::forget(ptx::thread() % 128), static_cast<int>(p.head_dim), true, p.query.data,
            [&](int row) {
                const int packed = 64 * me.number + row, position = tile.s.first_query + tile.rows.position(packed);
                return tile.rows.has(packed) ? row_at<E>(p.query, tile.s.batch, tile.rows.head(packed), position)
                                             : static_cast<const E*>(nullptr);
            });
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
        ptx::fence_async_proxy();
        ptx::barrier_sync(barrier, 128);
    }

    // S = Q K^T, issued.
    static TF_DEVICE void issue_scores(const Shared& shared, const Consumer& me, int stage, float (&s)[kBlockN / 2]) {
        multiply<E, kBlockN, kHeadDim>(s, RowOperand<64>(shared.query(me.number)),
                                       RowOperand<kBlockN>(shared.key(stage)), false);
        ptx::wgmma_commit();
    }
    // O += P V, issued.
    static TF_DEVICE void issue_sums(const Shared& shared, int stage, Sums& sums) {
        multiply<E, kHeadDim, kBlockN>(sums.o, sums.p, ColumnOperand<kBlockN>(shared.value(stage)), true);
        ptx::wgmma_commit();
    }

    // This thread's first row in the tile (it has another 8 further), and what there is to know of both. That is found
    // anew where it matters, since registers are short in between.
    static TF_DEVICE int first_row() { return ptx::forget(ptx::thread()) / 32 * 16 - 64 + ptx::lane() / 4; }
    static TF_DEVICE ThreadRows rows_of(const Tile& tile) { return thread_rows(tile.s, tile.rows, first_row()); }

    static TF_DEVICE void exponentials(const Arguments& a, const Shared& shared, const Tile& tile, int n, bool masked,
                                       Sums& sums, float (&s)[kBlockN / 2], float (&shrink)[2]) {
        if constexpr (kModified) {
            const ThreadRows rows = rows_of(tile);
            modify_scores<kBlockN>(a, tile.s, rows, n, s);
            if (masked) mask_scores<kBlockN>(rows, n, s);
            softmax_step<kBlockN, true>(s, sums.softmax, sums.factor, shrink);
            if (a.problem.dropout_p > 0.0) drop<kBlockN>(a, static_cast<uint64_t>(*a.seed), tile.s, rows, n, s);
        } else {
            if (masked) {
                ThreadRows rows;
                const int row = first_row();
                TF_UNROLL
                for (int r = 0; r < 2; ++r) {
                    const auto keys = shared.barriers().rows[row + 8 * r];
                    rows.lo[r] = keys.lo, rows.hi[r] = keys.hi;
                }
                mask_scores<kBlockN>(rows, n, s);
            }
            softmax_step<kBlockN, false>(s, sums.softmax, sums.factor, shrink);
        }
    }

    // Scores of block j beside the sums of block j + 1.
    static TF_DEVICE void step(const Arguments& a, const Shared& shared, const Tile& tile, int j, bool masked,
                               Consumer& me, Sums& sums) {
        Barriers& barriers = shared.barriers();
        const RingPosition<kStages> value_at = me.key_at.previous();
        float s[kBlockN / 2], shrink[2];
        barriers.key.wait_full(me.key_at);
        barriers.value.wait_full(value_at);
        wait_for_turn(me);
        issue_scores(shared, me, me.key_at.stage, s);
        issue_sums(shared, value_at.stage, sums);
        pass_turn(me.number);
        ptx::wgmma_wait<1>();
        ptx::wgmma_pin(s);
        barriers.key.release(me.key_at);
        me.key_at.advance();
        exponentials(a, shared, tile, j * kBlockN, masked, sums, s, shrink);
        // ptxas would move the wait for the second product up to that for the first; a store that depends on the
        // exponentials (and never happens) keeps it here.
        const float total = sums.softmax.total[0] + sums.softmax.total[1];
        if (total < 0.0f) *static_cast<volatile float*>(&barriers.nowhere) = total;
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(sums.o);
        barriers.value.release(value_at);
        if (ptx::any(shrink[0] != 1.0f || shrink[1] != 1.0f)) scale_rows<kHeadDim>(sums.o, shrink);
        pack_rows<E, kBlockN>(s, sums.p);
    }

    static TF_DEVICE bool is_edge(const BlockRange& blocks, int j) { return j >= blocks.partial || j < blocks.full; }

    static TF_DEVICE void attend(const Arguments& a, const Shared& shared, const Tile& tile, const BlockRange& blocks,
                                 Consumer& me, Sums& sums) {
        Barriers& barriers = shared.barriers();
        int j = blocks.stop - 1;
        if constexpr (!kModified) {
            const ThreadRows rows = rows_of(tile);
            for (int r = 0; r < 2; ++r) {
                if (ptx::lane() % 4 == 0) barriers.rows[first_row() + 8 * r] = {rows.lo[r], rows.hi[r]};
            }
            ptx::sync_warp();
        }
        wait_for_query(a, shared, tile, me);
        {
            float s[kBlockN / 2], shrink[2];
            barriers.key.wait_full(me.key_at);
            issue_scores(shared, me, me.key_at.stage, s);
            ptx::wgmma_wait<0>();
            ptx::wgmma_pin(s);
            barriers.key.release(me.key_at);
            me.key_at.advance();
            exponentials(a, shared, tile, j * kBlockN, is_edge(blocks, j), sums, s, shrink);
            pack_rows<E, kBlockN>(s, sums.p);
        }
        --j;
        if constexpr (kModified) {  // where steps are long, one copy of their code is enough
            for (; j >= blocks.first; --j) {
                step(a, shared, tile, j, is_edge(blocks, j), me, sums);
            }
        } else {  // at the right edge, in the middle, at the left edge; the edges share their code
            for (int edge = blocks.partial; j >= blocks.first; edge = blocks.first) {
                for (; j >= edge; --j) step(a, shared, tile, j, true, me, sums);
                for (; j >= blocks.full; --j) step(a, shared, tile, j, false, me, sums);
            }
        }
        if (ptx::lane() == 0) ptx::mbarrier_arrive(&barriers.query_empty[me.number]);
        const RingPosition<kStages> value_at = me.key_at.previous();
        barriers.value.wait_full(value_at);
        issue_sums(shared, value_at.stage, sums);
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(sums.o);
        barriers.value.release(value_at);
    }

    // ---------------------------------------------------------------------------------------- results

    static TF_DEVICE void store(const Arguments& a, const Tile& tile, const ThreadRows& rows, const Sums& sums) {
        const Problem& p = a.problem;
        TF_UNROLL
        for (int r = 0; r < 2; ++r) {
            const int head = rows.head[r], position = rows.position[r];
            const float total = quad_sum(sums.softmax.total[r]);
            const RowEnd end = finish_row(a, sums.softmax.top[r], total, head, rows.inside[r], sums.factor);
            if (rows.inside[r] && ptx::lane() % 4 == 0) store_row_numbers(a, tile.s, head, position, end);
            E* row = mutable_row_at<E>(p.out, tile.s.batch, head, tile.s.first_query + position);
            store_row<E, kHeadDim>(sums.o, r, end.scale, rows.inside[r], row, static_cast<int>(p.head_dim_v));
        }
    }

    static TF_DEVICE void consume(const Arguments& a, const Shared& shared, int number) {
        Mailbox<Tile>& mailbox = shared.barriers().jobs;
        Consumer me{number, {}};
        if (number == kConsumers - 1) pass_turn(number);  // the first one begins
        for (int jobs = 0;; ++jobs) {
            const Tile& tile = mailbox.take(jobs);
            // By shuffles, from which the compiler knows that a warp's lanes agree, and counts in uniform registers.
            if (ptx::shuffle(tile.job.tile, 0) < 0) return;
            const BlockRange blocks = {ptx::shuffle(tile.blocks.first, 0), ptx::shuffle(tile.blocks.full, 0),
                                       ptx::shuffle(tile.blocks.partial, 0), ptx::shuffle(tile.blocks.stop, 0)};
            Sums sums;
            sums.factor = base2_factor(a, kModified);
            TF_UNROLL
            for (int e = 0; e < kHeadDim / 2; ++e) sums.o[e] = 0.0f;
            if (blocks.first < blocks.stop) attend(a, shared, tile, blocks, me, sums);
            store(a, tile, rows_of(tile), sums);
            mailbox.release(jobs);
        }
    }
};

template <class E, int kHeadDim, bool kModified, int kConsumers, int kBlockN_, int kStages>
struct ForwardSm90 {
    using Shape = ForwardShapeSm90<E, kHeadDim, kModified, kConsumers, kBlockN_, kStages>;
    static constexpr int kThreads = Shape::kThreads, kMinBlocks = 1;
    static constexpr int kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN, kSharedBytes = Shape::kSharedBytes;
    static constexpr bool kPersistent = true;

    static const char* refuses(const Arguments& a) { return key_map_refuses(a, kBlockN); }

    // Blocks of more than 128 keys pay where nearly all of them are full.
    static bool suits(const Problem& p) {
        const bool windowed = p.right < p.seqlen_q || p.left < p.seqlen_k;
        const bool long_enough = p.seqlen_k >= 2048 || p.seqlen_k % kBlockN == 0;
        return kBlockN <= 128 || (!windowed && long_enough && !p.packed && p.page_size == 0 && p.key_mask == nullptr);
    }

    static void describe(const Arguments& a, MapRequests& maps) {
        const Problem& p = a.problem;
        maps.key = key_geometry(p, p.key, p.head_dim, kBlockN);
        maps.value = key_geometry(p, p.value, p.head_dim_v, kBlockN);
        if (packed_rows_are_boxes(p, p.query, 64)) maps.query = packed_rows_geometry(p, p.query, p.head_dim, 64);
    }

    static TF_DEVICE void run(const Arguments& a, char* memory) {
        const typename Shape::Shared shared{memory};
        typename Shape::Barriers& barriers = shared.barriers();
        if (ptx::thread() == 0) {
            for (int c = 0; c < kConsumers; ++c) {
                ptx::mbarrier_init(&barriers.query_full[c], 1);
                ptx::mbarrier_init(&barriers.query_empty[c], 4);
            }
            for (int i = 0; i < kStages; ++i) ptx::mbarrier_init(&barriers.landed[i], 1);
            barriers.key.init(1, 4 * kConsumers);
            barriers.value.init(1, 4 * kConsumers);
            barriers.jobs.init(4 * kConsumers + Shape::kCleanerThreads / 32);
            ptx::fence_mbarrier_init();
        }
        ptx::sync_threads();
        const int warp = ptx::warp();
        if (warp < 4) {
            ptx::decrease_registers<Shape::kProducerRegisters>();
            if (warp != 0) {
                ForwardProducerSm90<Shape>::clean_values(a, shared, ptx::thread() - 32);
            } else if (ptx::elect_one()) {
                ForwardProducerSm90<Shape>::produce(a, shared);
            }
        } else {
            ptx::increase_registers<Shape::kConsumerRegisters>();
            ForwardConsumerSm90<Shape>::consume(a, shared, warp / 4 - 1);
        }
    }
};

}  // namespace cuda
}  // namespace tf
