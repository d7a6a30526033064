// Split-KV decode: a few query rows against one chunk of keys (Flash-Decoding, Dao et al. 2023). Lanes run along
// head_dim, the rows of a KV head's whole group share one pass over K and V, and memory is asked for ahead of use.
#include "kernels.h"
#include "tile.h"

namespace tf {
namespace TF_ISA {
namespace {

typedef float Q __attribute__((vector_size(16)));

constexpr int kBlockBytes = 16384;  // of K or V in a block: half of a level-1 cache
constexpr int64_t kMaxBlock = 64, kMinBlock = 16;
constexpr int64_t kPrefetchRows = 12;  // how far ahead of use rows of K are asked for

TF_INLINE Q add_quarters(F x) {
#if defined(__AVX512F__)
    const __m512 v = reinterpret_cast<__m512>(x);
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return reinterpret_cast<Q>(_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
    const __m256 v = reinterpret_cast<__m256>(x);
    return reinterpret_cast<Q>(_mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)));
#else
    return x;
#endif
}

// The sums of four vectors, as four floats.
TF_INLINE Q sum_each(F a, F b, F c, F d) {
    const Q q0 = add_quarters(a), q1 = add_quarters(b), q2 = add_quarters(c), q3 = add_quarters(d);
    typedef int32_t Index __attribute__((vector_size(16)));
    const Q low01 = __builtin_shuffle(q0, q1, Index{0, 4, 1, 5}), high01 = __builtin_shuffle(q0, q1, Index{2, 6, 3, 7});
    const Q low23 = __builtin_shuffle(q2, q3, Index{0, 4, 1, 5}), high23 = __builtin_shuffle(q2, q3, Index{2, 6, 3, 7});
    const Q s01 = low01 + high01, s23 = low23 + high23;
    return __builtin_shuffle(s01, s23, Index{0, 1, 4, 5}) + __builtin_shuffle(s01, s23, Index{2, 3, 6, 7});
}

inline int64_t block_keys(const Problem& p, int64_t element_size) {
    const int64_t row_bytes = max_of(p.head_dim, p.head_dim_v) * element_size;
    return max_of(kMinBlock, min_of(kMaxBlock, kBlockBytes / row_bytes / 16 * 16));
}

template <class E>
struct DecodeScratch {
    int64_t rows, keys, width, width_v;  // width: 32-bit elements of a staged row, whole vectors
    float *queries, *scores, *staged_key, *staged_value, *weights;

