// Online softmax on accumulators of matrix products (Milakov & Gimelshein 2018; Dao et al. 2022).
//
// mma and wgmma spread their results alike: of 16 rows by N columns, a thread with g = lane / 4 and t = lane % 4 holds
// s[4j + 0, 1] = (row g, columns 8j + 2t, 8j + 2t + 1) and s[4j + 2, 3] = (row g + 8, the same columns). So element e
// of the array belongs to row (e / 2) % 2 of the thread's two and to column column_of(e).
#pragma once

#include "cuda/scores.cuh"

namespace tf {
namespace cuda {

TF_DEVICE int column_of(int element) { return element / 4 * 8 + ptx::lane() % 4 * 2 + element % 2; }
TF_DEVICE constexpr int row_of(int element) { return element / 2 % 2; }

// The two rows of a tile that a thread holds parts of, and the keys [lo, hi) they see (none for rows not there).
struct ThreadRows {
    int position[2], head[2], lo[2], hi[2];
    bool inside[2];
};

// `row`: the first of them in the tile, 16 * (warp's number among the rows) + lane / 4; the other is 8 further.
TF_DEVICE ThreadRows thread_rows(const DeviceSequence& s, const PackedRows& rows, int row) {
    ThreadRows r;
    TF_UNROLL
    for (int i = 0; i < 2; ++i) {
        r.inside[i] = rows.has(row + 8 * i);
        r.position[i] = rows.position(row + 8 * i);
        r.head[i] = rows.head(row + 8 * i);
        const Interval keys = row_interval(s.mask, r.position[i]);
        r.lo[i] = static_cast<int>(keys.lo);
        r.hi[i] = r.inside[i] ? static_cast<int>(keys.hi) : r.lo[i];
    }
    return r;
}

template <class T, int N>
TF_DEVICE void add_bias(const Problem& p, const DeviceSequence& s, const ThreadRows& rows, int n,
                        float (&scores)[N / 2]) {
    const int first = n + column_of(0), step = static_cast<int>(p.bias.key);
    TF_UNROLL
    for (int r = 0; r < 2; ++r) {
        // Found anew for each block, since addresses of all rows would fill registers.
        const T* bias =
            bias_row<T>(p, s, ptx::forget(rows.head[r]), rows.position[r]) + static_cast<int64_t>(first) * step;
        const int stop = rows.position[r] < s.len_q ? s.len_k - first : 0;  // columns that are there
        TF_UNROLL
        for (int e = 2 * r; e < N / 2; e += 4) {
            TF_UNROLL
            for (int i = 0; i < 2; ++i) {
                const int column = e / 4 * 8 + i;
                const float b = column < stop ? bias_value(bias[static_cast<int64_t>(step) * column]) : -kInfinity;
                scores[e + i] = biased_score(scores[e + i], b);
            }
        }
    }
}

// Products -> scores as the softcap leaves them, in place.
template <int N>
TF_DEVICE void cap_scores(const Problem& p, float (&scores)[N / 2]) {
    if (p.softcap != 0.0f) {
        TF_UNROLL
        for (int e = 0; e < N / 2; ++e) scores[e] = capped_score(p, scores[e]);
    } else {
        TF_UNROLL
        for (int e = 0; e < N / 2; ++e) scores[e] *= p.softmax_scale;
    }
}

// Scores of a block of keys from `n` on, in place: after cap_scores `modified_score` of each, but each step for all of
// them, so that what the problem has is asked once and reads of memory overlap.
template <int N>
TF_DEVICE void modify_capped(const Arguments& a, const DeviceSequence& s, const ThreadRows& rows, int n,
                             float (&scores)[N / 2]) {
    const Problem& p = a.problem;
    if (p.bias.data != nullptr) {
        switch (p.bias.dtype) {
            case DType::boolean:
                add_bias<uint8_t, N>(p, s, rows, n, scores);
                break;
            case DType::f32:
                add_bias<float, N>(p, s, rows, n, scores);
                break;
            case DType::bf16:
                add_bias<Bfloat16, N>(p, s, rows, n, scores);
                break;
            case DType::f16:
                add_bias<Float16, N>(p, s, rows, n, scores);
                break;
        }
    }
    if (p.alibi_slopes != nullptr) {
        TF_UNROLL
        for (int r = 0; r < 2; ++r) {
            const float slope = rows.inside[r] ? alibi_slope(p, s, rows.head[r]) : 0.0f;
            const int distance = rows.position[r] + s.offset() - n - column_of(0);
            TF_UNROLL
            for (int e = 2 * r; e < N / 2; e += 4) {
                scores[e] = alibi_score(scores[e], slope, distance - e / 4 * 8);
                scores[e + 1] = alibi_score(scores[e + 1], slope, distance - e / 4 * 8 - 1);
            }
        }
    }
    if (s.holes) {
        TF_UNROLL
        for (int e = 0; e < N / 2; ++e) {
            if (e % 4 < 2 && key_is_hole(p, s, n + column_of(e))) scores[e] = scores[e + 2] = -kInfinity;
        }
    }
}
template <int N>
TF_DEVICE void modify_scores(const Arguments& a, const DeviceSequence& s, const ThreadRows& rows, int n,
                             float (&scores)[N / 2]) {
    cap_scores<N>(a.problem, scores);
    modify_capped<N>(a, s, rows, n, scores);
}

template <int N>
TF_DEVICE void mask_scores(const ThreadRows& rows, int n, float (&scores)[N / 2]) {
    const int first = n + column_of(0);  // the others lie where the compiler knows from there
    const int lo[2] = {rows.lo[0] - first, rows.lo[1] - first}, hi[2] = {rows.hi[0] - first, rows.hi[1] - first};
    TF_UNROLL
    for (int e = 0; e < N / 2; ++e) {
        const int column = e / 4 * 8 + e % 2, r = row_of(e);
        if (column < lo[r] || column >= hi[r]) scores[e] = -kInfinity;
    }
}

// The maximum and the sum of a thread's two rows. `top` is the same in the four threads of a row; `total` is a thread's
// own share until `join_total`.
struct SoftmaxState {
    float top[2] = {-kInfinity, -kInfinity}, total[2] = {0.0f, 0.0f};
};

TF_DEVICE float quad_max(float x) {
    x = __builtin_fmaxf(x, ptx::shuffle_xor(x, 1));
    return __builtin_fmaxf(x, ptx::shuffle_xor(x, 2));
}
TF_DEVICE float quad_sum(float x) {
    x += ptx::shuffle_xor(x, 1);
    return x + ptx::shuffle_xor(x, 2);
}

TF_DEVICE bool is_large(float exponent) { return exponent > kLargeExponent || exponent < -kLargeExponent; }

// Scores -> exponentials relative to the new maximum, in place. What was summed up before has to be multiplied by
// `shrink`, row by row.
template <int N, bool kSubtractFirst>
TF_DEVICE void softmax_step(float (&scores)[N / 2], SoftmaxState& state, float factor, float (&shrink)[2]) {
    float fresh[2] = {state.top[0], state.top[1]};
    TF_UNROLL
    for (int e = 0; e < N / 2; ++e) fresh[row_of(e)] = __builtin_fmaxf(fresh[row_of(e)], scores[e]);
    TF_UNROLL
    for (int r = 0; r < 2; ++r) {
        fresh[r] = quad_max(fresh[r]);
        const float limit = fresh[r] == -kInfinity ? 0.0f : fresh[r];
        shrink[r] = ptx::exp2((state.top[r] - limit) * factor);
        state.top[r] = fresh[r];
        state.total[r] *= shrink[r];
        fresh[r] = limit;
    }
    if (!kSubtractFirst && ptx::any(is_large(fresh[0] * factor) || is_large(fresh[1] * factor))) {
        TF_UNROLL
        for (int e = 0; e < N / 2; ++e) scores[e] -= fresh[row_of(e)];
        fresh[0] = fresh[1] = 0.0f;
    }
    TF_UNROLL
    for (int e = 0; e < N / 2; ++e) {
        scores[e] = exponential<kSubtractFirst>(scores[e], fresh[row_of(e)], factor);
        state.total[row_of(e)] += scores[e];
    }
}

// Probabilities that dropout keeps, in place; `n` is a multiple of 4.
template <int N>
TF_DEVICE void drop(const Arguments& a, uint64_t seed, const DeviceSequence& s, const ThreadRows& rows, int n,
                    float (&p)[N / 2]) {
    TF_UNROLL
    for (int e = 0; e < N / 2; e += 2) {
        const int r = row_of(e);
        const DropoutPair factors = dropout_pair(a, seed, s, rows.head[r], rows.position[r], n + column_of(e));
        p[e] *= factors.first;
        p[e + 1] *= factors.second;
    }
}

// The same numbers as the A operand of a product over these columns: a[k] is the fragment of columns 16k..16k+15.
template <class E, int N>
TF_DEVICE void pack_rows(const float (&p)[N / 2], uint32_t (&a)[N / 16][4]) {
    TF_UNROLL
    for (int k = 0; k < N / 16; ++k) {
        TF_UNROLL
        for (int i = 0; i < 4; ++i) a[k][i] = ptx::pack<E>(p[8 * k + 2 * i], p[8 * k + 2 * i + 1]);
    }
}

template <int N>
TF_DEVICE void scale_rows(float (&x)[N / 2], const float (&factor)[2]) {
    TF_UNROLL
    for (int e = 0; e < N / 2; ++e) x[e] *= factor[row_of(e)];
}

// What becomes of a row when all its keys are done.
struct RowEnd {
    float scale;               // of the sums; 0 for a row that saw nothing
    float lse, top, log2_sum;  // what is stored: natural lse; the maximum in score units; log2 of the sum
    bool empty;
};

// The sink joins the sum. `total` is the whole row's.
TF_DEVICE RowEnd finish_row(const Arguments& a, float top, float total, int head, bool inside, float factor) {
    const Problem& p = a.problem;
    RowEnd end{};
    end.empty = top == -kInfinity && total == 0.0f;  // scores that are all NaN leave no maximum, but a sum
    float shrink = 1.0f;
    if (p.sinks != nullptr && inside) {
        const int64_t at = head * p.sinks_stride;
        const float sink = p.sinks_dtype == DType::f32 ? reinterpret_cast<const float*>(p.sinks)[at]
                           : p.sinks_dtype == DType::bf16
                               ? ptx::to_float(reinterpret_cast<const Bfloat16*>(p.sinks)[at])
                               : ptx::to_float(reinterpret_cast<const Float16*>(p.sinks)[at]);
        const float fresh = __builtin_fmaxf(top, sink), limit = fresh == -kInfinity ? 0.0f : fresh;
        shrink = ptx::exp2((top - limit) * factor);
        total = total * shrink + ptx::exp2((sink - limit) * factor);
        top = fresh;
    }
    if (end.empty) {
        end.lse = -kInfinity;
        return end;
    }
    const float limit = top == -kInfinity ? 0.0f : top;
    end.log2_sum = ptx::log2(total);
    end.scale = shrink / total;
    end.top = limit;
    end.lse = limit * (factor / kLog2E) + end.log2_sum * (1.0f / kLog2E);
    return end;
}

// lse and stats of one row; `row` counts from the sequence's first.
TF_DEVICE void store_row_numbers(const Arguments& a, const DeviceSequence& s, int head, int row, const RowEnd& end) {
    const Problem& p = a.problem;
    const int64_t at = p.lse_index(s.index, head, s.first_query, row);
    if (p.lse != nullptr) p.lse[at] = end.lse;
    if (p.stats != nullptr) {
        p.stats[at] = end.top;
        p.stats[at + p.num_heads * p.total_q] = end.log2_sum;
    }
}

}  // namespace cuda
}  // namespace tf
