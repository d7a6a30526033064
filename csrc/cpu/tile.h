// A tile of query rows and its scores: what forward and backward share.
//
// Lanes are query rows. Scores are kept transposed, S^T[key][row], so that K and V are read where they lie, row
// maxima and sums are vertical, and the mask is a comparison of lanes. Mask arithmetic happens only in edge blocks.
#pragma once

#include <cmath>

#include "core/params.h"
#include "core/philox.h"
#include "gemm.h"
#include "pack.h"

namespace tf {
namespace TF_ISA {
namespace {

constexpr int kRows = 64;  // query rows of a tile
constexpr int kTiles = 4;  // tiles that share each block of keys in a task of the forward pass
constexpr int kVectors = kRows / kLanes;
constexpr int kKeys = 96;                       // keys of a block
constexpr int kGroup = max_of(1, 16 / kLanes);  // vectors that edge blocks treat alike: 16 rows

// What the element type decides. A "paired" type multiplies bf16 pairs as they are; the others become floats first.
template <DType kType_>
struct Element {
    static constexpr DType kType = kType_;
    static constexpr int64_t kSize = kType == DType::f32 ? 4 : 2;
#if defined(__AVX512BF16__)
    static constexpr bool kPaired = kType == DType::bf16;
    using Product = std::conditional_t<kPaired, Bf16PairProduct, Float32Product>;
#else
    static constexpr bool kPaired = false;
    using Product = Float32Product;
#endif
    static constexpr Along kByKeys = Product::kByKeys;
    static constexpr int kExpDegree = kType == DType::bf16 ? 3 : 5;
    // 32-bit elements that `count` values take along a row.
    static constexpr int64_t elements(int64_t count) { return kPaired ? ceil_div(count, 2) : count; }
};

// Hands out a thread's scratch, 64-byte aligned, in the same order in which its size was counted.
class Arena {
  public:
    explicit Arena(char* base) : base_(base) {}
    float* floats(int64_t count) {
        char* p = base_ + used_;
        used_ += round_up(count * 4, 64);
        return reinterpret_cast<float*>(p);
    }
    int64_t used() const { return used_; }

  private:
    char* base_;
    int64_t used_ = 0;
};

// Where a block of the dense bias is converted and transposed.
struct BiasScratch {
    float* rows = nullptr;        // (kRows, kKeys)
    float* transposed = nullptr;  // (kKeys, kRows)

    BiasScratch(const Problem& p, Arena& arena) {
        if (p.bias.data == nullptr) return;
        rows = arena.floats(kRows * kKeys);
        transposed = arena.floats(kKeys * kRows);
    }
};

// Calls fn with the Element of a dtype.
template <class Fn>
inline void with_element(DType dtype, Fn&& fn) {
    switch (dtype) {
        case DType::bf16:
            return fn(Element<DType::bf16>{});
        case DType::f16:
            return fn(Element<DType::f16>{});
        default:
            return fn(Element<DType::f32>{});
    }
}

inline const char* row_of(const Operand& operand, int64_t size, int64_t batch, int64_t head, int64_t row) {
    return operand.data + (batch * operand.batch + head * operand.head + row * operand.row) * size;
}

inline bool keeps_key(const Problem& p, const Sequence& s, int64_t j) {
    return p.key_mask[s.index * p.key_mask_batch + j * p.key_mask_key] != 0;
}

// May a row see any key of [k0, k1) by a dense boolean mask? Reads bytes only where the row's summary leaves it open.
inline bool any_in_dense_mask(const Problem& p, const Sequence& s, int64_t head, int64_t row, int64_t k0, int64_t k1) {
    const RowSummary& dense = p.summary;
    if (dense.lo == nullptr) return true;
    const int64_t at = s.index * dense.batch + head * dense.head + row * dense.row;
    const int64_t lo = max_of<int64_t>(k0, dense.lo[at]), hi = min_of<int64_t>(k1, dense.hi[at]);
    if (lo >= hi) return false;
    if (dense.solid[at] || p.bias.key != 1) return true;
    const char* bytes = p.bias.data + s.index * p.bias.batch + head * p.bias.head + row * p.bias.row;
    return first_visible(bytes, lo, hi) < hi;
}

struct QueryTile {
    const Problem& p;
    const Sequence& s;
    const int64_t kv_head, first_row, rows;
    int vectors;
    alignas(64) int32_t lo[kRows], hi[kRows];  // each row's visible keys
    int64_t position[kRows], head[kRows];
    TileRange range[kVectors];
    bool reads_mask[kVectors];  // a dense mask has holes here: its bytes decide
    int64_t begin, end;
    const BiasScratch bias;

