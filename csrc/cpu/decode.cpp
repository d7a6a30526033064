// Split-KV decode: a few query rows against one chunk of keys (Flash-Decoding, Dao et al. 2023). Lanes run along
// head_dim, the rows of a KV head's whole group share one pass over K and V, and memory is asked for ahead of use.
#include <utility>

#include "kernels.h"
#include "key_rows.h"
#include "reduce.h"

namespace tf {
namespace TF_ISA {
namespace {

constexpr int kBlockBytes = 16384;  // of K or V in a block: half of a level-1 cache
constexpr int64_t kMaxBlock = 64, kMinBlock = 16;
constexpr int kDotRows = kLanes == 16 ? 4 : 2;  // query rows by four keys: as many sums as the registers hold

// Calls `fn` with a number of rows as a constant, kMost or the fewer that are left, and returns it: what is read of a
// block is read once for all of them.
template <int kMost, class Fn>
TF_INLINE int64_t some_rows(int64_t left, Fn&& fn) {
    if constexpr (kMost > 1) {
        if (left < kMost) return some_rows<kMost - 1>(left, fn);
    }
    fn(std::integral_constant<int, kMost>{});
    return kMost;
}

inline int64_t block_keys(const Problem& p, int64_t element_size) {
    const int64_t row_bytes = max_of(p.head_dim, p.head_dim_v) * element_size;
    return max_of(kMinBlock, min_of(kMaxBlock, kBlockBytes / row_bytes / 16 * 16));
}

// Elements that one vector load takes from a row: floats, or (paired) twice as many bf16.
template <class E>
constexpr int64_t kStep = E::kPaired ? 2 * kLanes : kLanes;

template <class E>
struct DecodeScratch {
    int64_t rows, keys, width, width_v;  // width: elements of a row, whole vectors
    float *queries, *scores, *weights;
    char *staged_key, *staged_value;  // rows of the caller's type, where theirs are no whole vectors

    DecodeScratch(const Problem& p, int64_t row_count, Arena& arena)
        : rows(row_count),
          keys(block_keys(p, E::kSize)),
          width(round_up(p.head_dim, kStep<E>)),
          width_v(round_up(p.head_dim_v, kStep<E>)) {
        queries = arena.floats(rows * E::elements(width));
        scores = arena.floats(rows * keys);
        weights = arena.floats(rows * keys);  // paired: the probabilities as bf16
        staged_key = reinterpret_cast<char*>(arena.floats(ceil_div(keys * width * E::kSize, 4)));
        staged_value = reinterpret_cast<char*>(arena.floats(ceil_div(keys * width_v * E::kSize, 4)));
    }
};

// The rows of a block of keys, by address: they may lie in many pages. Where they lie in one piece that costs nothing
// (0.96 to 1.01 of the time with an address and a stride, keys in the level-2 cache, on a Zen 4).
struct KeyBlock {
    const char *key[kMaxBlock], *value[kMaxBlock];
};

// Floats of a row's partial result: maximum, sum, values.
template <class E>
int64_t state_size(const Problem& p) {
    return 2 + round_up(p.head_dim_v, kStep<E>);
}

template <class E>
class Decode : DecodeScratch<E> {
  public:
    Decode(const Problem& problem, const Sequence& sequence, const KeyChunk& key_chunk, Arena arena)
        : DecodeScratch<E>(problem, sequence.len_q * problem.group_size, arena),
          p(problem),
          s(sequence),
          chunk(key_chunk) {}

    void run() {
        for (int64_t r = 0; r < rows; ++r) {
            load_query(r);
            float* state = state_of(r);
            state[0] = -kInfinity;
            std::memset(state + 1, 0, static_cast<size_t>(state_size<E>(p) - 1) * 4);
        }
        find_rows(chunk.begin, min_of(chunk.begin + keys, chunk.end), block);
        for (int64_t n = chunk.begin; n < chunk.end; n += keys) {
            const int64_t n1 = min_of(n + keys, chunk.end), n2 = min_of(n1 + keys, chunk.end);
            find_rows(n1, n2, next);
            attend(n, n1, n2 - n1);
            std::swap(block, next);
        }
        if constexpr (E::kPaired) {
            for (int64_t r = 0; r < rows; ++r) in_order(state_of(r) + 2);
        }
    }

