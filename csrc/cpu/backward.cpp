// Backward pass of a run of query tiles (Dao et al. 2022, algorithm 4), with P found again from the statistics that
// forward left. Lanes are query rows here too: five products, all of them gemm.h's.
//
//   dV += P dO      dP = V dO^T      dS = P (dP - delta)      dK += dS Q      dQ^T += K^T dS
//
// A run owns its query rows, so dQ is written once, and adds dK and dV into float32 rows of its own: no atomics, the
// same bits every time.
#include "kernels.h"
#include "tile.h"

namespace tf {
namespace TF_ISA {
namespace {

template <class E>
struct BackwardScratch {
    BiasScratch bias;
    int64_t width, width_v;  // rows of accumulators: whole vectors
    float *query_t, *dout_t, *query_rows, *dout_rows, *dquery_t, *staged_rows, *staged_out;
    float *scores, *dscores, *slope, *row_max, *row_inverse, *delta;
    float *staged_key, *staged_value, *key_columns;
    // Paired: probabilities and their gradients as bf16, by rows of keys and (the gradients) by pairs of keys.
    float *scores_bf16 = nullptr, *dscores_bf16 = nullptr, *dscores_pairs = nullptr;

    BackwardScratch(const Problem& p, Arena& arena)
        : bias(p, arena), width(round_up(p.head_dim, kLanes)), width_v(round_up(p.head_dim_v, kLanes)) {
        const int64_t longest = round_up(max_of(p.head_dim, p.head_dim_v), 4);
        query_t = arena.floats(round_up(E::elements(p.head_dim), 4) * kRows);
        dout_t = arena.floats(round_up(E::elements(p.head_dim_v), 4) * kRows);
        query_rows = arena.floats(E::elements(kRows) * width);
        dout_rows = arena.floats(E::elements(kRows) * width_v);
        dquery_t = arena.floats(by_keys_rows(p.head_dim) * kRows);
        staged_rows = arena.floats(kRows * longest);
        staged_out = arena.floats(2 * longest);
        scores = arena.floats(kKeys * kRows);
        dscores = arena.floats(kKeys * kRows);
        slope = arena.floats(p.softcap != 0.0f ? kKeys * kRows : 0);
        row_max = arena.floats(kRows);
        row_inverse = arena.floats(kRows);
        delta = arena.floats(kRows);
        staged_key = arena.floats(kKeys * round_up(p.head_dim, 4));
        staged_value = arena.floats(kKeys * round_up(p.head_dim_v, 4));
        key_columns = arena.floats(by_keys_floats(p.head_dim));
        if (E::kPaired) {
            scores_bf16 = arena.floats(kKeys * kRows / 2);
            dscores_bf16 = arena.floats(kKeys * kRows / 2);
            dscores_pairs = arena.floats(kKeys * kRows / 2);
        }
    }
};

// K and V of a block in the three forms the products read.
struct BackwardBlock {
    int64_t begin, end;
    const char *key, *value;  // rows, for S and dP
    int64_t key_stride, value_stride;
    ByKeys by_keys;  // K, for dQ; without NaN and Inf in a dirty block
    bool dirty;
};

template <class E>
class Backward : BackwardScratch<E> {
  public:
    Backward(const Problem& problem, const Sequence& sequence, const BackwardRun& r, const Tile& t, Arena arena)
        : BackwardScratch<E>(problem, arena),
          p(problem),
          run_(r),
          tile(problem, sequence, t.kv_head, t.first_row, t.rows, this->bias) {}

    void run() {
        load_rows();
        std::memset(dquery_t, 0, static_cast<size_t>(by_keys_rows(p.head_dim)) * kRows * 4);
        for (int64_t n = tile.begin; n < tile.end; n += kKeys) visit(n, min_of(n + kKeys, tile.end));
        store_dquery();
    }

  private:
    using Scratch = BackwardScratch<E>;
    using Scratch::dout_rows, Scratch::dquery_t, Scratch::staged_rows, Scratch::staged_out, Scratch::scores;
    using Scratch::dscores, Scratch::slope, Scratch::row_max, Scratch::row_inverse, Scratch::delta;
    using Scratch::dscores_bf16, Scratch::dscores_pairs;
    using Scratch::staged_key, Scratch::staged_value, Scratch::key_columns, Scratch::scores_bf16;
    using Scratch::width, Scratch::width_v, Scratch::query_t, Scratch::dout_t, Scratch::query_rows;
    using Product = typename E::Product;