    QueryTile(const Problem& problem, const Sequence& sequence, int64_t kv_head_, int64_t first, int64_t count,
              const BiasScratch& bias_scratch)
        : p(problem), s(sequence), kv_head(kv_head_), first_row(first), rows(count), bias(bias_scratch) {
        vectors = static_cast<int>(ceil_div(rows, kLanes));
        int64_t row_position = first_row / p.group_size, member = first_row % p.group_size;
        for (int lane = 0; lane < kRows; ++lane) {
            lo[lane] = hi[lane] = 0;
            position[lane] = row_position;
            head[lane] = kv_head * p.group_size + member;
            if (lane >= rows) continue;  // the last row stands in for lanes past it
            if (lane + 1 < rows && ++member == p.group_size) {
                member = 0;
                ++row_position;
            }
            Interval visible = row_interval(s.mask, position[lane]);
            if (p.summary.lo != nullptr) visible = intersect_summary(lane, visible);
            lo[lane] = static_cast<int32_t>(visible.lo);
            hi[lane] = static_cast<int32_t>(visible.hi);
        }
        begin = INT64_MAX;
        end = 0;
        for (int v = 0; v < vectors; ++v) {
            find_range(v);
            if (range[v].begin < range[v].end) {
                begin = min_of(begin, range[v].begin);
                end = max_of(end, range[v].end);
            }
        }
        if (begin > end) begin = end = 0;
    }

    bool sees_nothing(int lane) const { return lo[lane] >= hi[lane]; }

    const char* bias_row(int lane) const {
        return p.bias.data + (s.index * p.bias.batch + head[lane] * p.bias.head + position[lane] * p.bias.row) *
                                 size_of(p.bias.dtype);
    }

    // Does vector v see all keys [k0, k1), by all of its rows?
    bool is_full(int v, int64_t k0, int64_t k1) const {
        return range[v].full_begin <= k0 && k1 <= range[v].full_end && !reads_mask[v];
    }
    bool is_full(int64_t k0, int64_t k1) const {
        for (int v = 0; v < vectors; ++v) {
            if (!is_full(v, k0, k1)) return false;
        }
        return true;
    }

    // The parts of an edge block [n0, n1): for each group of vectors the keys that any of its rows sees; neighbours
    // that see the same keys go together. `paired` keeps the ends at whole pairs of keys, counted from n0.
    // fn(first vector, how many, first key, last key + 1, does it need a mask).
    template <class Fn>
    void for_each_segment(int64_t n0, int64_t n1, bool paired, Fn&& fn) const {
        int first = 0, count = 0;
        Interval keys{0, 0};
        bool masked = false;
        for (int v = 0; v < vectors; v += kGroup) {
            const int group = min_of(kGroup, vectors - v);
            Interval seen = seen_by_group(v, group, n0, n1);
            if (paired && seen.lo < seen.hi) {
                seen.lo -= (seen.lo - n0) & 1;
                seen.hi = min_of(seen.hi + ((seen.hi - n0) & 1), n1);
            }
            if (count > 0 && (seen.lo != keys.lo || seen.hi != keys.hi)) {
                if (keys.lo < keys.hi) fn(first, count, keys.lo, keys.hi, masked);
                count = 0;
            }
            if (count == 0) {
                first = v;
                keys = seen;
                masked = false;
            }
            count += group;
            for (int i = v; i < v + group; ++i) masked |= !is_full(i, seen.lo, seen.hi);
        }
        if (count > 0 && keys.lo < keys.hi) fn(first, count, keys.lo, keys.hi, masked);
    }

    // The keys of [n0, n1) that some row of the vectors [v, v + count) sees.
    Interval seen_by_group(int v, int count, int64_t n0, int64_t n1) const {
        Interval seen{n1, n0};
        for (int i = v; i < v + count; ++i) {
            const int64_t lo_key = max_of(n0, range[i].begin), hi_key = min_of(n1, range[i].end);
            if (lo_key >= hi_key || (reads_mask[i] && !any_by_mask(i, lo_key, hi_key))) continue;
            seen.lo = min_of(seen.lo, lo_key);
            seen.hi = max_of(seen.hi, hi_key);
        }
        return seen.lo < seen.hi ? seen : Interval{n0, n0};
    }