  private:
    using Scratch = DecodeScratch<E>;
    using Scratch::queries, Scratch::scores, Scratch::staged_key, Scratch::staged_value, Scratch::weights;
    using Scratch::rows, Scratch::keys, Scratch::width, Scratch::width_v;

    const Problem& p;
    const Sequence& s;
    const KeyChunk& chunk;
    KeyBlock blocks[2];
    KeyBlock *block = &blocks[0], *next = &blocks[1];

    int64_t batch() const { return p.packed ? 0 : s.index; }
    int64_t head_of(int64_t r) const { return chunk.kv_head * p.group_size + r % p.group_size; }
    float* state_of(int64_t r) const { return chunk.partial + r * state_size<E>(p); }  // maximum, sum, values
    const char* value_row(int64_t j) const { return key_row(p, s, p.value, chunk.kv_head, j); }

    void find_rows(int64_t n0, int64_t n1, KeyBlock* found) const {
        for_each_run(p, s, n0, n1, [&](const Run& run) TF_INLINE_LAMBDA {
            const char* key = run.of(p.key, E::kSize, chunk.kv_head);
            const char* value = run.of(p.value, E::kSize, chunk.kv_head);
            for (int64_t j = 0; j < run.count; ++j) {
                found->key[run.first - n0 + j] = key + j * p.key.row * E::kSize;
                found->value[run.first - n0 + j] = value + j * p.value.row * E::kSize;
            }
        });
    }

    void load_query(int64_t r) {
        const char* from = row_of(p.query, E::kSize, batch(), head_of(r), s.first_query + r / p.group_size);
        float* to = queries + r * E::elements(width);
        if constexpr (E::kPaired) {
            std::memset(to, 0, static_cast<size_t>(width) * 2);
            std::memcpy(to, from, static_cast<size_t>(p.head_dim) * 2);
        } else {
            load_row<E::kType>(from, p.head_dim, to, width);
        }
    }

    void attend(int64_t n0, int64_t n1, int64_t next_count) {
        const TileRange seen = tile_range(s.mask, 0, s.len_q - 1);
        const bool edge = n0 < seen.full_begin || n1 > seen.full_end || s.holes || p.summary.lo != nullptr;
        if (edge && !sees_any(n0, n1)) return;
        const int64_t count = n1 - n0;
        // V of this block comes while K is at work, and K of the next one while V is.
        Ahead values_ahead(block->value, count, p.head_dim_v * E::kSize, ceil_div(count, 4) * (width / kStep<E>));
        find_scores(count, values_ahead);
        bool dirty = false;
        for (int64_t j = n0; (edge || p.has_float_bias()) && j < n1 && !dirty; ++j)
            dirty = !row_is_finite(E::kType, block->value[j - n0], p.head_dim_v);
        for (int64_t r = 0; r < rows; ++r) {
            if (p.modifies_scores()) modify(r, n0, n1);
            if (edge) apply_mask(r, n0, n1);
            softmax(r, n0, n1);
        }
        Ahead keys_ahead(next->key, next_count, p.head_dim * E::kSize,
                         E::elements(count) * ceil_div(width_v, kMaxVectors * kLanes));
        add_values(n0, count, dirty, keys_ahead);
    }

    // Does any row see a key of [n0, n1)? Asked at the edges and where a mask has holes, before K and V are read.
    bool sees_any(int64_t n0, int64_t n1) const {
        bool kept = !s.holes;
        for (int64_t j = n0; j < n1 && !kept; ++j) kept = keeps_key(p, s, j);
        for (int64_t r = 0; kept && r < rows; ++r) {
            const Interval seen = row_interval(s.mask, r / p.group_size);
            const int64_t lo = max_of(n0, seen.lo), hi = min_of(n1, seen.hi);
            if (lo < hi && any_in_dense_mask(p, s, head_of(r), r / p.group_size, lo, hi)) return true;
        }
        return false;
    }

    // Rows as they lie, or copied to whole vectors ended by zeros.
    static void stage(const char** row, int64_t count, int64_t columns, int64_t whole, bool copy, char* staged) {
        if (columns == whole && !copy) return;
        for (int64_t j = 0; j < count; ++j) {
            char* to = staged + j * whole * E::kSize;
            std::memcpy(to, row[j], static_cast<size_t>(columns * E::kSize));
            std::memset(to + columns * E::kSize, 0, static_cast<size_t>((whole - columns) * E::kSize));
            row[j] = to;
        }
    }

