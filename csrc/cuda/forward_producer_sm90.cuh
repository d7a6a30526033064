// The producer's warpgroup of the Hopper forward kernel: one thread draws jobs and copies by TMA; the other warps clean
// values that no row sees.
#pragma once

#include "cuda/forward_shape_sm90.cuh"
#include "cuda/hidden_values.cuh"
#include "cuda/tensor_maps.cuh"

namespace tf {
namespace cuda {

template <class Shape>
struct ForwardProducerSm90 {
    using E = typename Shape::E;
    using Shared = typename Shape::Shared;
    using Barriers = typename Shape::Barriers;
    using Tile = typename Shape::Tile;
    static constexpr int kHeadDim = Shape::kHeadDim, kConsumers = Shape::kConsumers, kBlockN = Shape::kBlockN,
                         kStages = Shape::kStages, kCleanerThreads = Shape::kCleanerThreads;
    static constexpr bool kModified = Shape::kModified;

    // One thread. K of a block goes before V of the block before it: the order in which they are used.
    static TF_DEVICE void produce(const Arguments& a, const Shared& shared) {
        Barriers& barriers = shared.barriers();
        const Problem& p = a.problem;
        const int count = job_count(a), box_rows = key_box_rows(p, kBlockN);
        const bool query_boxes = p.query.data != nullptr && packed_rows_are_boxes(p, p.query, 64);
        RingPosition<kStages> key_at, value_at;
        // There is no map of what has no elements.
        if (p.key.data != nullptr) ptx::prefetch_tensor_map(&a.key_map);
        if (p.value.data != nullptr) ptx::prefetch_tensor_map(&a.value_map);
        if (query_boxes) ptx::prefetch_tensor_map(&a.query_map);
        int jobs = 0;
        uint32_t queries = 0;
        for (int number = ptx::block_x(); number < count; ++jobs) {
            Tile& tile = barriers.jobs.place(jobs);
            tile.queries = queries;
            Shape::find_tile(a, number, tile);
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
                uint64_t* full = Shape::must_clean(a, tile, j) ? &barriers.landed[value_at.stage]
                                                               : &barriers.value.full[value_at.stage];
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
                    ptx::mbarrier_arrive_expect(&barriers.query_full[c], Shape::kQueryBytes);
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

    // By the other three warps.
    static TF_DEVICE void clean_values(const Arguments& a, const Shared& shared, int thread) {
        using Values = HiddenValues<E, kBlockN, kHeadDim, kCleanerThreads>;
        Barriers& barriers = shared.barriers();
        RingPosition<kStages> value_at;
        uint32_t landed = 0;  // parities, a bit for each stage
        for (int jobs = 0;; ++jobs) {
            const Tile& tile = barriers.jobs.take(jobs);
            if (tile.is_end()) return;
            for (int j = tile.blocks.stop - 1; j >= tile.blocks.first; --j, value_at.advance()) {
                if (!Shape::must_clean(a, tile, j)) continue;
                const int stage = value_at.stage, n = j * kBlockN;
                ptx::mbarrier_wait(&barriers.landed[stage], landed >> stage & 1);
                landed ^= 1u << stage;
                Values::clean_outside(shared.value(stage), thread, n, tile.begin, tile.stop);
                if (kModified && Shape::hides_inside(a, tile)) {
                    Values::clean_inside(a, tile.s, tile.rows, shared.value(stage), thread, n, tile.begin, tile.stop);
                }
                ptx::fence_async_proxy();
                ptx::barrier_sync(Shape::kCleaners, kCleanerThreads);
                if (thread == 0) ptx::mbarrier_arrive(&barriers.value.full[stage]);
            }
            barriers.jobs.release(jobs);
        }
    }
};

}  // namespace cuda
}  // namespace tf