    // Is any key of [k0, k1) visible to vector v, by the bytes of the mask? Only asked where there are holes.
    bool any_by_mask(int v, int64_t k0, int64_t k1) const {
        if (p.key_mask != nullptr) {
            bool any_key = false;
            for (int64_t j = k0; j < k1 && !any_key; ++j) any_key = keeps_key(p, s, j);
            if (!any_key) return false;
        }
        for (int lane = v * kLanes; lane < min_of<int64_t>((v + 1) * kLanes, rows); ++lane) {
            if (any_in_dense_mask(p, s, head[lane], position[lane], k0, k1)) return true;
        }
        return false;
    }

    // Raw products -> scores with everything that changes them: scale, softcap, bias, ALiBi.
    // `scores` is S^T of keys [k0, k1), rows of kRows floats. `slope`, if given, receives d(capped) / d(scaled).
    void modify(float* scores, float* slope, int v0, int count, int64_t k0, int64_t k1) {
        const bool dense = p.has_float_bias();
        if (dense) load_bias(v0, count, k0, k1);
        for (int v = v0; v < v0 + count; ++v) {
            alignas(64) float alibi[kLanes], place[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                const int lane = v * kLanes + i;
                place[i] = static_cast<float>(position[lane] + s.mask.offset - k0);
                alibi[i] = p.alibi_slopes ? p.alibi_slopes[s.index * p.alibi_batch + head[lane] * p.alibi_head] : 0;
            }
            const F alibi_v = load(alibi), place_v = load(place);
            for (int64_t j = 0; j < k1 - k0; ++j) {
                float* at = scores + j * kRows + v * kLanes;
                F x = load(at) * p.softmax_scale;
                if (p.softcap != 0.0f) {
                    const F t = tanh(x / p.softcap);
                    if (slope != nullptr) store(slope + j * kRows + v * kLanes, 1.0f - t * t);
                    x = t * p.softcap;
                }
                if (dense) {
                    const F b = load(bias.transposed + j * kRows + v * kLanes);
                    x = select(b == -kInfinity, b, x + b);
                }
                if (p.alibi_slopes != nullptr) {
                    const F distance = place_v - static_cast<float>(j);
                    x -= alibi_v * maximum(distance, -distance);
                }
                store(at, x);
            }
        }
    }

    // Scores that a row does not see become -inf, whatever they were.
    void apply_mask(float* scores, int v0, int count, int64_t k0, int64_t k1) {
        const F minus_infinity = set1(-kInfinity);
        bool dense = false;
        for (int v = v0; v < v0 + count; ++v) dense |= reads_mask[v] && p.summary.lo != nullptr;
        if (dense) load_bias(v0, count, k0, k1);
        for (int v = v0; v < v0 + count; ++v) {
            const I first = load_int(lo + v * kLanes), last = load_int(hi + v * kLanes);
            for (int64_t j = k0; j < k1; ++j) {
                float* at = scores + (j - k0) * kRows + v * kLanes;
                const int32_t key = static_cast<int32_t>(j);
                F x = select((first <= key) & (last > key), load(at), minus_infinity);
                if (dense) x = select(load(bias.transposed + (j - k0) * kRows + v * kLanes) < 0.0f, minus_infinity, x);
                if (s.holes && !keeps_key(p, s, j)) x = minus_infinity;
                store(at, x);
            }
        }
    }

    // Dropout's keep factors for key j and vector v: 1 / (1 - p) or 0. Four keys share one Philox call a lane.
    F dropout_factor(int v, int64_t j, float* cache, int64_t& cached) const {
        const float keep = static_cast<float>(1.0 / (1.0 - p.dropout_p));
        const uint32_t threshold = static_cast<uint32_t>(min_of(p.dropout_p * 4294967296.0, 4294967295.0));
        if (cached != j / 4) {
            cached = j / 4;
            for (int i = 0; i < kLanes; ++i) {
                const int lane = v * kLanes + i;
                const Philox4 random =
                    philox(p.seed, static_cast<uint32_t>(j / 4), static_cast<uint32_t>(position[lane]),
                           static_cast<uint32_t>(head[lane]), static_cast<uint32_t>(s.index));
                for (int w = 0; w < 4; ++w) cache[w * kLanes + i] = random.word[w] >= threshold ? keep : 0.0f;
            }
        }
        return load(cache + (j % 4) * kLanes);
    }

  private:
    Interval intersect_summary(int lane, Interval visible) const {
        const RowSummary& dense = p.summary;
        const int64_t at = s.index * dense.batch + head[lane] * dense.head + position[lane] * dense.row;
        visible.lo = max_of<int64_t>(visible.lo, dense.lo[at]);
        visible.hi = min_of<int64_t>(visible.hi, dense.hi[at]);
        return visible.lo < visible.hi ? visible : Interval{0, 0};
    }

