// Forward pass of one query tile: online softmax over blocks of keys (Milakov & Gimelshein 2018; Dao et al. 2022).
#include "kernels.h"
#include "key_rows.h"

namespace tf {
namespace TF_ISA {
namespace {

// Raise a row's maximum only when it grows by more than this, in base 2: the probabilities stay below 2^8, the sums
// exact enough, and the accumulator is seldom rescaled (the idea is FlashAttention-4's).
constexpr float kRescaleThreshold = 8.0f;

// A block of keys from `begin` on, with K and V as the products read them; strides in bytes.
struct KeyBlock {
    int64_t begin;
    const char *key, *value;
    int64_t key_stride, value_stride;
    bool dirty;  // NaN or Inf in V, which must not reach the rows that do not see it; only looked for where some do not
};

template <class E>
struct ForwardScratch {
    BiasScratch bias;
    float *query_t, *scores, *out_t, *staged_rows, *staged_key, *staged_value, *row_max, *row_sum;
    char *gathered_key, *gathered_value;  // rows out of several pages

    ForwardScratch(const Problem& p, Arena& arena) : bias(p, arena) {
        query_t = arena.floats(round_up(E::elements(p.head_dim), 4) * kRows);
        scores = arena.floats(kKeys * kRows);
        out_t = arena.floats(round_up(p.head_dim_v, 4) * kRows);
        staged_rows = arena.floats(kRows * round_up(max_of(p.head_dim, p.head_dim_v), 4));
        staged_key = arena.floats(kKeys * round_up(p.head_dim, 4));
        staged_value = arena.floats(kKeys * round_up(p.head_dim_v, 4));
        row_max = arena.floats(kRows);
        row_sum = arena.floats(kRows);
        const int64_t gathered = p.page_size > 0 ? kKeys : 0;
        gathered_key = reinterpret_cast<char*>(arena.floats(gathered * ceil_div(p.head_dim * E::kSize, 4)));
        gathered_value = reinterpret_cast<char*>(arena.floats(gathered * ceil_div(p.head_dim_v * E::kSize, 4)));
    }
};

template <class E>
class Forward : ForwardScratch<E> {
  public:
    Forward(const Problem& problem, const Sequence& sequence, const Tile& t, Arena arena)
        : ForwardScratch<E>(problem, arena),
          p(problem),
          tile(problem, sequence, t.kv_head, t.first_row, t.rows, this->bias) {}

    void run() {
        pack_rows_transposed<E>(tile, p.query, p.head_dim, staged_rows, query_t);
        std::memset(out_t, 0, static_cast<size_t>(round_up(p.head_dim_v, 4)) * kRows * 4);
        for (int i = 0; i < kRows; ++i) {
            row_max[i] = -kInfinity;
            row_sum[i] = 0.0f;
        }
        for (int64_t n = tile.begin; n < tile.end; n += kKeys) visit(n, min_of(n + kKeys, tile.end));
        finish();
    }

  private:
    using Scratch = ForwardScratch<E>;
    using Scratch::query_t, Scratch::scores, Scratch::out_t, Scratch::staged_rows, Scratch::staged_key;
    using Scratch::staged_value, Scratch::row_max, Scratch::row_sum, Scratch::gathered_key, Scratch::gathered_value;

    const Problem& p;
    QueryTile tile;

    // One block of keys: as a whole where every row sees every key, else vector by vector in its own range.
    void visit(int64_t n0, int64_t n1) {
        if (tile.is_full(n0, n1)) {
            attend(load_block(n0, n1, p.has_float_bias()), 0, tile.vectors, n0, n1, false);
            return;
        }
        bool loaded = false;
        KeyBlock block{};
        tile.for_each_segment(n0, n1, E::kPaired, [&](int v, int count, int64_t k0, int64_t k1, bool masked) {
            if (!loaded) block = load_block(n0, n1, true);
            loaded = true;
            attend(block, v, count, k0, k1, masked);
        });
    }

