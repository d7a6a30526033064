// Forward pass of a few query tiles: online softmax over blocks of keys (Milakov & Gimelshein 2018; Dao et al. 2022).
#include <optional>

#include "kernels.h"
#include "key_rows.h"

namespace tf {
namespace TF_ISA {
namespace {

// Raise a row's maximum only when it grows by more than this, in base 2: the probabilities stay below 2^8, the sums
// exact enough, and the accumulator is seldom rescaled (the idea is FlashAttention-4's).
constexpr float kRescaleThreshold = 8.0f;

// Scratch of a task, and of each of its tiles. They share each block of keys, which is brought together, turned or
// converted once for all.
template <class E>
struct ForwardScratch {
    BiasScratch bias;
    float *scores, *staged_rows, *staged_key, *staged_value;
    char *gathered_key, *gathered_value;  // rows out of several pages
    struct {
        float *query_t, *out_t, *row_max, *row_sum;
    } tile[kTiles];

    ForwardScratch(const Problem& p, Arena& arena) : bias(p, arena) {
        scores = arena.floats(kKeys * kRows);
        staged_rows = arena.floats(kRows * round_up(max_of(p.head_dim, p.head_dim_v), 4));
        staged_key = arena.floats(kKeys * round_up(p.head_dim, 4));
        staged_value = arena.floats(by_keys_floats(p.head_dim_v));
        const int64_t gathered = p.page_size > 0 ? kKeys : 0;
        gathered_key = reinterpret_cast<char*>(arena.floats(gathered * ceil_div(p.head_dim * E::kSize, 4)));
        gathered_value = reinterpret_cast<char*>(arena.floats(gathered * ceil_div(p.head_dim_v * E::kSize, 4)));
        for (auto& mine : tile) {
            mine.query_t = arena.floats(round_up(E::elements(p.head_dim), 4) * kRows);
            mine.out_t = arena.floats(by_keys_rows(p.head_dim_v) * kRows);
            mine.row_max = arena.floats(kRows);
            mine.row_sum = arena.floats(kRows);
        }
    }
};

// The keys [begin, end) with K and V as the products read them; strides in bytes. Loaded when a tile asks for them.
template <class E>
struct KeyBlock {
    const int64_t begin, end;
    const char *key = nullptr, *value = nullptr;
    int64_t key_stride = 0, value_stride = 0;
    ByKeys by_keys{};    // V
    bool dirty = false;  // NaN or Inf in V, which must not reach the rows that do not see it
    bool loaded = false, checked = false;

    // `hides`: some row does not see some key, so NaN and Inf are looked for.
    void load(const Problem& p, const Sequence& s, int64_t kv_head, const ForwardScratch<E>& scratch, bool hides) {
        if (loaded && (checked || !hides)) return;
        find(p, s, kv_head, scratch);
        for (int64_t j = 0; !loaded && j < end - begin; ++j) {
            prefetch_row(key + j * key_stride, p.head_dim * E::kSize);
            prefetch_row(value + j * value_stride, p.head_dim_v * E::kSize);
        }
        for (int64_t j = 0; hides && j < end - begin && !dirty; ++j) {
            dirty = !row_is_finite(E::kType, value + j * value_stride, p.head_dim_v);
        }
        loaded = true, checked = hides;
        stage_depth<E>(end - begin, p.head_dim, key, key_stride, scratch.staged_key);
        by_keys = stage_by_keys<E>(end - begin, p.head_dim_v, dirty, value, value_stride, scratch.staged_value);
    }

  private:
    // K and V where they lie; rows of several pages are brought together first.
    void find(const Problem& p, const Sequence& s, int64_t kv_head, const ForwardScratch<E>& scratch) {
        key = scratch.gathered_key, key_stride = pitch(p.head_dim);
        value = scratch.gathered_value, value_stride = pitch(p.head_dim_v);
        for_each_run(p, s, begin, end, [&](const Run& run) {
            const char *key_rows = run.of(p.key, E::kSize, kv_head), *value_rows = run.of(p.value, E::kSize, kv_head);
            if (run.count == end - begin) {
                key = key_rows, key_stride = p.key.row * E::kSize;
                value = value_rows, value_stride = p.value.row * E::kSize;
                return;
            }
            gather(key_rows, p.key.row, run, p.head_dim, scratch.gathered_key);
            gather(value_rows, p.value.row, run, p.head_dim_v, scratch.gathered_value);
        });
    }

    static int64_t pitch(int64_t columns) { return round_up(columns * E::kSize, 4); }  // bytes of a gathered row

