// Into how many parts the keys of a tile are divided, and in which order the heads come. kernels/configs.py has the
// same two formulas for the Triton kernels.
#pragma once

#include "core/platform.h"

namespace tf {
namespace cuda {

// A split has more blocks than this: a shorter one costs more in the merge than it saves.
constexpr int64_t kMinBlocksOfSplit = 4, kMostSplits = 128;

// One, where the tiles fill four fifths of the machine by themselves. Otherwise the least number whose last wave of
// blocks is nearly as full as the best number's (85%, as in Flash-Decoding's heuristic, Dao et al. 2023).
//
//   jobs: tiles of rows over all heads and batch entries;  slots: blocks that run at the same time;
//   blocks: blocks of keys that a tile may see.
inline int64_t num_splits(int64_t jobs, int64_t slots, int64_t blocks) {
    const int64_t most = min_of(blocks / (kMinBlocksOfSplit + 1), min_of(kMostSplits, slots));
    if (jobs == 0 || most <= 1 || static_cast<double>(jobs) >= 0.8 * static_cast<double>(slots)) return 1;
    const auto share_of_waves = [&](int64_t splits) {
        const double waves = static_cast<double>(jobs * splits) / static_cast<double>(slots);
        return waves / static_cast<double>(ceil_div(jobs * splits, slots));
    };
    double best = 0.0;
    for (int64_t n = 1; n <= most; ++n) best = max_of(best, share_of_waves(n));
    int64_t splits = 1;
    while (share_of_waves(splits) < 0.85 * best) ++splits;
    return splits;
}

// How many heads go through their tiles together: as many as keep K and V in half of the level-2 cache.
inline int64_t section_of(int64_t l2_bytes, int64_t heads, int64_t bytes_a_head) {
    return max_of<int64_t>(1, min_of(heads, l2_bytes / 2 / max_of<int64_t>(1, bytes_a_head)));
}

}  // namespace cuda
}  // namespace tf
