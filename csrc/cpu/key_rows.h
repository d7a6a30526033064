// Where the rows of K and V lie: one after the other, or in the pages of a cache. And asking for them ahead of use.
#pragma once

#include "tile.h"

namespace tf {
namespace TF_ISA {
namespace {

// Keys that lie one after the other: `count` from key `first` on, at row `row` of batch entry (or page) `batch`.
struct Run {
    int64_t first, count, batch, row;

    const char* of(const Operand& operand, int64_t size, int64_t kv_head) const {
        return row_of(operand, size, batch, kv_head, row);
    }
};

// Calls fn(run) for the runs that keys [begin, end) of a sequence fall into: one, or in a paged cache one a page.
template <class Fn>
TF_INLINE void for_each_run(const Problem& p, const Sequence& s, int64_t begin, int64_t end, Fn&& fn) {
    if (p.page_size == 0) return fn(Run{begin, end - begin, p.packed ? 0 : s.index, s.first_key + begin});
    int64_t index = begin / p.page_size, row = begin % p.page_size;
    while (begin < end) {
        const int64_t count = min_of(end - begin, p.page_size - row);
        fn(Run{begin, count, p.page_of(s.index, index), row});
        begin += count;
        row = 0;
        ++index;
    }
}

// The row of key j of a sequence in K or V.
inline const char* key_row(const Problem& p, const Sequence& s, const Operand& operand, int64_t kv_head, int64_t j) {
    const char* row = nullptr;
    for_each_run(p, s, j, j + 1, [&](const Run& run) { row = run.of(operand, size_of(p.dtype), kv_head); });
    return row;
}

// Asks for the cache lines of some rows a few at a time, while other rows are worked on. Asked for all at once they
// fill the queue of outstanding misses, and what is needed now waits behind them. They go to the level-2 cache: on
// their way to level 1 each would hold one of its few miss registers until memory answers (measured with two threads
// on a Zen 4: 16-18 GB/s in bursts, 21-25 spread over the work, 25-26 spread and to level 2; reading alone 45).
class Ahead {
  public:
    Ahead(const char* const* rows, int64_t count, int64_t row_bytes, int64_t steps)
        : row_(rows), end_(rows + count), at_(0), row_bytes_(row_bytes) {
        lines_ = steps > 0 ? ceil_div(count * ceil_div(row_bytes, kLine), steps) : 0;
    }
    TF_INLINE void step() {
        for (int64_t i = 0; i < lines_ && row_ < end_; ++i) {
            __builtin_prefetch(*row_ + at_, 0, 2);
            at_ += kLine;
            if (at_ >= row_bytes_) {
                at_ = 0;
                ++row_;
            }
        }
    }

  private:
    static constexpr int64_t kLine = 64;  // bytes of a cache line

    const char *const *row_, *const *end_;
    int64_t at_, row_bytes_, lines_;
};

}  // namespace
}  // namespace TF_ISA
}  // namespace tf
