// Values of keys that no row of a tile sees, in a block of V that TMA has brought: they must be zeros, since 0 * NaN is
// NaN, and memory there may hold anything. (K needs no such care: what it does to a score is replaced by the mask.)
#pragma once

#include "cuda/softmax.cuh"

namespace tf {
namespace cuda {

// Rows of V by `thread` of kThreads, whole warps, in a tile of kBlockN rows and kColumns columns.
template <class E, int kBlockN, int kColumns, int kThreads>
struct HiddenValues {
    static constexpr int kChunks = kColumns / 8;

    static TF_DEVICE void zero_rows(char* tile, int thread, int from, int to) {
        for (int i = thread; i < (to - from) * kChunks; i += kThreads) {
            const int row = from + i / kChunks, chunk = i % kChunks;
            *reinterpret_cast<Vector16*>(tile + chunk_offset<kBlockN>(row, chunk)) = Vector16{};
        }
    }

    // A warp looks at one row. Infinity and NaN, and nothing else, have all bits of the exponent set.
    static TF_DEVICE bool is_finite(const char* tile, int row) {
        constexpr uint32_t kExponent = E::kType == DType::bf16 ? 0x7f80 : 0x7c00;
        bool finite = true;
        for (int chunk = ptx::lane(); chunk < kChunks; chunk += 32) {
            const Vector16 v = *reinterpret_cast<const Vector16*>(tile + chunk_offset<kBlockN>(row, chunk));
            for (int i = 0; i < 4; ++i) {
                finite = finite && (v.word[i] & kExponent) != kExponent && (v.word[i] >> 16 & kExponent) != kExponent;
            }
        }
        return ptx::all(finite);
    }

    // Whether any row of the tile gives the key a probability; by a warp.
    static TF_DEVICE bool is_seen(const Arguments& a, const DeviceSequence& s, const PackedRows& rows, int key) {
        bool seen = false;
        for (int row = ptx::lane(); row < rows.count; row += 32) {
            const int position = rows.position(row);
            const Interval keys = row_interval(s.mask, position);
            if (key < keys.lo || key >= keys.hi) continue;
            const Score score = modified_score(a, s, rows.head(row), position, key, 0.0f);
            seen = seen || score.value != -kInfinity;
        }
        return ptx::any(seen);
    }

    // What lies outside of the keys [begin, end) of a block that begins with key n.
    static TF_DEVICE void clean_outside(char* tile, int thread, int n, int begin, int end) {
        zero_rows(tile, thread, 0, max_of(0, begin - n));
        zero_rows(tile, thread, min_of(kBlockN, end - n), kBlockN);
    }
    // What a bias or the holes of a key padding mask hide inside. To ask every row of the tile is expensive, so that is
    // left to values that would do harm.
    static TF_DEVICE void clean_inside(const Arguments& a, const DeviceSequence& s, const PackedRows& rows, char* tile,
                                       int thread, int n, int begin, int end) {
        const int stop = min_of(kBlockN, end - n);
        for (int row = max_of(0, begin - n) + thread / 32; row < stop; row += kThreads / 32) {
            if (!is_finite(tile, row) && !is_seen(a, s, rows, n + row)) {
                for (int chunk = ptx::lane(); chunk < kChunks; chunk += 32) {
                    *reinterpret_cast<Vector16*>(tile + chunk_offset<kBlockN>(row, chunk)) = Vector16{};
                }
            }
        }
    }
};

}  // namespace cuda
}  // namespace tf