    const Problem& p;
    const BackwardRun& run_;
    QueryTile tile;

    int64_t batch() const { return p.packed ? 0 : tile.s.index; }

    const char* lane_row(const Operand& operand, int lane) const {
        return row_of(operand, E::kSize, batch(), tile.head[lane], tile.s.first_query + tile.position[lane]);
    }

    // Q and dO in both orders, and each row's statistics.
    void load_rows() {
        pack_rows_transposed<E>(tile, p.query, p.head_dim, staged_rows, query_t);
        pack_rows_transposed<E>(tile, p.dout, p.head_dim_v, staged_rows, dout_t);
        pack_rows<E>(tile, p.query, p.head_dim, query_rows, width);
        pack_rows<E>(tile, p.dout, p.head_dim_v, dout_rows, width_v);
        const int64_t plane = p.num_heads * p.total_q;
        for (int lane = 0; lane < kRows; ++lane) {
            row_max[lane] = row_inverse[lane] = delta[lane] = 0.0f;
            if (lane >= tile.rows) continue;
            const int64_t at = p.lse_index(tile.s.index, tile.head[lane], tile.s.first_query, tile.position[lane]);
            if (!tile.sees_nothing(lane)) {
                row_max[lane] = p.stats[at];
                row_inverse[lane] = p.stats[plane + at];
                delta[lane] = row_dot(lane_row(p.dout, lane), lane_row(p.out, lane));
                if (p.dlse != nullptr && row_inverse[lane] != 0.0f) delta[lane] -= p.dlse[at];
            }
            p.delta[at] = delta[lane];
        }
    }

    float row_dot(const char* a, const char* b) {
        const int64_t padded = round_up(p.head_dim_v, 4);
        load_row<E::kType>(a, p.head_dim_v, staged_out, padded);
        load_row<E::kType>(b, p.head_dim_v, staged_out + padded, padded);
        typedef float Q __attribute__((vector_size(16)));
        Q sum{};
        for (int64_t d = 0; d < padded; d += 4) {
            Q x, y;
            std::memcpy(&x, staged_out + d, 16);
            std::memcpy(&y, staged_out + padded + d, 16);
            sum += x * y;
        }
        return sum[0] + sum[1] + sum[2] + sum[3];
    }

    void visit(int64_t n0, int64_t n1) {
        if (tile.is_full(n0, n1)) {
            attend(load_block(n0, n1, p.has_float_bias()), 0, tile.vectors, n0, n1, false);
            return;
        }
        bool loaded = false;
        BackwardBlock block{};
        tile.for_each_segment(n0, n1, E::kPaired, [&](int v, int count, int64_t k0, int64_t k1, bool masked) {
            if (!loaded) block = load_block(n0, n1, true);
            loaded = true;
            attend(block, v, count, k0, k1, masked);
        });
    }

    BackwardBlock load_block(int64_t n0, int64_t n1, bool hides) {
        const char* key = row_of(p.key, E::kSize, batch(), tile.kv_head, tile.s.first_key + n0);
        const char* value = row_of(p.value, E::kSize, batch(), tile.kv_head, tile.s.first_key + n0);
        const int64_t key_stride = p.key.row * E::kSize, value_stride = p.value.row * E::kSize;
        BackwardBlock block{n0, n1, key, value, key_stride, value_stride, {}, false};
        for (int64_t j = 0; hides && j < n1 - n0 && !block.dirty; ++j) {
            block.dirty = !row_is_finite(E::kType, key + j * key_stride, p.head_dim);
        }
        block.by_keys = stage_by_keys<E>(n1 - n0, p.head_dim, block.dirty, key, key_stride, key_columns);
        stage_depth<E>(n1 - n0, p.head_dim, block.key, block.key_stride, staged_key);
        stage_depth<E>(n1 - n0, p.head_dim_v, block.value, block.value_stride, staged_value);
        return block;
    }

