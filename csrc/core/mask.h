// The one mask of the library: a query row sees one contiguous interval of keys.
// transformer_fast/masks.py says the same in Python; the tests hold the two texts equal.
#pragma once

#include <cstring>

#include "platform.h"

namespace tf {

// The mask of one sequence. Key j is visible to row i, at position p = i + offset, when
// start <= j < end and p - left <= j <= p + right.
struct SequenceMask {
    int64_t start, end, offset, left, right;
};

struct Interval {
    int64_t lo, hi;  // keys [lo, hi); lo == hi when there are none
};

// Keys in [begin, end) are seen by some row of a tile, keys in [full_begin, full_end) by all of its rows.
struct TileRange {
    int64_t begin, full_begin, full_end, end;
};

TF_INLINE Interval row_interval(const SequenceMask& mask, int64_t row) {
    const int64_t position = row + mask.offset;
    const int64_t lo = max_of(mask.start, position - mask.left);
    const int64_t hi = min_of(mask.end, position + mask.right + 1);
    return lo < hi ? Interval{lo, hi} : Interval{mask.start, mask.start};
}

// Both ends of a row's interval move up with the row, so the union of a tile's intervals starts with the first
// row's lower end and stops with the last row's upper end, and their intersection is the other two.
TF_INLINE TileRange tile_range(const SequenceMask& mask, int64_t first_row, int64_t last_row) {
    const int64_t first = first_row + mask.offset, last = last_row + mask.offset;
    const int64_t begin = max_of(mask.start, first - mask.left);
    const int64_t end = min_of(mask.end, last + mask.right + 1);
    const int64_t full_begin = max_of(mask.start, last - mask.left);
    const int64_t full_end = min_of(mask.end, first + mask.right + 1);
    if (begin >= end) return {mask.start, mask.start, mask.start, mask.start};
    if (full_begin >= full_end) return {begin, begin, begin, end};
    return {begin, full_begin, full_end, end};
}

// The first key of [begin, end) that a dense boolean mask shows, `end` if there is none. Any byte but 0 is True.
TF_INLINE int64_t first_visible(const char* mask, int64_t begin, int64_t end) {
    for (; begin + 8 <= end; begin += 8) {
        uint64_t eight;
        std::memcpy(&eight, mask + begin, 8);
        if (eight != 0) break;
    }
    while (begin < end && mask[begin] == 0) ++begin;
    return begin;
}

}  // namespace tf