    KeyBlock load_block(int64_t n0, int64_t n1, bool hides) {
        const int64_t keys = n1 - n0;
        KeyBlock block = find_block(n0, n1);
        for (int64_t j = 0; hides && j < keys && !block.dirty; ++j) {
            block.dirty = !row_is_finite(E::kType, block.value + j * block.value_stride, p.head_dim_v);
        }
        stage_depth<E>(keys, p.head_dim, block.key, block.key_stride, staged_key);
        stage_by_keys<E>(keys, p.head_dim_v, block.dirty, block.value, block.value_stride, staged_value);
        return block;
    }

    // K and V where they lie; rows of several pages are brought together first.
    KeyBlock find_block(int64_t n0, int64_t n1) const {
        KeyBlock block{n0, gathered_key, gathered_value, pitch(p.head_dim), pitch(p.head_dim_v), false};
        for_each_run(p, tile.s, n0, n1, [&](const Run& run) {
            const char* key = run.of(p.key, E::kSize, tile.kv_head);
            const char* value = run.of(p.value, E::kSize, tile.kv_head);
            if (run.count == n1 - n0) {
                block = {n0, key, value, p.key.row * E::kSize, p.value.row * E::kSize, false};
                return;
            }
            gather(key, p.key.row, run, n0, p.head_dim, gathered_key);
            gather(value, p.value.row, run, n0, p.head_dim_v, gathered_value);
        });
        return block;
    }

    static int64_t pitch(int64_t columns) { return round_up(columns * E::kSize, 4); }  // bytes of a gathered row

    static void gather(const char* rows, int64_t stride, const Run& run, int64_t n0, int64_t columns, char* gathered) {
        for (int64_t j = 0; j < run.count; ++j) {
            std::memcpy(gathered + (run.first - n0 + j) * pitch(columns), rows + j * stride * E::kSize,
                        static_cast<size_t>(columns * E::kSize));
        }
    }

    // Keys [k0, k1) of a block for vectors [v0, v0 + count).
    void attend(const KeyBlock& block, int v0, int count, int64_t k0, int64_t k1, bool masked) {
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
        const int64_t first = E::elements(k0 - block.begin);
        gemm<typename E::Product, Along::rows, true>(block.value + first * block.value_stride, block.value_stride,
                                                     scores_v, kRows, out_t + v0 * kLanes, kRows, p.head_dim_v, count,
                                                     E::elements(keys));
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
            for (int64_t j = 0; j < keys; j += 2) {
                const bool both = j + 1 < keys;
                unroll<V>([&](auto v) TF_INLINE_LAMBDA {
                    const float* from = at + j * kRows + v * kLanes;
                    const F e0 = exp2<E::kExpDegree>((load(from) - limit[v]) * factor);
                    const F e1 = both ? exp2<E::kExpDegree>((load(from + kRows) - limit[v]) * factor) : zero();
                    sum[v] += e0 + e1;
                    store(at + j / 2 * kRows + v * kLanes, pair_bf16(e0, e1));
                });
            }
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

    // The sink joins the sum, rows are normalised and go home.
    void finish() {
        for (int v = 0; v < tile.vectors; ++v) {
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
        const int64_t width = round_up(p.head_dim_v, 4);
        transpose(out_t, kRows, staged_rows, width, width, round_up(tile.rows, 4));
        for (int lane = 0; lane < tile.rows; ++lane) {
            char* to = const_cast<char*>(row_of(p.out, E::kSize, p.packed ? 0 : tile.s.index, tile.head[lane],
                                                tile.s.first_query + tile.position[lane]));
            store_row<E::kType>(staged_rows + lane * width, p.head_dim_v, 1.0f, to);
        }
        for (int lane = 0; lane < tile.rows; ++lane) {
            store_statistics(p, tile.s, tile.head[lane], tile.position[lane], row_max[lane], row_sum[lane]);
        }
    }
};

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
        Forward<E>(p, sequence, t, Arena(workspace)).run();
    });
}

}  // namespace TF_ISA
}  // namespace tf
