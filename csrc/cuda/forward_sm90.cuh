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

#include "cuda/hidden_values.cuh"
#include "cuda/pipeline.cuh"
#include "cuda/row_stores.cuh"
#include "cuda/tensor_maps.cuh"
#include "cuda/wgmma_tiles.cuh"

namespace tf {
namespace cuda {

template <class E, int kHeadDim, bool kModified, int kConsumers, int kBlockN_, int kStages>
struct ForwardSm90 {
    static constexpr int kThreads = 128 * (kConsumers + 1), kMinBlocks = 1;
    static constexpr int kBlockM = 64 * kConsumers, kBlockN = kBlockN_;
    static constexpr bool kPersistent = true;
    static constexpr int kQueryBytes = 64 * kHeadDim * 2, kKeyBytes = kBlockN * kHeadDim * 2;

    // A thread of the producer's group takes no sums into registers, and leaves its own to the consumers. All together
    // have 65536 / kThreads (rounded down to a multiple of 8) each at the start, and may not have more afterwards.
    static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
    static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;

    // At head_dim 256 a warpgroup's products take so long that turns only cost.
    static constexpr bool kTurns = kHeadDim <= 128;

    // What the producer finds out about a job, for all to read in shared memory.
    struct Tile {
        Job job;
        DeviceSequence s;
        PackedRows rows;
        int begin, stop;  // keys that some row sees
        BlockRange blocks;
        uint32_t queries;  // parity of the barriers of Q
        TF_DEVICE bool is_end() const { return job.tile < 0; }
    };
    static TF_DEVICE void find_tile(const Arguments& a, int number, Tile& tile) {
        tile.job = job_of(a, number, true);
        tile.s = sequence_of(a, tile.job.batch);
        tile.rows = packed_rows(a, tile.s, tile.job, kBlockM);
        const TileRange range = keys_of(tile.s, tile.rows);
        tile.begin = static_cast<int>(range.begin);
        tile.stop = static_cast<int>(range.end);
        tile.blocks = blocks_of<kBlockN>(range, false);
    }

    // Whether a bias or holes may hide keys that the intervals show.
    static TF_DEVICE bool hides_inside(const Arguments& a, const Tile& tile) {
        return kModified && (tile.s.holes || a.problem.bias.data != nullptr);
    }
    // Whether block j of V may hold what no row of the tile sees.
    static TF_DEVICE bool must_clean(const Arguments& a, const Tile& tile, int j) {
        return hides_inside(a, tile) || j * kBlockN < tile.begin || (j + 1) * kBlockN > tile.stop;
    }

    struct RowKeys {
        int lo, hi;
    };
    struct Barriers {
        uint64_t query_full[kConsumers], query_empty[kConsumers];
        RingBarriers<kStages> key, value;
        uint64_t landed[kStages];  // values that have to be cleaned before they are full
        Mailbox<Tile> jobs;
        RowKeys rows[kBlockM];
        float nowhere;
    };
    struct Shared {
        char* base;
        TF_DEVICE char* query(int consumer) const { return base + consumer * kQueryBytes; }
        TF_DEVICE char* key(int stage) const { return base + kConsumers * kQueryBytes + stage * kKeyBytes; }
        TF_DEVICE char* value(int stage) const { return key(kStages + stage); }
        TF_DEVICE Barriers& barriers() const { return *reinterpret_cast<Barriers*>(key(2 * kStages)); }
    };
    static constexpr int kSharedBytes =
        kConsumers * kQueryBytes + 2 * kStages * kKeyBytes + static_cast<int>(sizeof(Barriers));

    enum NamedBarrier { kTurn = 1, kCleaners = kTurn + kConsumers, kQueryRows };  // kQueryRows + consumer

    // ---------------------------------------------------------------------------------------- host

    static const char* refuses(const Arguments& a) { return key_map_refuses(a, kBlockN); }