    void gather(const char* rows, int64_t stride, const Run& run, int64_t columns, char* gathered) const {
        for (int64_t j = 0; j < run.count; ++j) {
            std::memcpy(gathered + (run.first - begin + j) * pitch(columns), rows + j * stride * E::kSize,
                        static_cast<size_t>(columns * E::kSize));
        }
    }
};

// One tile. The task that has it calls `start`, `visit` for each block of keys in order, and `finish`.
template <class E>
class Forward {
  public:
    Forward(const Problem& problem, const Sequence& sequence, const Tile& t, const ForwardScratch<E>& task_scratch,
            int index)
        : p(problem),
          scratch(task_scratch),
          scores(scratch.scores),
          query_t(scratch.tile[index].query_t),
          out_t(scratch.tile[index].out_t),
          row_max(scratch.tile[index].row_max),
          row_sum(scratch.tile[index].row_sum),
          tile(problem, sequence, t.kv_head, t.first_row, t.rows, scratch.bias) {}

    Interval keys() const { return {tile.begin, tile.end}; }

    void start() {
        pack_rows_transposed<E>(tile, p.query, p.head_dim, scratch.staged_rows, query_t);
        std::memset(out_t, 0, static_cast<size_t>(by_keys_rows(p.head_dim_v)) * kRows * 4);
        for (int i = 0; i < kRows; ++i) {
            row_max[i] = -kInfinity;
            row_sum[i] = 0.0f;
        }
    }

    // One block of keys: as a whole where every row sees every key, else vector by vector in its own range.
    void visit(KeyBlock<E>& block) {
        if (tile.is_full(block.begin, block.end)) {
            block.load(p, tile.s, tile.kv_head, scratch, p.has_float_bias());
            attend(block, 0, tile.vectors, block.begin, block.end, false);
            return;
        }
        tile.for_each_segment(block.begin, block.end, E::kPaired,
                              [&](int v, int count, int64_t k0, int64_t k1, bool masked) {
                                  block.load(p, tile.s, tile.kv_head, scratch, true);
                                  attend(block, v, count, k0, k1, masked);
                              });
    }

    // The sink joins the sum, rows are normalised and go home.
    void finish() {
        for (int v = 0; v < tile.vectors; ++v) normalise(v);
        const int64_t width = round_up(p.head_dim_v, 4);
        float* rows = scratch.staged_rows;
        transpose(out_t, kRows, rows, width, width, round_up(tile.rows, 4));
        for (int lane = 0; lane < tile.rows; ++lane) {
            char* to = const_cast<char*>(row_of(p.out, E::kSize, p.packed ? 0 : tile.s.index, tile.head[lane],
                                                tile.s.first_query + tile.position[lane]));
            store_row<E::kType>(rows + lane * width, p.head_dim_v, 1.0f, to);
        }
        for (int lane = 0; lane < tile.rows; ++lane) {
            store_statistics(p, tile.s, tile.head[lane], tile.position[lane], row_max[lane], row_sum[lane]);
        }
    }

  private:
    const Problem& p;
    const ForwardScratch<E>& scratch;
    float *const scores, *const query_t, *const out_t, *const row_max, *const row_sum;
    QueryTile tile;

    // Keys [k0, k1) of a block for vectors [v0, v0 + count).
    void attend(const KeyBlock<E>& block, int v0, int count, int64_t k0, int64_t k1, bool masked) {
        const int64_t keys = k1 - k0;
        float* scores_v = scores + v0 * kLanes;
        gemm<typename E::Product, Along::depth, false>(block.key + (k0 - block.begin) * block.key_stride,
                                                       block.key_stride, query_t + v0 * kLanes, kRows, scores_v, kRows,
                                                       keys, count, E::elements(p.head_dim));
        if (p.modifies_scores()) tile.modify(scores, nullptr, v0, count, k0, k1);
        if (masked) tile.apply_mask(scores, v0, count, k0, k1);
        for (int v = v0; v < v0 + count; v += 4) {
            const int some = min_of(4, v0 + count - v);
            softmax_of(some, v, k0, k1);
        }
        gemm<typename E::Product, E::kByKeys, true>(block.by_keys.template from<E>(k0 - block.begin),
                                                    block.by_keys.stride, scores_v, kRows, out_t + v0 * kLanes, kRows,
                                                    block.by_keys.rows, count, E::elements(keys));
        if (block.dirty) add_dirty_values(v0, count, k0, k1);
    }

