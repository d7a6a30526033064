// The elementwise part of the backward pass on Hopper, on transposed scores: keys along the 16 rows that a warp has of
// each product, packed query rows along its columns.
#pragma once

#include "cuda/gradients.cuh"

namespace tf {
namespace cuda {

struct alignas(16) Four {
    float x[4];
};

// What the rows of a tile bring along where scores are raw products. Of 16 rows a thread needs four (2t, 2t + 1, 8 +
// 2t, 8 + 2t + 1), which lie together.
template <int kRows>
struct alignas(16) PlainRows {
    float top[kRows], log2_sum[kRows], delta[kRows];

    TF_DEVICE void write(int row, const RowNumbers& numbers) {
        const int at = place(row);
        top[at] = numbers.top, log2_sum[at] = numbers.log2_sum, delta[at] = numbers.delta;
    }

    static TF_DEVICE int place(int row) { return row / 16 * 16 + row % 8 / 2 * 4 + row / 8 % 2 * 2 + row % 2; }
    static TF_DEVICE Four read(const float* numbers, int sixteen) {
        return *reinterpret_cast<const Four*>(numbers + sixteen * 16 + ptx::lane() % 4 * 4);
    }
};

// Which of four numbers as above element e is about, and the column it stands in without the thread's own 2t.
TF_DEVICE constexpr int four_of(int e) { return e / 4 % 2 * 2 + e % 2; }
TF_DEVICE constexpr int column_base_of(int e) { return e / 4 * 8 + e % 2; }

// The packed rows [lo, lo + count) of the sequence that see each of a thread's two keys.
struct KeyRows {
    int lo[2], count[2];
};

// `key`: the first of them; the other is 8 further.
TF_DEVICE KeyRows rows_of_keys(const Arguments& a, const DeviceSequence& s, int key) {
    KeyRows rows;
    TF_UNROLL
    for (int i = 0; i < 2; ++i) {
        const int k = key + 8 * i;
        TileRange range{0, 0, 0, 0};
        if (k >= s.mask.start && k < s.mask.end) range = rows_of(a, s, k, k);
        rows.lo[i] = static_cast<int>(range.begin);
        rows.count[i] = static_cast<int>(range.end - range.begin);
    }
    return rows;
}

// `row`: the packed row of column 0.
TF_DEVICE bool is_visible(const KeyRows& rows, int row, int e) {
    const int at = row + 2 * (ptx::lane() % 4) + column_base_of(e) - rows.lo[row_of(e)];
    return static_cast<uint32_t>(at) < static_cast<uint32_t>(rows.count[row_of(e)]);
}

template <int N>
TF_DEVICE void hide_scores(const KeyRows& rows, int row, float (&scores)[N / 2]) {
    TF_UNROLL
    for (int e = 0; e < N / 2; ++e) {
        if (!is_visible(rows, row, e)) scores[e] = -kInfinity;
    }
}

// S^T -> P^T, in place; the columns are rows `row` and up of the table.
template <int N, int kRows>
TF_DEVICE void plain_probabilities(const PlainRows<kRows>& table, int row, float factor, float (&scores)[N / 2]) {
    TF_UNROLL
    for (int i = 0; i < N / 16; ++i) {
        const Four top = PlainRows<kRows>::read(table.top, row / 16 + i);
        const Four log2_sum = PlainRows<kRows>::read(table.log2_sum, row / 16 + i);
        TF_UNROLL
        for (int e = 8 * i; e < 8 * i + 8; ++e) {
            scores[e] = probability(scores[e], top.x[four_of(e)], log2_sum.x[four_of(e)], factor);
        }
    }
}

// dP^T -> dS^T, in place. What is hidden has a probability of 0, and gets 0 whatever its dP is. `p(e)` is P^T.
template <int N, int kRows, class Probability>
TF_DEVICE void plain_gradients(const PlainRows<kRows>& table, int row, bool masked, Probability&& p,
                               float (&dp)[N / 2]) {
    if (masked) {
        TF_UNROLL
        for (int e = 0; e < N / 2; ++e) dp[e] = p(e) == 0.0f ? 0.0f : dp[e];
    }
    TF_UNROLL
    for (int i = 0; i < N / 16; ++i) {
        const Four delta = PlainRows<kRows>::read(table.delta, row / 16 + i);
        TF_UNROLL
        for (int e = 8 * i; e < 8 * i + 8; ++e) dp[e] = p(e) * (dp[e] - delta.x[four_of(e)]);
    }
}

// ------------------------------------------------------------------------------------------ where something changes
// scores

// What the rows of a tile bring along then: besides, where they begin in the bias and in its gradient, in elements.
template <int kRows>
struct ModifiedRows : RowTable<kRows> {
    int64_t bias[kRows], dbias[kRows];
    float slope[kRows];
};
template <int kRows>
TF_DEVICE void write_modified_row(const Arguments& a, const DeviceSequence& s, ModifiedRows<kRows>& table, int row,
                                  int head, int position, bool inside, const RowNumbers& numbers) {
    const Problem& p = a.problem;
    write_row(table, row, s, head, position, inside, numbers);
    table.bias[row] = inside ? s.index * p.bias.batch + head * p.bias.head + position * p.bias.row : 0;
    table.dbias[row] = s.index * p.dbias_batch + head * p.dbias_head + position * p.dbias_row;
    table.slope[row] = inside && p.alibi_slopes != nullptr ? alibi_slope(p, s, head) : 0.0f;
}

// Where the elements of a warp's 16 keys by N rows are. `row`, in the table, is column 0.
template <int kRows>
struct ElementPlaces {
    const ModifiedRows<kRows>& table;
    int row, key;