    // One vector of a row, as the product takes it.
    static TF_INLINE F load_element(const char* p) {
        if constexpr (E::kPaired) {
            F pairs;
            std::memcpy(&pairs, p, sizeof(F));  // bf16 may begin where no pointer to float may point
            return pairs;
        }
        return load_as_float<E::kType>(p);
    }

    // scores[r][j] = query r . key j, some rows by four keys at a time.
    void find_scores(int64_t count, Ahead& ahead) {
        stage(block->key, count, p.head_dim, width, false, staged_key);
        for (int64_t j = 0; j < count; j += 4) {
            // Fewer than four keys are left only at the end of a block: the last one stands in, and is not looked at.
            const char* row[4];
            for (int64_t i = 0; i < 4; ++i) row[i] = block->key[min_of(j + i, count - 1)];
            for (int64_t r = 0; r < rows;) {
                r += some_rows<kDotRows>(rows - r, [&](auto count) TF_INLINE_LAMBDA {
                    r == 0 ? dots<count, true>(r, j, row, ahead) : dots<count, false>(r, j, row, ahead);
                });
            }
        }
    }

    template <int R, bool kAhead>
    TF_INLINE void dots(int64_t r0, int64_t j, const char* const* row, Ahead& ahead) {
        const int64_t query_width = E::elements(width);
        const float* query = queries + r0 * query_width;
        F sum[R * 4];
        unroll<R * 4>([&](auto i) TF_INLINE_LAMBDA { sum[i] = zero(); });
        for (int64_t d = 0; d < query_width; d += kLanes) {
            if constexpr (kAhead) ahead.step();
            F k[4];
            unroll<4>([&](auto i) TF_INLINE_LAMBDA { k[i] = load_element(row[i] + d * (E::kPaired ? 4 : E::kSize)); });
            unroll<R>([&](auto r) TF_INLINE_LAMBDA {
                const F q = load(query + r * query_width + d);
                unroll<4>([&](auto i)
                              TF_INLINE_LAMBDA { sum[r * 4 + i] = E::Product::multiply_add(sum[r * 4 + i], q, k[i]); });
            });
        }
        unroll<R>([&](auto r) TF_INLINE_LAMBDA {
            const Q four = sum_each(sum[r * 4], sum[r * 4 + 1], sum[r * 4 + 2], sum[r * 4 + 3]);
            std::memcpy(scores + (r0 + r) * keys + j, &four, 16);  // rows of scores are whole multiples of 4
        });
    }

    // Raw products of one row -> scores, as QueryTile::modify has them; here lanes are keys.
    void modify(int64_t r, int64_t n0, int64_t n1) {
        float* x = scores + r * keys;
        const int64_t count = n1 - n0, head = head_of(r), position = r / p.group_size + s.mask.offset - n0;
        const float slope = p.alibi_slopes ? p.alibi_slopes[s.index * p.alibi_batch + head * p.alibi_head] : 0.0f;
        for (int64_t j = 0; j < count; j += kLanes) {
            F y = load(x + j) * p.softmax_scale;
            if (p.softcap != 0.0f) y = tanh(y / p.softcap) * p.softcap;
            if (p.alibi_slopes != nullptr) {
                F distance;
                for (int i = 0; i < kLanes; ++i) distance[i] = static_cast<float>(position - j - i);
                y -= slope * maximum(distance, -distance);
            }
            store(x + j, y);
        }
        if (p.has_float_bias()) {
            for (int64_t j = 0; j < count; ++j) {
                const float b = bias_at(r, n0 + j);
                x[j] = b == -kInfinity ? b : x[j] + b;
            }
        }
    }

    float bias_at(int64_t r, int64_t j) const {
        const int64_t at = s.index * p.bias.batch + head_of(r) * p.bias.head + r / p.group_size * p.bias.row;
        return scalar_at(p.bias.dtype, p.bias.data + (at + j * p.bias.key) * size_of(p.bias.dtype));
    }