    void softmax_of(int count, int v, int64_t k0, int64_t k1) {
        switch (count) {
            case 4:
                return softmax<4>(v, k0, k1);
            case 3:
                return softmax<3>(v, k0, k1);
            case 2:
                return softmax<2>(v, k0, k1);
            default:
                return softmax<1>(v, k0, k1);
        }
    }

    // Scores of V vectors -> probabilities relative to the running maximum, in place (paired: as pairs of keys).
    template <int V>
    void softmax(int v0, int64_t k0, int64_t k1) {
        const float factor = p.score_log2();
        const float threshold = min_of(kRescaleThreshold / factor, 1e38f);  // finite: beside -inf it must not be NaN
        const int64_t keys = k1 - k0;
        float* at = scores + v0 * kLanes;
        F top[V];
        unroll<V>([&](auto v) TF_INLINE_LAMBDA { top[v] = set1(-kInfinity); });
        for (int64_t j = 0; j < keys; ++j) {
            unroll<V>([&](auto v) TF_INLINE_LAMBDA { top[v] = maximum(load(at + j * kRows + v * kLanes), top[v]); });
        }
        F limit[V], sum[V];
        unroll<V>([&](auto v) TF_INLINE_LAMBDA {
            float* m = row_max + (v0 + v) * kLanes;
            const F old = load(m);
            if (any(top[v] > old + threshold)) raise_maximum(v0 + v, maximum(top[v], old));
            const F now = load(m);
            limit[v] = select(now == -kInfinity, zero(), now);
            sum[v] = load(row_sum + (v0 + v) * kLanes);
        });
        if (p.dropout_p > 0.0) {
            unroll<V>([&](auto v) TF_INLINE_LAMBDA { exponentials_dropped(v0 + v, k0, k1, factor, limit[v], sum[v]); });
        } else if constexpr (E::kPaired) {
            const float* from = at;
            float* to = at;
            const auto exponentials = [&](auto both) TF_INLINE_LAMBDA {
                unroll<V>([&](auto v) TF_INLINE_LAMBDA {
                    const float* x = from + v * kLanes;
                    const F e0 = exp2<E::kExpDegree>((load(x) - limit[v]) * factor);
                    const F e1 = both ? exp2<E::kExpDegree>((load(x + kRows) - limit[v]) * factor) : zero();
                    sum[v] += e0 + e1;
                    store(to + v * kLanes, pair_bf16(e0, e1));
                });
            };
            for (int64_t j = 0; j + 1 < keys; j += 2, from += 2 * kRows, to += kRows) exponentials(std::true_type{});
            if (keys % 2 == 1) exponentials(std::false_type{});
        } else {
            for (int64_t j = 0; j < keys; ++j) {
                unroll<V>([&](auto v) TF_INLINE_LAMBDA {
                    float* x = at + j * kRows + v * kLanes;
                    const F e = exp2<E::kExpDegree>((load(x) - limit[v]) * factor);
                    sum[v] += e;
                    store(x, e);
                });
            }
        }
        unroll<V>([&](auto v) TF_INLINE_LAMBDA { store(row_sum + (v0 + v) * kLanes, sum[v]); });
    }

    // The same with dropout: the sum takes every probability, the product only the kept ones.
    __attribute__((noinline)) void exponentials_dropped(int v, int64_t k0, int64_t k1, float factor, F limit, F& sum) {
        alignas(64) float cache[4 * kLanes];
        int64_t cached = -1;
        float* at = scores + v * kLanes;
        F previous = zero();
        for (int64_t j = k0; j < k1; ++j) {
            F e = exp2<E::kExpDegree>((load(at + (j - k0) * kRows) - limit) * factor);
            sum += e;
            e *= tile.dropout_factor(v, j, cache, cached);
            if constexpr (E::kPaired) {
                const int64_t pair = (j - k0) / 2;
                if ((j - k0) % 2 == 1) {
                    store(at + pair * kRows, pair_bf16(previous, e));
                } else if (j + 1 == k1) {
                    store(at + pair * kRows, pair_bf16(e, zero()));
                }
                previous = e;
            } else {
                store(at + (j - k0) * kRows, e);
            }
        }
    }

    __attribute__((noinline)) void raise_maximum(int v, F fresh) {
        float* m = row_max + v * kLanes;
        const F old = load(m);
        const F safe = select(fresh == -kInfinity, zero(), fresh);
        const F shrink = exp2<5>((old - safe) * p.score_log2());  // exp2(-inf) = 0 for a first block
        store(m, fresh);
        store(row_sum + v * kLanes, load(row_sum + v * kLanes) * shrink);
        for (int64_t d = 0; d < p.head_dim_v; ++d) {
            float* o = out_t + d * kRows + v * kLanes;
            store(o, load(o) * shrink);
        }
    }