    static void describe(const Arguments& a, MapRequests& maps) {
        const Problem& p = a.problem;
        maps.key = key_geometry(p, p.key, p.head_dim, kBlockN);
        maps.value = key_geometry(p, p.value, p.head_dim_v, kBlockN);
        if (packed_rows_are_boxes(p, p.query, 64)) maps.query = packed_rows_geometry(p, p.query, p.head_dim, 64);
    }

    // ---------------------------------------------------------------------------------------- the producer

    // One thread. K of a block goes before V of the block before it: the order in which they are used.
    static TF_DEVICE void produce(const Arguments& a, const Shared& shared) {
        Barriers& barriers = shared.barriers();
        const Problem& p = a.problem;
        const int count = job_count(a), box_rows = key_box_rows(p, kBlockN);
        const bool query_boxes = packed_rows_are_boxes(p, p.query, 64);
        RingPosition<kStages> key_at, value_at;
        int jobs = 0;
        uint32_t queries = 0;
        for (int number = ptx::block_x(); number < count; ++jobs) {
            Tile& tile = barriers.jobs.place(jobs);
            tile.queries = queries;
            find_tile(a, number, tile);
            barriers.jobs.post(jobs);
            number = ptx::atomic_add(a.queue, 1) + ptx::blocks_x();

            const auto load_key = [&](int j) {
                uint64_t* full = &barriers.key.full[key_at.stage];
                barriers.key.wait_empty(key_at);
                ptx::mbarrier_arrive_expect(full, key_bytes<kBlockN, kHeadDim>(box_rows, j * kBlockN, tile.stop));
                load_keys<kBlockN, kHeadDim>(p, p.key, &a.key_map, box_rows, tile.s, tile.job.kv_head, j * kBlockN,
                                             tile.stop, shared.key(key_at.stage), full);
                key_at.advance();
            };
            const auto load_value = [&](int j) {
                uint64_t* full =
                    must_clean(a, tile, j) ? &barriers.landed[value_at.stage] : &barriers.value.full[value_at.stage];
                barriers.value.wait_empty(value_at);
                ptx::mbarrier_arrive_expect(full, key_bytes<kBlockN, kHeadDim>(box_rows, j * kBlockN, tile.stop));
                load_keys<kBlockN, kHeadDim>(p, p.value, &a.value_map, box_rows, tile.s, tile.job.kv_head, j * kBlockN,
                                             tile.stop, shared.value(value_at.stage), full);
                value_at.advance();
            };

            const int first = tile.blocks.first, last = tile.blocks.stop - 1;
            if (last < first) continue;
            load_key(last);
            if (query_boxes) {
                for (int c = 0; c < kConsumers; ++c) {
                    ptx::mbarrier_wait(&barriers.query_empty[c], queries ^ 1);
                    ptx::mbarrier_arrive_expect(&barriers.query_full[c], kQueryBytes);
                    load_packed_rows<64, kHeadDim>(p.query, &a.query_map, tile.s, tile.rows, tile.job.kv_head, 64 * c,
                                                   shared.query(c), &barriers.query_full[c]);
                }
                queries ^= 1;
            }
            for (int j = last - 1; j >= first; --j) {
                load_key(j);
                load_value(j + 1);
            }
            load_value(first);
        }
        barriers.jobs.place(jobs).job.tile = -1;
        barriers.jobs.post(jobs);
    }

    // ---------------------------------------------------------------------------------------- the cleaners

    static constexpr int kCleanerThreads = 96;  // the other warps of the producer's group