    void apply_mask(int64_t r, int64_t n0, int64_t n1) {
        const Interval seen = row_interval(s.mask, r / p.group_size);
        float* x = scores + r * keys;
        for (int64_t j = n0; j < n1; ++j) {
            bool visible = seen.lo <= j && j < seen.hi;
            if (s.holes) visible = visible && keeps_key(p, s, j);
            if (p.summary.lo != nullptr) visible = visible && bias_at(r, j) == 0.0f;
            if (!visible) x[j - n0] = -kInfinity;
        }
    }

    void softmax(int64_t r, int64_t n0, int64_t n1) {
        float *x = scores + r * keys, *state = state_of(r);
        const int64_t count = n1 - n0;
        for (int64_t j = count; j < round_up(count, kLanes); ++j) x[j] = -kInfinity;
        F top = set1(-kInfinity);
        for (int64_t j = 0; j < count; j += kLanes) top = maximum(load(x + j), top);
        const float fresh = max_of(state[0], largest(top));
        if (fresh > state[0]) {
            const float shrink = exp2<5>(set1((state[0] - fresh) * p.score_log2()))[0];
            state[0] = fresh;
            state[1] *= shrink;
            for (int64_t d = 0; d < width_v; d += kLanes) store(state + 2 + d, load(state + 2 + d) * shrink);
        }
        const F limit = set1(fresh == -kInfinity ? 0.0f : fresh);
        F sum = zero();
        for (int64_t j = 0; j < count; j += kLanes) {
            F e = exp2<E::kExpDegree>((load(x + j) - limit) * p.score_log2());
            sum += e;
            if (p.dropout_p > 0.0) e = drop(r, n0 + j, e);
            store_weights(r, j, e);
        }
        state[1] += sum_of(sum);
    }

    void store_weights(int64_t r, int64_t j, F e) {
        if constexpr (E::kPaired) {
            store_from_float<DType::bf16>(reinterpret_cast<char*>(weights) + (r * keys + j) * 2, e);
        } else {
            store(weights + r * keys + j, e);
        }
    }

    F drop(int64_t r, int64_t j, F e) const {
        const uint32_t threshold = static_cast<uint32_t>(min_of(p.dropout_p * 4294967296.0, 4294967295.0));
        const float keep = static_cast<float>(1.0 / (1.0 - p.dropout_p));
        for (int i = 0; i < kLanes; ++i) {
            const Philox4 random =
                philox(p.seed, static_cast<uint32_t>((j + i) / 4), static_cast<uint32_t>(r / p.group_size),
                       static_cast<uint32_t>(head_of(r)), static_cast<uint32_t>(s.index));
            e[i] *= random.word[(j + i) % 4] >= threshold ? keep : 0.0f;
        }
        return e;
    }

    // values += weights . V; as in the tiled forward pass, NaN and Inf of a dirty block go only where they are seen.
    void add_values(int64_t n0, int64_t count, bool dirty, Ahead& ahead) {
        stage(block->value, count, p.head_dim_v, width_v, dirty, staged_value);
        for (int64_t i = 0; dirty && i < count * width_v; ++i) {
            char* element = staged_value + i * E::kSize;
            if (!row_is_finite(E::kType, element, 1)) std::memset(element, 0, E::kSize);
        }
        for (int64_t column = 0; column < width_v; column += kMaxVectors * kLanes) {
            const bool wide = column + kMaxVectors * kLanes <= width_v;
            for (int64_t r = 0; r < rows;) {
                r += some_rows<4>(rows - r,
                                  [&](auto some) TF_INLINE_LAMBDA { add_panel<some>(r, column, wide, count, ahead); });
            }
        }
        for (int64_t j = 0; dirty && j < count; ++j) {
            if (!row_is_finite(E::kType, value_row(n0 + j), p.head_dim_v)) add_dirty_row(value_row(n0 + j), j);
        }
    }

    template <int R>
    void add_panel(int64_t r, int64_t column, bool wide, int64_t count, Ahead& ahead) {
        if (wide) return add_columns<R, kMaxVectors>(r, column, count, ahead);
        constexpr int kNarrow = E::kPaired ? 2 : 1;
        for (; column < width_v; column += kNarrow * kLanes) add_columns<R, kNarrow>(r, column, count, ahead);
    }

