// What the parts of the Hopper forward kernel share: sizes, what lies in shared memory, and what a job is.
#pragma once

#include "cuda/pipeline.cuh"
#include "cuda/softmax.cuh"

namespace tf {
namespace cuda {

template <class E_, int kHeadDim_, bool kModified_, int kConsumers_, int kBlockN_, int kStages_>
struct ForwardShapeSm90 {
    using E = E_;
    static constexpr int kHeadDim = kHeadDim_, kConsumers = kConsumers_, kStages = kStages_;
    static constexpr bool kModified = kModified_;
    static constexpr int kThreads = 128 * (kConsumers + 1), kMinBlocks = 1;
    static constexpr int kBlockM = 64 * kConsumers, kBlockN = kBlockN_;
    static constexpr int kQueryBytes = 64 * kHeadDim * 2, kKeyBytes = kBlockN * kHeadDim * 2;

    // A thread of the producer's group takes no sums into registers, and leaves its own to the consumers. All together
    // have 65536 / kThreads (rounded down to a multiple of 8) each at the start, and may not have more afterwards.
    static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : kModified ? 56 : 40;
    static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : kModified ? 224 : 232;

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
    static constexpr int kCleanerThreads = 96;  // the producer's group, but for the warp that copies
};

}  // namespace cuda
}  // namespace tf