    void find_range(int v) {
        const int first = v * kLanes, last = static_cast<int>(min_of<int64_t>(first + kLanes, rows)) - 1;
        reads_mask[v] = s.holes;
        if (p.summary.lo == nullptr) {
            range[v] = tile_range(s.mask, position[first], position[last]);
            return;
        }
        TileRange r{INT64_MAX, 0, INT64_MAX, 0};
        bool some_empty = false;
        for (int lane = first; lane <= last; ++lane) {
            const RowSummary& dense = p.summary;
            reads_mask[v] |= !dense.solid[s.index * dense.batch + head[lane] * dense.head + position[lane] * dense.row];
            if (sees_nothing(lane)) {
                some_empty = true;
                continue;
            }
            r.begin = min_of<int64_t>(r.begin, lo[lane]);
            r.end = max_of<int64_t>(r.end, hi[lane]);
            r.full_begin = max_of<int64_t>(r.full_begin, lo[lane]);
            r.full_end = min_of<int64_t>(r.full_end, hi[lane]);
        }
        if (r.begin > r.end) r = {0, 0, 0, 0};
        if (some_empty || r.full_begin > r.full_end) r.full_begin = r.full_end = r.begin;
        range[v] = r;
    }

    // The dense bias of vectors [v0, v0 + count) and keys [k0, k1), transposed into the scratch.
    void load_bias(int v0, int count, int64_t k0, int64_t k1) {
        const int64_t size = size_of(p.bias.dtype), keys = k1 - k0, padded = round_up(keys, 4);
        for (int lane = v0 * kLanes; lane < (v0 + count) * kLanes; ++lane) {
            const char* from = bias_row(lane) + k0 * p.bias.key * size;
            float* to = bias.rows + lane * kKeys;
            if (p.bias.key == 1) {
                load_row(p.bias.dtype, from, keys, to, padded);
            } else {
                for (int64_t j = 0; j < keys; ++j) to[j] = scalar_at(p.bias.dtype, from + j * p.bias.key * size);
                for (int64_t j = keys; j < padded; ++j) to[j] = 0.0f;
            }
        }
        transpose(bias.rows + v0 * kLanes * kKeys, kKeys, bias.transposed + v0 * kLanes, kRows, count * kLanes, padded);
    }
};

// K or V as a product reads it along its depth: in place where the element type and an even length allow it.
template <class E>
inline void stage_depth(int64_t keys, int64_t columns, const char*& rows, int64_t& stride, float* staged) {
    if (E::kType == DType::f32 || (E::kPaired && columns % 2 == 0)) return;
    const int64_t width = E::elements(columns);
    for (int64_t j = 0; j < keys; ++j) {
        float* to = staged + j * width;
        if constexpr (E::kPaired) {
            to[width - 1] = 0.0f;
            std::memcpy(to, rows + j * stride, static_cast<size_t>(columns) * 2);
        } else {
            load_row<E::kType>(rows + j * stride, columns, to, width);
        }
    }
    rows = reinterpret_cast<const char*>(staged);
    stride = width * 4;
}

// NaN and Inf among staged elements become 0.
template <class E>
inline void zero_non_finite(float* staged, int64_t count) {
    char* bytes = reinterpret_cast<char*>(staged);
    constexpr int64_t kSize = E::kPaired ? 2 : 4;
    for (int64_t i = 0; i < count * 4 / kSize; ++i) {
        if (!row_is_finite(E::kPaired ? DType::bf16 : DType::f32, bytes + i * kSize, 1)) {
            std::memset(bytes + i * kSize, 0, kSize);
        }
    }
}

// K or V of a block as a product reads it where its depth is keys (see kByKeys).
struct ByKeys {
    const char* data;
    int64_t stride;  // bytes: from one row of A (a column of K or V) or one element of depth to the next
    int64_t rows;    // of A: the columns, turned with zeros up to whole tiles