    // R rows by V vectors of columns. Paired, a vector pair holds 4 columns of each quarter in turn: see in_order.
    template <int R, int V>
    __attribute__((noinline)) void add_columns(int64_t r0, int64_t column, int64_t count, Ahead& ahead) {
        F sum[R * V];
        unroll<R * V>([&](auto i) TF_INLINE_LAMBDA { sum[i] = zero(); });
        const char* const* row = block->value;
        const int64_t at = column * E::kSize;
        const char* weight = reinterpret_cast<const char*>(weights) + r0 * keys * (E::kPaired ? 2 : 4);
        const int64_t weight_stride = keys * (E::kPaired ? 2 : 4);
        const auto add = [&](const F(&lanes)[V]) TF_INLINE_LAMBDA {
            unroll<R>([&](auto r) TF_INLINE_LAMBDA {
                const F w = E::Product::broadcast(weight + r * weight_stride);
                unroll<V>([&](auto v) TF_INLINE_LAMBDA {
                    sum[r * V + v] = E::Product::multiply_add(sum[r * V + v], w, lanes[v]);
                });
            });
            weight += 4;
        };
        F lanes[V];
        if constexpr (E::kPaired) {
            for (int64_t j = 0; j + 1 < count; j += 2, row += 2) {
                if (r0 == 0) ahead.step();
                unroll<V / 2>([&](auto v) TF_INLINE_LAMBDA {
                    interleave(load_element(row[0] + at + v * 64), load_element(row[1] + at + v * 64), lanes[2 * v],
                               lanes[2 * v + 1]);
                });
                add(lanes);
            }
            if (count % 2 == 1) {
                unroll<V / 2>([&](auto v) TF_INLINE_LAMBDA {
                    interleave(load_element(row[0] + at + v * 64), zero(), lanes[2 * v], lanes[2 * v + 1]);
                });
                add(lanes);
            }
        } else {
            for (int64_t j = 0; j < count; ++j, ++row) {
                if (r0 == 0) ahead.step();
                unroll<V>([&](auto v) TF_INLINE_LAMBDA { lanes[v] = load_element(*row + at + v * kLanes * E::kSize); });
                add(lanes);
            }
        }
        unroll<R * V>([&](auto i) TF_INLINE_LAMBDA {
            float* to = state_of(r0 + i / V) + 2 + column + (i % V) * kLanes;
            store(to, load(to) + sum[i]);
        });
    }

    // Undoes the order that `interleave` leaves the columns in.
    void in_order(float* values) {
        for (int64_t d = 0; d < width_v; d += 2 * kLanes) {
            alignas(64) float both[2 * kLanes];
            for (int i = 0; i < 2 * kLanes; ++i) {
                const int quarter = i / 8, place = i % 8;
                both[i] = values[d + place / 4 * kLanes + quarter * 4 + place % 4];
            }
            std::memcpy(values + d, both, sizeof(both));
        }
    }

    void add_dirty_row(const char* row, int64_t j) {
        for (int64_t r = 0; r < rows; ++r) {
            const char* at = reinterpret_cast<const char*>(weights) + (r * keys + j) * (E::kPaired ? 2 : 4);
            const float weight = scalar_at(E::kPaired ? DType::bf16 : DType::f32, at);
            for (int64_t d = 0; weight != 0.0f && d < p.head_dim_v; ++d) {
                const float x = scalar_at(E::kType, row + d * E::kSize);
                if (!all_finite(&x, 1)) state_of(r)[2 + d] += weight * x;
            }
        }
    }
};

}  // namespace

int64_t decode_workspace(const Problem& p) {
    int64_t bytes = 0;
    with_element(p.dtype, [&](auto element) {
        Arena count(nullptr);
        DecodeScratch<decltype(element)>(p, p.seqlen_q * p.group_size, count);
        bytes = count.used();
    });
    return bytes;
}

int64_t decode_state(const Problem& p) {
    int64_t floats = 0;
    with_element(p.dtype, [&](auto element) { floats = state_size<decltype(element)>(p); });
    return floats;
}

void decode(const Problem& p, const Sequence& sequence, const KeyChunk& chunk, char* workspace) {
    with_element(p.dtype, [&](auto element) { Decode<decltype(element)>(p, sequence, chunk, Arena(workspace)).run(); });
}

}  // namespace TF_ISA
}  // namespace tf