    void attend(const BackwardBlock& block, int v0, int count, int64_t k0, int64_t k1, bool masked) {
        const int64_t keys = k1 - k0, lanes = v0 * kLanes, from = k0 - block.begin;
        gemm<Product, Along::depth, false>(block.key + from * block.key_stride, block.key_stride, query_t + lanes,
                                           kRows, scores + lanes, kRows, keys, count, E::elements(p.head_dim));
        gemm<Product, Along::depth, false>(block.value + from * block.value_stride, block.value_stride, dout_t + lanes,
                                           kRows, dscores + lanes, kRows, keys, count, E::elements(p.head_dim_v));
        if (p.modifies_scores()) tile.modify(scores, p.softcap != 0.0f ? slope : nullptr, v0, count, k0, k1);
        if (masked) tile.apply_mask(scores, v0, count, k0, k1);
        for (int v = v0; v < v0 + count; ++v) {
            differentiate(v, k0, k1, masked || p.has_float_bias());
        }
        if (p.dbias != nullptr) add_dbias(v0, count, k0, k1);
        if (p.softcap != 0.0f) through_softcap(v0, count, keys);  // the bias is added after it, so comes before here

        // The probabilities' rows are keys and their depth is query rows, so they are A in two products.
        const float *weights = scores, *gradients = dscores, *gradients_by_key = dscores;
        if constexpr (E::kPaired) {
            round_to_pairs(v0, count, keys);
            weights = scores_bf16, gradients = dscores_bf16, gradients_by_key = dscores_pairs;
        }
        const int64_t first = E::elements(lanes), row_bytes = E::kPaired ? kRows * 2 : kRows * 4;
        const int64_t depth = E::elements(count * kLanes), at = k0 - run_.key_begin;
        gemm<Product, Along::depth, true>(weights + first, row_bytes, dout_rows + first * width_v, width_v,
                                          run_.dvalue + at * width_v, width_v, keys, width_v / kLanes, depth);
        gemm<Product, Along::depth, true>(gradients + first, row_bytes, query_rows + first * width, width,
                                          run_.dkey + at * width, width, keys, width / kLanes, depth);
        gemm<Product, E::kByKeys, true>(block.by_keys.template from<E>(from), block.by_keys.stride,
                                        gradients_by_key + lanes, kRows, dquery_t + lanes, kRows, block.by_keys.rows,
                                        count, E::elements(keys));
        if (block.dirty) add_dirty_keys(v0, count, k0, k1);
    }

    // Scores and dP of one vector -> P (as dropout left it) and dS, in place.
    void differentiate(int v, int64_t k0, int64_t k1, bool hides) {
        const float factor = p.score_log2();
        const F top = load(row_max + v * kLanes), inverse = load(row_inverse + v * kLanes);
        const F shift = load(delta + v * kLanes);
        const I idle = inverse == 0.0f;  // past the tile's rows, or without a key: 0 times what such a lane has is NaN
        hides |= any(idle);
        alignas(64) float cache[4 * kLanes];
        int64_t cached = -1;
        for (int64_t j = 0; j < k1 - k0; ++j) {
            float* s = scores + j * kRows + v * kLanes;
            float* ds = dscores + j * kRows + v * kLanes;
            // Forward may have left the maximum 8 too low, and a sum in another order moves scores of 1e10 by hundreds.
            const F exponent = minimum(set1(16.0f), (load(s) - top) * factor);
            F probability = exp2<E::kExpDegree>(exponent) * inverse;
            if (hides)
                probability = select(idle | (load(s) == -kInfinity), zero(), probability);  // though inverse be NaN
            F gradient = load(ds), kept = probability;
            if (p.dropout_p > 0.0) {
                const F factor = tile.dropout_factor(v, k0 + j, cache, cached);
                gradient = gradient * factor;
                kept = kept * factor;
            }
            gradient = probability * (gradient - shift);
            // A hidden key may hold anything, its dP too.
            if (hides) gradient = select(probability == 0.0f, zero(), gradient);
            store(s, kept);
            store(ds, gradient);
        }
    }

    void through_softcap(int v0, int count, int64_t keys) {
        for (int64_t j = 0; j < keys; ++j) {
            for (int64_t at = j * kRows + v0 * kLanes; at < j * kRows + (v0 + count) * kLanes; at += kLanes) {
                const F gradient = load(dscores + at);  // 0 at a hidden key, whose slope may be NaN
                store(dscores + at, select(gradient == 0.0f, zero(), gradient * load(slope + at)));
            }
        }
    }