    DecodeScratch(const Problem& p, int64_t row_count, Arena& arena)
        : rows(row_count),
          keys(block_keys(p, E::kSize)),
          width(round_up(E::elements(p.head_dim), kLanes)),
          width_v(round_up(p.head_dim_v, kLanes)) {
        queries = arena.floats(rows * width);
        scores = arena.floats(rows * keys);
        weights = arena.floats(rows * keys);  // paired: the probabilities as bf16
        staged_key = arena.floats(keys * width);
        staged_value = arena.floats(keys * width_v);
    }
};

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
            const char* from = row_of(p.query, E::kSize, batch(), head_of(r), s.first_query + r / p.group_size);
            stage_row(from, p.head_dim, queries + r * width, width);
            float* state = state_of(r);
            state[0] = -kInfinity;
            std::memset(state + 1, 0, static_cast<size_t>(width_v + 1) * 4);
        }
        for (int64_t n = chunk.begin; n < chunk.end; n += keys) attend(n, min_of(n + keys, chunk.end));
    }

  private:
    using Scratch = DecodeScratch<E>;
    using Scratch::queries, Scratch::scores, Scratch::staged_key, Scratch::staged_value, Scratch::weights;
    using Scratch::rows, Scratch::keys, Scratch::width, Scratch::width_v;

    const Problem& p;
    const Sequence& s;
    const KeyChunk& chunk;

    int64_t batch() const { return p.packed ? 0 : s.index; }
    int64_t head_of(int64_t r) const { return chunk.kv_head * p.group_size + r % p.group_size; }
    float* state_of(int64_t r) const { return chunk.partial + r * (2 + width_v); }  // maximum, sum, values

    static void stage_row(const char* from, int64_t count, float* to, int64_t padded) {
        if constexpr (E::kPaired) {
            std::memset(to, 0, static_cast<size_t>(padded) * 4);
            std::memcpy(to, from, static_cast<size_t>(count) * 2);
        } else {
            load_row<E::kType>(from, count, to, padded);
        }
    }

    void attend(int64_t n0, int64_t n1) {
        const char* key = row_of(p.key, E::kSize, batch(), chunk.kv_head, s.first_key + n0);
        const char* value = row_of(p.value, E::kSize, batch(), chunk.kv_head, s.first_key + n0);
        const TileRange seen = tile_range(s.mask, 0, s.len_q - 1);
        const bool edge = n0 < seen.full_begin || n1 > seen.full_end || s.holes || p.summary.lo != nullptr;
        find_scores(key, value, n1 - n0);
        bool dirty = false;
        for (int64_t j = 0; edge && j < n1 - n0 && !dirty; ++j) {
            dirty = !row_is_finite(E::kType, value + j * p.value.row * E::kSize, p.head_dim_v);
        }
        for (int64_t r = 0; r < rows; ++r) {
            modify(r, n0, n1);
            if (edge) apply_mask(r, n0, n1);
            softmax(r, n0, n1);
        }
        add_values(value, n1 - n0, dirty);
    }

    // scores[r][j] = query r . key j, four rows by four keys at a time.
    void find_scores(const char* key, const char* value, int64_t count) {
        const bool in_place = (E::kType == DType::f32 || E::kPaired) && E::elements(p.head_dim) % kLanes == 0 &&
                              (!E::kPaired || p.head_dim % 2 == 0);
        const int64_t stride = in_place ? p.key.row * E::kSize : width * 4;
        for (int64_t j = 0; j < count; j += 4) {
            const int64_t some = min_of<int64_t>(4, count - j);
            for (int64_t i = j; i < j + some; ++i) {  // V of this block, K of what comes next
                prefetch(value + i * p.value.row * E::kSize, p.head_dim_v * E::kSize);
                prefetch(key + (i + kPrefetchRows) * p.key.row * E::kSize, p.head_dim * E::kSize);
                if (!in_place) stage_row(key + i * p.key.row * E::kSize, p.head_dim, staged_key + i * width, width);
            }
            const char* from = in_place ? key + j * stride : reinterpret_cast<const char*>(staged_key) + j * stride;
            int64_t r = 0;
            for (; r + 4 <= rows; r += 4) dots<4>(r, j, some, from, stride);
            for (; r < rows; ++r) dots<1>(r, j, some, from, stride);
        }
    }

    template <int R>
    TF_INLINE void dots(int64_t r0, int64_t j, int64_t some, const char* from, int64_t stride) {
        // Fewer than four keys are left only at the end of a chunk: the last one stands in, and is not stored.
        const char* row[4];
        unroll<4>([&](auto i) TF_INLINE_LAMBDA { row[i] = from + min_of<int64_t>(i, some - 1) * stride; });
        const float* query = queries + r0 * width;
        F sum[R * 4];
        unroll<R * 4>([&](auto i) TF_INLINE_LAMBDA { sum[i] = zero(); });
        for (int64_t d = 0; d < width; d += kLanes) {
            F k[4];
            unroll<4>([&](auto i) TF_INLINE_LAMBDA { k[i] = load(reinterpret_cast<const float*>(row[i]) + d); });
            unroll<R>([&](auto r) TF_INLINE_LAMBDA {
                const F q = load(query + r * width + d);
                unroll<4>([&](auto i)
                              TF_INLINE_LAMBDA { sum[r * 4 + i] = E::Product::multiply_add(sum[r * 4 + i], q, k[i]); });
            });
        }
        unroll<R>([&](auto r) TF_INLINE_LAMBDA {
            const Q four = sum_each(sum[r * 4], sum[r * 4 + 1], sum[r * 4 + 2], sum[r * 4 + 3]);
            std::memcpy(scores + (r0 + r) * keys + j, &four, 16);  // rows of scores are whole multiples of 4
        });
    }

    static void prefetch(const char* row, int64_t bytes) {
        for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b);
    }

    // Raw products of one row -> scores, as QueryTile::modify has them; here lanes are keys.
    void modify(int64_t r, int64_t n0, int64_t n1) {
        float* x = scores + r * keys;
        const int64_t count = n1 - n0, head = head_of(r), position = r / p.group_size + s.mask.offset - n0;
        const bool plain = !p.modifies_scores();
        const float slope = p.alibi_slopes ? p.alibi_slopes[s.index * p.alibi_batch + head * p.alibi_head] : 0.0f;
        for (int64_t j = 0; j < count; j += kLanes) {
            F y = load(x + j) * (plain ? p.softmax_scale * kLog2E : p.softmax_scale);
            if (!plain) {
                if (p.softcap != 0.0f) y = tanh(y / p.softcap) * p.softcap;
                if (p.alibi_slopes != nullptr) {
                    F distance;
                    for (int i = 0; i < kLanes; ++i) distance[i] = static_cast<float>(position - j - i);
                    y -= slope * maximum(distance, -distance);
                }
            }
            store(x + j, y);
        }
        if (p.bias.data != nullptr && p.bias.dtype != DType::boolean) {
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
            if (s.holes) visible &= p.key_mask[s.index * p.key_mask_batch + j * p.key_mask_key] != 0;
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
        float fresh = state[0];
        for (int i = 0; i < kLanes; ++i) fresh = max_of(fresh, top[i]);
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
        for (int i = 0; i < kLanes; ++i) state[1] += sum[i];
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
    void add_values(const char* value, int64_t count, bool dirty) {
        const int64_t row_bytes = p.value.row * E::kSize;
        const float* from = reinterpret_cast<const float*>(value);
        int64_t stride = p.value.row;
        if (E::kType != DType::f32 || dirty || p.head_dim_v % kLanes != 0) {
            from = staged_value;
            stride = width_v;
            if constexpr (E::kPaired) {
                for (int64_t j = 0; j < count; j += 2) {
                    const char* second = j + 1 < count ? value + (j + 1) * row_bytes : nullptr;
                    load_pair_row(value + j * row_bytes, second, p.head_dim_v, staged_value + j / 2 * width_v, width_v);
                }
            } else {
                for (int64_t j = 0; j < count; ++j) {
                    load_row<E::kType>(value + j * row_bytes, p.head_dim_v, staged_value + j * width_v, width_v);
                }
            }
            if (dirty) zero_non_finite<E>(staged_value, E::elements(count) * width_v);
        }
        gemm<typename E::Product, Along::depth, true>(weights, E::kPaired ? keys * 2 : keys * 4, from, stride,
                                                      state_of(0) + 2, 2 + width_v, rows, width_v / kLanes,
                                                      E::elements(count));
        for (int64_t j = 0; dirty && j < count; ++j) {
            if (!row_is_finite(E::kType, value + j * row_bytes, p.head_dim_v)) add_dirty_row(value + j * row_bytes, j);
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

void decode(const Problem& p, const Sequence& sequence, const KeyChunk& chunk, char* workspace) {
    with_element(p.dtype, [&](auto element) { Decode<decltype(element)>(p, sequence, chunk, Arena(workspace)).run(); });
}

void combine(const Problem& p, const Sequence& s, int64_t kv_head, const KeyChunk* chunks, int64_t count,
             char* workspace) {
    float* out = reinterpret_cast<float*>(workspace);
    const int64_t width = round_up(p.head_dim_v, kLanes), state = 2 + width, size = size_of(p.dtype);
    for (int64_t r = 0; r < s.len_q * p.group_size; ++r) {
        const int64_t head = kv_head * p.group_size + r % p.group_size, row = r / p.group_size;
        float top = -kInfinity, sum = 0.0f;
        for (int64_t c = 0; c < count; ++c) {
            top = max_of(top, chunks[c].partial[r * state]);
            sum += chunks[c].partial[r * state + 1];
        }
        const bool empty = top == -kInfinity && sum == 0.0f;  // scores that are all NaN leave no maximum, but a sum
        if (!empty) {
            const float sink = sink_of(p, head);
            top = max_of(top, sink);
            if (top == -kInfinity) top = 0.0f;
            sum = exp2<5>(set1((sink - top) * p.score_log2()))[0];
        }
        std::memset(out, 0, static_cast<size_t>(width) * 4);
        for (int64_t c = 0; c < count && !empty; ++c) {
            const float* partial = chunks[c].partial + r * state;
            const F weight = exp2<5>(set1((partial[0] - top) * p.score_log2()));
            sum += partial[1] * weight[0];
            for (int64_t d = 0; d < width; d += kLanes) store(out + d, load(out + d) + load(partial + 2 + d) * weight);
        }
        char* to = const_cast<char*>(row_of(p.out, size, p.packed ? 0 : s.index, head, s.first_query + row));
        store_row(p.dtype, out, p.head_dim_v, empty ? 0.0f : 1.0f / sum, to);
        store_statistics(p, s, head, row, top, sum);
    }
}

}  // namespace TF_ISA
}  // namespace tf