    TF_DEVICE int row_at(int e) const { return row + 2 * (ptx::lane() % 4) + column_base_of(e); }
    TF_DEVICE int key_at(int e) const { return key + ptx::lane() / 4 + 8 * row_of(e); }
};

template <class T, int N, int kRows>
TF_DEVICE void add_bias(const Problem& p, const DeviceSequence& s, const ElementPlaces<kRows>& at,
                        float (&scores)[N / 2]) {
    const T* const bias = reinterpret_cast<const T*>(p.bias.data);
    const int last = s.len_k - 1;  // what is read for a key beyond is hidden later
    const int64_t along[2] = {min_of(at.key_at(0), last) * p.bias.key, min_of(at.key_at(2), last) * p.bias.key};
    TF_UNROLL
    for (int e = 0; e < N / 2; ++e) {
        if (e % 8 == 0) ptx::hold_back();  // more reads on their way at once would take more registers than there are
        scores[e] = biased_score(scores[e], bias_value(bias[at.table.bias[at.row_at(e)] + along[row_of(e)]]));
    }
}

// S^T -> scores, in place, as modified_score has them. The softcap's derivatives, in pairs, go to `keep(e / 2, pair)`:
// they are at most 1, and half precision will do for what is rounded to half precision in the end.
template <int N, int kRows, class Keep>
TF_DEVICE void modify_transposed(const Arguments& a, const DeviceSequence& s, const ElementPlaces<kRows>& at,
                                 Keep&& keep, float (&scores)[N / 2]) {
    const Problem& p = a.problem;
    if (p.softcap != 0.0f) {
        const float inverse = ptx::reciprocal(p.softcap);
        TF_UNROLL
        for (int e = 0; e < N / 2; e += 2) {
            float slope[2];
            TF_UNROLL
            for (int i = 0; i < 2; ++i) {
                scores[e + i] = capped_score(p, scores[e + i]);
                const float t = scores[e + i] * inverse;
                slope[i] = 1.0f - t * t;
            }
            keep(e / 2, ptx::pack<Float16>(slope[0], slope[1]));
        }
    } else {
        TF_UNROLL
        for (int e = 0; e < N / 2; ++e) scores[e] *= p.softmax_scale;
    }
    if (p.bias.data != nullptr) {
        switch (p.bias.dtype) {
            case DType::boolean:
                add_bias<uint8_t, N>(p, s, at, scores);
                break;
            case DType::f32:
                add_bias<float, N>(p, s, at, scores);
                break;
            case DType::bf16:
                add_bias<Bfloat16, N>(p, s, at, scores);
                break;
            case DType::f16:
                add_bias<Float16, N>(p, s, at, scores);
                break;
        }
    }
    if (p.alibi_slopes != nullptr) {
        TF_UNROLL
        for (int e = 0; e < N / 2; ++e) {
            const int row = at.row_at(e), distance = at.table.position[row] + s.offset() - at.key_at(e);
            scores[e] = alibi_score(scores[e], at.table.slope[row], distance);
        }
    }
    if (s.holes) {
        const bool hole[2] = {key_is_hole(p, s, at.key_at(0)), key_is_hole(p, s, at.key_at(2))};
        TF_UNROLL
        for (int e = 0; e < N / 2; ++e) {
            if (hole[row_of(e)]) scores[e] = -kInfinity;
        }
    }
}

// A bit for each element: whether dropout keeps it.
template <int N>
struct KeptBits {
    uint32_t word[(N / 2 + 31) / 32];
    TF_DEVICE bool operator()(int e) const { return (word[e / 32] >> (e % 32) & 1u) != 0; }
};

// S^T -> P^T as it met the values, packed, and in place what dP^T - delta is multiplied by. `scratch(i)` is where a
// thread may keep N / 4 words meanwhile.
template <class E, int N, int kRows, class Scratch>
TF_DEVICE KeptBits<N> modified_probabilities(const Arguments& a, const DeviceSequence& s,
                                             const ElementPlaces<kRows>& at, bool masked, Scratch&& scratch,
                                             float (&scores)[N / 2], uint32_t (&packed)[N / 16][4]) {
    modify_transposed<N>(a, s, at, [&](int i, uint32_t slopes) { scratch(i) = slopes; }, scores);
    if (masked) {
        TF_UNROLL
        for (int e = 0; e < N / 2; ++e) {
            const int row = at.row_at(e), key = at.key_at(e);
            if (key < at.table.lo[row] || key >= at.table.hi[row]) scores[e] = -kInfinity;
        }
    }
    TF_UNROLL
    for (int e = 0; e < N / 2; ++e) {
        const int row = at.row_at(e);
        scores[e] = probability(scores[e], at.table.top[row], at.table.log2_sum[row], kLog2E);
    }
    KeptBits<N> kept{};
    if (a.seed != nullptr) {
        const uint64_t seed = static_cast<uint64_t>(*a.seed);
        TF_UNROLL
        for (int j = 0; j < N / 8; ++j) {
            kept.word[j / 8] |= kept_of_keys(a, seed, s, at.table, at.row + 8 * j, at.key) << (j % 8 * 4);
        }
        TF_UNROLL
        for (int e = 0; e < N / 2; e += 2) {
            packed[e / 8][e / 2 % 4] = ptx::pack<E>(kept(e) ? scores[e] * a.dropout_keep : 0.0f,
                                                    kept(e + 1) ? scores[e + 1] * a.dropout_keep : 0.0f);
        }
    } else {
        pack_rows<E, N>(scores, packed);
    }
    if (a.problem.softcap != 0.0f) {
        TF_UNROLL
        for (int e = 0; e < N / 2; e += 2) {
            const uint32_t slopes = scratch(e / 2);
            scores[e] *= low_of<Float16>(slopes);
            scores[e + 1] *= high_of<Float16>(slopes);
        }
    }
    return kept;
}

template <int N, int kRows>
TF_DEVICE void add_to_dbias(const Problem& p, const ElementPlaces<kRows>& at, const float (&gradients)[N / 2]) {
    TF_UNROLL
    for (int r = 0; r < 2; ++r) {
        float* const dbias = p.dbias + at.key_at(2 * r) * p.dbias_key;
        TF_UNROLL
        for (int e = 0; e < N / 2; ++e) {
            if (row_of(e) == r && gradients[e] != 0.0f) {
                ptx::atomic_add(dbias + at.table.dbias[at.row_at(e)], gradients[e]);
            }
        }
    }
}

// dP^T -> dS^T, in place. With a softcap there is no gradient of a bias.
template <int N, int kRows>
TF_DEVICE void modified_gradients(const Arguments& a, const ElementPlaces<kRows>& at, const KeptBits<N>& kept,
                                  const float (&weights)[N / 2], float (&dp)[N / 2]) {
    if (a.seed != nullptr) {
        TF_UNROLL
        for (int e = 0; e < N / 2; ++e) dp[e] *= kept(e) ? a.dropout_keep : 0.0f;
    }
    TF_UNROLL
    for (int e = 0; e < N / 2; ++e) {
        dp[e] = weights[e] == 0.0f ? 0.0f : weights[e] * (dp[e] - at.table.delta[at.row_at(e)]);
    }
    if (a.problem.dbias != nullptr) add_to_dbias<N>(a.problem, at, dp);
}

}  // namespace cuda
}  // namespace tf
