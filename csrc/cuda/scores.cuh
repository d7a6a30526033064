// From products q . k to scores, element by element, and the dropout of probabilities.
#pragma once

#include "core/philox.h"
#include "cuda/tile.cuh"

namespace tf {
namespace cuda {

constexpr float kLog2E = 1.4426950408889634f;

// tanh to a relative error of 1e-6: scores far below a softcap stay what they were. Where the exponentials cancel, its
// series to x^9.
TF_DEVICE float tanh(float x) {
    const float u = x * x;
    const float series = x + x * u * (-1.0f / 3 + u * (2.0f / 15 + u * (-17.0f / 315 + u * (62.0f / 2835))));
    return u < 0.0625f ? series : 1.0f - 2.0f * ptx::reciprocal(1.0f + ptx::exp2(x * (2.0f * kLog2E)));
}

// A score as the softcap left it (backward wants to know that), and in the end.
struct Score {
    float capped, value;
};

// The steps from a product q . k to a score, in natural units and in this order. softmax.cuh takes them for whole
// fragments.
TF_DEVICE float capped_score(const Problem& p, float product) {
    const float x = product * p.softmax_scale;
    return p.softcap != 0.0f ? p.softcap * tanh(x * ptx::reciprocal(p.softcap)) : x;
}

TF_DEVICE float bias_value(float b) { return b; }
TF_DEVICE float bias_value(Bfloat16 b) { return ptx::to_float(b); }
TF_DEVICE float bias_value(Float16 b) { return ptx::to_float(b); }
TF_DEVICE float bias_value(uint8_t shown) { return shown != 0 ? 0.0f : -kInfinity; }
// Where a row of the bias begins.
template <class T>
TF_DEVICE const T* bias_row(const Problem& p, const DeviceSequence& s, int head, int position) {
    const int64_t at = s.index * p.bias.batch + head * p.bias.head + position * p.bias.row;
    return reinterpret_cast<const T*>(p.bias.data) + at;
}
TF_DEVICE float biased_score(float x, float bias) { return bias == -kInfinity ? bias : x + bias; }  // x may be NaN

TF_DEVICE float alibi_slope(const Problem& p, const DeviceSequence& s, int head) {
    return p.alibi_slopes[s.index * p.alibi_batch + head * p.alibi_head];
}
TF_DEVICE float alibi_score(float x, float slope, int distance) {
    return x - slope * static_cast<float>(distance < 0 ? -distance : distance);
}

TF_DEVICE bool key_is_hole(const Problem& p, const DeviceSequence& s, int key) {
    return key >= s.len_k || p.key_mask[s.index * p.key_mask_batch + key * p.key_mask_key] == 0;
}

// The score of one (row, key) pair that the interval shows; natural units. For kernels whose scores something changes
// (Problem::modifies_scores, a boolean bias, or holes in the key padding); all others keep raw products.
// `key` may lie beyond the sequence or be hidden, never beyond seqlen_k's block: what is read is checked here.
TF_DEVICE Score modified_score(const Arguments& a, const DeviceSequence& s, int head, int position, int key,
                               float product) {
    const Problem& p = a.problem;
    const float capped = capped_score(p, product);
    const bool inside = position < s.len_q && key < s.len_k;
    float x = capped;
    if (p.bias.data != nullptr) {
        float b = -kInfinity;
        if (!inside) {
        } else if (p.bias.dtype == DType::boolean) {
            b = bias_value(bias_row<uint8_t>(p, s, head, position)[key * p.bias.key]);
        } else if (p.bias.dtype == DType::f32) {
            b = bias_value(bias_row<float>(p, s, head, position)[key * p.bias.key]);
        } else if (p.bias.dtype == DType::bf16) {
            b = bias_value(bias_row<Bfloat16>(p, s, head, position)[key * p.bias.key]);
        } else {
            b = bias_value(bias_row<Float16>(p, s, head, position)[key * p.bias.key]);
        }
        x = biased_score(x, b);
    }
    if (p.alibi_slopes != nullptr) x = alibi_score(x, alibi_slope(p, s, head), position + s.offset() - key);
    if (s.holes && (!inside || key_is_hole(p, s, key))) x = -kInfinity;
    return {capped, x};
}

// From a difference of scores to a power of 2.
TF_DEVICE float base2_factor(const Arguments& a, bool modified) {
    return modified ? kLog2E : a.problem.softmax_scale * kLog2E;
}

// exp2((score - top) * factor); `top` is finite. One multiply-add spares the subtraction, with the error of top *
// factor: infinite for scores near -FLT_MAX, as a bias makes them, and too large beyond kLargeExponent.
template <bool kSubtractFirst>
TF_DEVICE float exponential(float score, float top, float factor) {
    if constexpr (kSubtractFirst) return ptx::exp2((score - top) * factor);
    return ptx::exp2(__builtin_fmaf(score, factor, -(top * factor)));
}
constexpr float kLargeExponent = 4194304.0f;  // 2^22: exponents are off by up to 1/4, all of a row by the same

// The factors of dropout for keys `key` and `key + 1`; `key` is even. 0, or 1 / (1 - dropout_p).
struct DropoutPair {
    float first, second;
};
TF_DEVICE DropoutPair dropout_pair(const Arguments& a, uint64_t seed, const DeviceSequence& s, int head, int position,
                                   int key) {
    const Philox4 draw = philox(seed, static_cast<uint32_t>(key / 4), static_cast<uint32_t>(position),
                                static_cast<uint32_t>(head), static_cast<uint32_t>(s.index));
    const bool upper = key % 4 != 0;
    const uint32_t first = upper ? draw.word[2] : draw.word[0], second = upper ? draw.word[3] : draw.word[1];
    return {first >= a.dropout_threshold ? a.dropout_keep : 0.0f,
            second >= a.dropout_threshold ? a.dropout_keep : 0.0f};
}
TF_DEVICE float dropout_factor(const Arguments& a, uint64_t seed, const DeviceSequence& s, int head, int position,
                               int key) {
    const DropoutPair pair = dropout_pair(a, seed, s, head, position, key & ~1);
    return key % 2 != 0 ? pair.second : pair.first;
}

}  // namespace cuda
}  // namespace tf