    // The NaN and Inf of a dirty block, for the rows that do see them (their probability is not 0).
    __attribute__((noinline)) void add_dirty_values(int v0, int count, int64_t k0, int64_t k1) {
        for (int64_t j = k0; j < k1; ++j) {
            const char* row = key_row(p, tile.s, p.value, tile.kv_head, j);
            if (row_is_finite(E::kType, row, p.head_dim_v)) continue;
            for (int64_t d = 0; d < p.head_dim_v; ++d) {
                const float value = scalar_at(E::kType, row + d * E::kSize);
                if (all_finite(&value, 1)) continue;
                for (int lane = v0 * kLanes; lane < (v0 + count) * kLanes; ++lane) {
                    const float weight = probability(lane, j - k0);
                    if (weight != 0.0f) out_t[d * kRows + lane] += weight * value;
                }
            }
        }
    }

    float probability(int lane, int64_t j) const {
        if constexpr (E::kPaired) {
            const char* pair = reinterpret_cast<const char*>(scores + j / 2 * kRows + lane);
            return scalar_at(DType::bf16, pair + 2 * (j % 2));
        }
        return scores[j * kRows + lane];
    }

    void normalise(int v) {
        alignas(64) float sink[kLanes];
        for (int i = 0; i < kLanes; ++i) sink[i] = sink_of(p, tile.head[v * kLanes + i]);
        const F m = load(row_max + v * kLanes), l = load(row_sum + v * kLanes), extra = load(sink);
        const F fresh = maximum(extra, m);
        const F safe = select(fresh == -kInfinity, zero(), fresh);
        const F shrink = exp2<5>((m - safe) * p.score_log2());
        const F total = l * shrink + exp2<5>((extra - safe) * p.score_log2());
        const I empty = (m == -kInfinity) & (l == 0.0f);  // scores that are all NaN leave no maximum, but a sum
        const F inverse = select(empty, zero(), 1.0f / total);
        const F scale = inverse * shrink;
        for (int64_t d = 0; d < p.head_dim_v; ++d) {
            float* o = out_t + d * kRows + v * kLanes;
            store(o, select(empty, zero(), load(o) * scale));
        }
        store(row_max + v * kLanes, select(empty, set1(-kInfinity), safe));
        store(row_sum + v * kLanes, total);
    }
};

template <class E>
void forward_tiles(const Problem& p, const Sequence& sequence, const Tile& t, const ForwardScratch<E>& scratch) {
    std::optional<Forward<E>> tiles[kTiles];
    int count = 0;
    Interval keys{0, 0};
    for (int64_t r = 0; r < t.rows; r += kRows, ++count) {
        const Tile part{t.sequence, t.kv_head, t.first_row + r, min_of<int64_t>(kRows, t.rows - r)};
        tiles[count].emplace(p, sequence, part, scratch, count);
        tiles[count]->start();
        const Interval seen = tiles[count]->keys();
        if (seen.lo >= seen.hi) continue;
        keys = keys.lo < keys.hi ? Interval{min_of(keys.lo, seen.lo), max_of(keys.hi, seen.hi)} : seen;
    }
    // Blocks begin where they would for any other tiles: a row's bits do not depend on whom it shares a task with (if
    // only V is finite: whether a probability of 0 meets a NaN depends on who else looked for it).
    keys.lo -= (keys.lo - sequence.mask.start) % kKeys;
    for (int64_t n = keys.lo; n < keys.hi; n += kKeys) {
        KeyBlock<E> block{n, min_of(n + kKeys, keys.hi)};
        for (int i = 0; i < count; ++i) {
            const Interval seen = tiles[i]->keys();
            if (seen.lo < block.end && block.begin < seen.hi) tiles[i]->visit(block);
        }
    }
    for (int i = 0; i < count; ++i) tiles[i]->finish();
}

}  // namespace

int64_t forward_workspace(const Problem& p) {
    int64_t bytes = 0;
    with_element(p.dtype, [&](auto element) {
        Arena count(nullptr);
        ForwardScratch<decltype(element)>(p, count);
        bytes = count.used();
    });
    return bytes;
}

void forward(const Problem& p, const Sequence& sequence, const Tile& t, char* workspace) {
    with_element(p.dtype, [&](auto element) {
        using E = decltype(element);
        [[maybe_unused]] const typename E::Product::InUse product;
        Arena arena(workspace);
        forward_tiles<E>(p, sequence, t, ForwardScratch<E>(p, arena));
    });
}

}  // namespace TF_ISA
}  // namespace tf
