// The backward pass for Hopper: what its warps have in common.
#pragma once

#include <type_traits>

#include "cuda/backward_sums_sm90.cuh"
#include "cuda/pipeline.cuh"

namespace tf {
namespace cuda {

template <class E, int kHeadDim_, bool kModified_>
struct BackwardShapeSm90 {
    using Element = E;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr bool kModified = kModified_;
    using Tiles = BackwardTilesSm90<kHeadDim>;
    static constexpr int kBlockM = Tiles::kBlockM, kBlockN = Tiles::kBlockN;

    static constexpr bool kShareKeys = kHeadDim == 256;
    static constexpr int kScoreRows = kShareKeys ? kBlockM / 2 : kBlockM;          // of a consumer's P and dS
    static constexpr int kSumColumns = kShareKeys ? kHeadDim / 2 : kHeadDim;       // of a consumer's dK and dV
    static constexpr int kPieces = Tiles::kPieces / 2, kDqColumns = 64 * kPieces;  // of a consumer's dQ
    static constexpr int kDoutStages = kShareKeys ? 1 : 2;

    using Rows = std::conditional_t<kModified, ModifiedRows<kBlockM>, PlainRows<kBlockM>>;
    using Scores = float[kScoreRows / 2];
    using Sums = float[kSumColumns / 2];
    using Dquery = float[kDqColumns / 2];
    using Fragments = uint32_t[kScoreRows / 16][4];

    // ---------------------------------------------------------------------------------------- shared memory

    static constexpr int kKeyBytes = kBlockN * kHeadDim * 2, kTileBytes = kBlockM * kHeadDim * 2;
    static constexpr int kWeightBytes = kBlockN * kBlockM * 2, kPieceBytes = Tiles::kPieceFloats * 4;
    static constexpr int kTilesOffset = 2 * kKeyBytes, kWeightsOffset = kTilesOffset + (2 + kDoutStages) * kTileBytes;
    static constexpr int kPiecesOffset = kWeightsOffset + (kShareKeys ? 2 : 1) * kWeightBytes;
    static constexpr int kRowsOffset = kPiecesOffset + 2 * kPieceBytes;

    struct Barriers {
        uint64_t key_full, value_full;
        RingBarriers<2> query;  // with the numbers of the rows
        RingBarriers<kDoutStages> dout;
        RingBarriers<1> weights;  // filled and used by the consumers
    };
    struct Shared {
        char* base;
        TF_DEVICE char* key() const { return base; }
        TF_DEVICE char* value() const { return base + kKeyBytes; }
        TF_DEVICE char* query(int stage) const { return base + kTilesOffset + stage * kTileBytes; }
        TF_DEVICE char* dout(int stage) const { return query(2 + stage); }
        TF_DEVICE char* ds() const { return base + kWeightsOffset; }
        TF_DEVICE char* p() const { return ds() + kWeightBytes; }  // where consumers share the keys
        TF_DEVICE char* piece(int consumer) const { return base + kPiecesOffset + consumer * kPieceBytes; }
        TF_DEVICE Rows& rows(int stage) const { return reinterpret_cast<Rows*>(base + kRowsOffset)[stage]; }
        TF_DEVICE Barriers& barriers() const {
            return *reinterpret_cast<Barriers*>(base + kRowsOffset + 2 * sizeof(Rows));
        }
    };
    static constexpr int kSharedBytes = kRowsOffset + 2 * sizeof(Rows) + sizeof(Barriers);
    static_assert(kSharedBytes <= 232448, "what a block of sm_90 can have");

    // + consumer: its piece is written, or may be written.
    enum NamedBarrier { kPieceFull = 1, kPieceEmpty = 3, kConsumers = 5 };

    // ---------------------------------------------------------------------------------------- jobs

    struct Work {
        Job job;
        DeviceSequence s;
        int first_key, stored;  // keys from `stored` on have no gradients
        BlockRange tiles;       // of packed rows that see any of the keys; none if first_key is beyond `stored`
    };
    static TF_DEVICE Work work_of(const Arguments& a, int number) {
        Work w;
        w.job = job_of(a, number, false);
        w.s = sequence_of(a, w.job.batch);
        w.first_key = w.job.tile * kBlockN;
        w.stored = a.problem.packed ? w.s.len_k : static_cast<int>(a.problem.seqlen_k);
        const int64_t first = max_of<int64_t>(w.first_key, w.s.mask.start);
        const int64_t end = min_of<int64_t>(w.first_key + kBlockN, w.s.mask.end);
        TileRange range = rows_of(a, w.s, static_cast<int>(first), static_cast<int>(end) - 1);
        // Only where every key of the block is in the sequence can any row see them all.
        const bool whole = end - first == kBlockN;
        w.tiles = blocks_of<kBlockM>(range, !whole);
        return w;
    }
    static TF_DEVICE PackedRows rows_of_tile(const Arguments& a, const Work& w, int tile) {
        return packed_rows(a, w.s, {tile, w.job.kv_head, w.job.batch}, kBlockM);
    }
};

}  // namespace cuda
}  // namespace tf