    static TF_DEVICE void clean_values(const Arguments& a, const Shared& shared, int thread) {
        using Values = HiddenValues<E, kBlockN, kHeadDim, kCleanerThreads>;
        Barriers& barriers = shared.barriers();
        RingPosition<kStages> value_at;
        uint32_t landed = 0;  // parities, a bit for each stage
        for (int jobs = 0;; ++jobs) {
            const Tile& tile = barriers.jobs.take(jobs);
            if (tile.is_end()) return;
            for (int j = tile.blocks.stop - 1; j >= tile.blocks.first; --j, value_at.advance()) {
                if (!must_clean(a, tile, j)) continue;
                const int stage = value_at.stage, n = j * kBlockN;
                ptx::mbarrier_wait(&barriers.landed[stage], landed >> stage & 1);
                landed ^= 1u << stage;
                Values::clean_outside(shared.value(stage), thread, n, tile.begin, tile.stop);
                if (kModified && hides_inside(a, tile)) {
                    Values::clean_inside(a, tile.s, tile.rows, shared.value(stage), thread, n, tile.begin, tile.stop);
                }
                ptx::fence_async_proxy();
                ptx::barrier_sync(kCleaners, kCleanerThreads);
                if (thread == 0) ptx::mbarrier_arrive(&barriers.value.full[stage]);
            }
            barriers.jobs.release(jobs);
        }
    }

    // ---------------------------------------------------------------------------------------- the consumers

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
        if (kTurns) ptx::barrier_sync(kTurn + me.number, 256);
    }
    static TF_DEVICE void pass_turn(int from) {
        if (kTurns) ptx::barrier_arrive(kTurn + (from + 1 == kConsumers ? 0 : from + 1), 256);
    }

    static TF_DEVICE void wait_for_query(const Arguments& a, const Shared& shared, const Tile& tile, Consumer& me) {
        const Problem& p = a.problem;
        if (packed_rows_are_boxes(p, p.query, 64)) {
            ptx::mbarrier_wait(&shared.barriers().query_full[me.number], tile.queries);
            return;
        }
        const int barrier = kQueryRows + me.number;
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
            if (a.seed != nullptr) drop<kBlockN>(a, static_cast<uint64_t>(*a.seed), tile.s, rows, n, s);
        } else {
            if (masked) {
                ThreadRows rows;
                const int row = first_row();
                TF_UNROLL
                for (int r = 0; r < 2; ++r) {
                    const RowKeys keys = shared.barriers().rows[row + 8 * r];
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
        ptx::wgmma_fence();
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
            ptx::wgmma_fence();
            issue_scores(shared, me, me.key_at.stage, s);
            ptx::wgmma_wait<0>();
            ptx::wgmma_pin(s);
            barriers.key.release(me.key_at);
            me.key_at.advance();
            exponentials(a, shared, tile, j * kBlockN, true, sums, s, shrink);
            pack_rows<E, kBlockN>(s, sums.p);
        }
        --j;
        if constexpr (kModified) {  // where steps are long, one copy of their code is enough
            for (; j >= blocks.first; --j) {
                step(a, shared, tile, j, j >= blocks.partial || j < blocks.full, me, sums);
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
        ptx::wgmma_fence();
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

    // ---------------------------------------------------------------------------------------- all together

    static TF_DEVICE void run(const Arguments& a, char* memory) {
        const Shared shared{memory};
        Barriers& barriers = shared.barriers();
        if (ptx::thread() == 0) {
            for (int c = 0; c < kConsumers; ++c) {
                ptx::mbarrier_init(&barriers.query_full[c], 1);
                ptx::mbarrier_init(&barriers.query_empty[c], 4);
            }
            for (int i = 0; i < kStages; ++i) ptx::mbarrier_init(&barriers.landed[i], 1);
            barriers.key.init(1, 4 * kConsumers);
            barriers.value.init(1, 4 * kConsumers);
            barriers.jobs.init(4 * kConsumers + kCleanerThreads / 32);
            ptx::fence_mbarrier_init();
        }
        ptx::sync_threads();
        const int warp = ptx::warp();
        if (warp < 4) {
            ptx::decrease_registers<kProducerRegisters>();
            if (warp != 0) {
                clean_values(a, shared, ptx::thread() - 32);
            } else if (ptx::elect_one()) {
                produce(a, shared);
            }
        } else {
            ptx::increase_registers<kConsumerRegisters>();
            consume(a, shared, warp / 4 - 1);
        }
    }
};

}  // namespace cuda
}  // namespace tf