    template <class E>
    const char* from(int64_t key) const {
        return data + E::elements(key) * (E::kByKeys == Along::rows ? stride : 4);
    }
};

// Floats that `stage_by_keys` may need, and rows of C that its product may have.
inline int64_t by_keys_floats(int64_t columns) { return kKeys * round_up(columns, 32); }
inline int64_t by_keys_rows(int64_t columns) { return round_up(columns, 16); }

// In place (float32), as pairs of keys (paired), turned, else as floats. In a dirty block NaN and Inf are replaced by
// 0; whoever sees them gets them afterwards, one by one.
template <class E>
inline ByKeys stage_by_keys(int64_t keys, int64_t columns, bool dirty, const char* rows, int64_t stride,
                            float* staged) {
    if (E::kType == DType::f32 && !dirty) return {rows, stride, columns};
    int64_t width = round_up(columns, 4), count = E::elements(keys), rows_of_a = columns;  // width, count: as staged
    if constexpr (E::kByKeys == Along::depth) {
        width = round_up(kKeys / 2, 16), count = round_up(columns, 32), rows_of_a = by_keys_rows(columns);
        turn_bf16(rows, stride, keys, columns, staged, width);
    } else if constexpr (E::kPaired) {
        for (int64_t j = 0; j < keys; j += 2) {
            const char* second = j + 1 < keys ? rows + (j + 1) * stride : nullptr;
            load_pair_row(rows + j * stride, second, columns, staged + j / 2 * width, width);
        }
    } else {
        for (int64_t j = 0; j < keys; ++j) load_row<E::kType>(rows + j * stride, columns, staged + j * width, width);
    }
    if (dirty) zero_non_finite<E>(staged, count * width);
    return {reinterpret_cast<const char*>(staged), width * 4, rows_of_a};
}

// A head's sink: a score in natural units, since a problem with sinks has all of them in natural units.
TF_INLINE float sink_of(const Problem& p, int64_t head) {
    if (p.sinks == nullptr) return -kInfinity;
    return scalar_at(p.sinks_dtype, p.sinks + head * p.sinks_stride * size_of(p.sinks_dtype));
}

// What a row leaves for its caller and for backward. `top` is its maximum in score units, -inf for a row that saw
// nothing.
inline void store_statistics(const Problem& p, const Sequence& s, int64_t head, int64_t row, float top, float sum) {
    if (p.lse == nullptr) return;
    const int64_t at = p.lse_index(s.index, head, s.first_query, row), plane = p.num_heads * p.total_q;
    const bool empty = top == -kInfinity;
    const double natural = top * p.score_natural() + std::log(static_cast<double>(sum));
    p.lse[at] = empty ? -kInfinity : static_cast<float>(natural);
    if (p.stats == nullptr) return;
    p.stats[at] = empty ? 0.0f : top;
    p.stats[plane + at] = empty ? 0.0f : 1.0f / sum;
}

// Rows of an operand, one a lane, transposed: target[i][lane] over 32-bit elements. Lanes past the tile's rows and
// rows that see nothing are zero, so that what they hold takes no part in any sum.
template <class E>
inline void pack_rows_transposed(const QueryTile& tile, const Operand& operand, int64_t columns, float* staged,
                                 float* target) {
    const int64_t width = round_up(E::elements(columns), 4);
    const int lanes = tile.vectors * kLanes;
    const auto row = [&](int lane) TF_INLINE_LAMBDA {
        return row_of(operand, E::kSize, tile.p.packed ? 0 : tile.s.index, tile.head[lane],
                      tile.s.first_query + tile.position[lane]);
    };
    for (int lane = 0; lane < tile.rows; ++lane) prefetch_row(row(lane), columns * E::kSize);
    for (int lane = 0; lane < lanes; ++lane) {
        float* to = staged + lane * width;
        if (lane >= tile.rows || tile.sees_nothing(lane)) {
            std::memset(to, 0, static_cast<size_t>(width) * 4);
        } else if constexpr (E::kPaired) {
            copy_row(row(lane), columns, to, width);
        } else {
            load_row<E::kType>(row(lane), columns, to, width);
        }
    }
    transpose(staged, width, target, kRows, lanes, width);
}

// Rows of an operand, one a lane, in order (paired: two rows a pair row), padded with zeros to `width`. The same rows
// are zero as above.
template <class E>
inline void pack_rows(const QueryTile& tile, const Operand& operand, int64_t columns, float* target, int64_t width) {
    const auto row = [&](int lane) -> const char* {
        if (lane >= tile.rows || tile.sees_nothing(lane)) return nullptr;
        return row_of(operand, E::kSize, tile.p.packed ? 0 : tile.s.index, tile.head[lane],
                      tile.s.first_query + tile.position[lane]);
    };
    constexpr int kStep = E::kPaired ? 2 : 1;
    for (int lane = 0; lane < tile.vectors * kLanes; lane += kStep) {
        float* to = target + lane / kStep * width;
        if constexpr (E::kPaired) {
            load_pair_row(row(lane), row(lane + 1), columns, to, width);
        } else if (const char* from = row(lane)) {
            load_row<E::kType>(from, columns, to, width);
        } else {
            std::memset(to, 0, static_cast<size_t>(width) * 4);
        }
    }
}

}  // namespace
}  // namespace TF_ISA
}  // namespace tf