    void round_to_pairs(int v0, int count, int64_t keys) {
        char* rows = reinterpret_cast<char*>(scores_bf16);
        char* drows = reinterpret_cast<char*>(dscores_bf16);
        for (int v = v0; v < v0 + count; ++v) {
            for (int64_t j = 0; j < keys; ++j) {
                const int64_t at = j * kRows + v * kLanes;
                const F ds = load(dscores + at);
                store_from_float<DType::bf16>(rows + at * 2, load(scores + at));
                store_from_float<DType::bf16>(drows + at * 2, ds);
                if (j % 2 == 0) {
                    const F next = j + 1 < keys ? load(dscores + at + kRows) : zero();
                    store(dscores_pairs + j / 2 * kRows + v * kLanes, pair_bf16(ds, next));
                }
            }
        }
    }

    // dS is the bias's gradient, summed over whatever the bias is broadcast over. No other task has these rows of it.
    void add_dbias(int v0, int count, int64_t k0, int64_t k1) {
        for (int lane = v0 * kLanes; lane < min_of<int64_t>((v0 + count) * kLanes, tile.rows); ++lane) {
            float* to = p.dbias + tile.s.index * p.dbias_batch + tile.head[lane] * p.dbias_head +
                        tile.position[lane] * p.dbias_row;
            for (int64_t j = k0; j < k1; ++j) to[j * p.dbias_key] += dscores[(j - k0) * kRows + lane];
        }
    }

    __attribute__((noinline)) void add_dirty_keys(int v0, int count, int64_t k0, int64_t k1) {
        for (int64_t j = k0; j < k1; ++j) {
            const char* row = row_of(p.key, E::kSize, batch(), tile.kv_head, tile.s.first_key + j);
            if (row_is_finite(E::kType, row, p.head_dim)) continue;
            for (int64_t d = 0; d < p.head_dim; ++d) {
                const float x = scalar_at(E::kType, row + d * E::kSize);
                if (all_finite(&x, 1)) continue;
                for (int lane = v0 * kLanes; lane < (v0 + count) * kLanes; ++lane) {
                    const float weight = dscores[(j - k0) * kRows + lane];
                    if (weight != 0.0f) dquery_t[d * kRows + lane] += weight * x;
                }
            }
        }
    }

    void store_dquery() {
        const int64_t padded = round_up(p.head_dim, 4);
        transpose(dquery_t, kRows, staged_rows, padded, padded, round_up(tile.rows, 4));
        for (int lane = 0; lane < tile.rows; ++lane) {
            char* to = const_cast<char*>(lane_row(p.dquery, lane));
            store_row<E::kType>(staged_rows + lane * padded, p.head_dim, p.softmax_scale, to);
        }
    }
};

}  // namespace

int64_t backward_workspace(const Problem& p) {
    int64_t bytes = 0;
    with_element(p.dtype, [&](auto element) {
        Arena count(nullptr);
        BackwardScratch<decltype(element)>(p, count);
        bytes = count.used();
    });
    return bytes;
}

void backward(const Problem& p, const Sequence& sequence, const BackwardRun& run, char* workspace) {
    with_element(p.dtype, [&](auto element) {
        using E = decltype(element);
        [[maybe_unused]] const typename E::Product::InUse product;
        for (int64_t r = run.first_row; r < run.first_row + run.rows; r += kRows) {
            const Tile tile{run.sequence, run.kv_head, r, min_of<int64_t>(kRows, run.first_row + run.rows - r)};
            Backward<E>(p, sequence, run, tile, Arena(workspace)).run();
        }
    });
}

void store_gradient_row(DType dtype, const float* const* parts, int64_t part_count, int64_t count, float scale,
                        float* sum, char* target) {
    if (part_count == 1) return store_row(dtype, parts[0], count, scale, target);
    std::memset(sum, 0, static_cast<size_t>(count) * 4);
    for (int64_t part = 0; part < part_count; ++part) {
        for (int64_t i = 0; i < count; ++i) sum[i] += parts[part][i];
    }
    store_row(dtype, sum, count, scale, target);
}

}  // namespace TF_ISA
}  // namespace tf
