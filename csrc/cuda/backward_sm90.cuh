// Backward pass for Hopper in five products (Dao 2023; on Hopper: Shah et al. 2024): a block of keys of a KV head goes
// through the tiles of packed rows that see any of them.
//
//   S^T = K Q^T      dP^T = V dO^T      dV += P^T dO      dK += dS^T Q      dQ = dS K
//
// Two consumer warpgroups compute. dK and dV stay in their registers; dQ of a tile goes through shared memory and is
// added to float32 sums in global memory by bulk copies that reduce (cuda/backward_sums_sm90.cuh).
#pragma once

#include "cuda/backward_consumer_sm90.cuh"
#include "cuda/backward_producer_sm90.cuh"

namespace tf {
namespace cuda {

// Grid: jobs (job_of with last_first = false), tiles = blocks of keys of the longest sequence. With
// Arguments::deterministic, blocks wait for those before them, and start in the order of their numbers.
template <class E, int kHeadDim, bool kModified>
struct BackwardSm90 {
    using Shape = BackwardShapeSm90<E, kHeadDim, kModified>;
    using Producer = BackwardProducerSm90<Shape>;
    using Tiles = typename Shape::Tiles;
    static constexpr int kThreads = 384, kMinBlocks = 1;
    static constexpr int kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN, kSharedBytes = Shape::kSharedBytes;

    // A thread of the producer's group takes no sums into registers, and leaves its own to the consumers. All together
    // have 65536 / kThreads (rounded down to a multiple of 8) each at the start, and may not have more afterwards.
    static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

    static const char* refuses(const Arguments& a) {
        if (!a.aligned) return "TMA needs rows that begin at multiples of 16 bytes";
        if (a.problem.softcap != 0.0f && a.problem.dbias != nullptr) return "no gradient of a bias behind a softcap";
        return nullptr;
    }

    static void describe(const Arguments& a, MapRequests& maps) {
        const Problem& p = a.problem;
        if (Producer::keys_are_boxes(p.key)) maps.key = key_geometry(p, p.key, p.head_dim, kBlockN);
        if (Producer::keys_are_boxes(p.value)) maps.value = key_geometry(p, p.value, p.head_dim_v, kBlockN);
        if (packed_rows_are_boxes(p, p.query, kBlockM)) {
            maps.query = packed_rows_geometry(p, p.query, p.head_dim, kBlockM);
        }
        if (packed_rows_are_boxes(p, p.dout, kBlockM)) {
            maps.dout = packed_rows_geometry(p, p.dout, p.head_dim_v, kBlockM);
        }
    }
    static int64_t dquery_sum_floats(const Problem& p) { return Tiles::tile_count(p) * kBlockM * kHeadDim; }
    static int64_t turn_count(const Problem& p) { return Tiles::tile_count(p) * 2; }  // one for each consumer

    static TF_DEVICE void run(const Arguments& a, char* memory) {
        const typename Shape::Shared shared{memory};
        typename Shape::Barriers& barriers = shared.barriers();
        if (ptx::thread() == 0) {
            ptx::mbarrier_init(&barriers.key_full, 1);
            ptx::mbarrier_init(&barriers.value_full, 1);
            barriers.query.init(2, 8);  // Q, and the numbers of its rows
            barriers.dout.init(1, 8);
            barriers.weights.init(8, 8);
            ptx::fence_mbarrier_init();
        }
        ptx::sync_threads();
        const int warp = ptx::warp();
        if (warp < 4) {
            ptx::decrease_registers<kProducerRegisters>();
            if (warp == 0) {
                Producer::produce_tiles(a, shared);
            } else if (warp == 1) {
                Producer::produce_numbers(a, shared);
            } else {
                Producer::add_pieces(a, shared, warp - 2);
            }
        } else {
            ptx::increase_registers<kConsumerRegisters>();
            BackwardConsumerSm90<Shape>::consume(a, shared, warp / 4 - 1);
        }
    }
};

}  // namespace cuda
}  // namespace tf
