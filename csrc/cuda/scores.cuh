// From products q . k to scores, element by element, and the dropout of probabilities.
#pragma once

#include "core/philox.h"
#include "cuda/tile.cuh"

namespace tf {
namespace cuda {

constexpr float kLog2E = 1.4426950408889634f;

// tanh by exp2 where that keeps its accuracy, by its series near 0.
TF_DEVICE float tanh(float x) {
    const float magnitude = x < 0.0f ? -x : x, x2 = x * x;
    const float e = ptx::exp2(magnitude * (-2.0f * kLog2E));
    const float t = (1.0f - e) / (1.0f + e);
    const float series =
        x * (1.0f +
             x2 * (-1.0f / 3 + x2 * (2.0f / 15 + x2 * (-17.0f / 315 + x2 * (62.0f / 2835 - x2 * (1382.0f / 155925))))));
    return x2 < 0.09f ? series : x < 0.0f ? -t : t;
}

// A score as the softcap left it (backward wants to know that), and in the end.
struct Score {
    float capped, value;
};

// The score of one (row, key) pair that the interval shows; natural units. For kernels whose scores something changes
// (Problem::modifies_scores, a boolean bias, or holes in the key padding); all others keep raw products.
// `key` may lie beyond the sequence or be hidden, never beyond seqlen_k's block: what is read is checked here.
TF_DEVICE Score modified_score(const Arguments& a, const DeviceSequence& s, int head, int position, int key,
                               float product) {
    const Problem& p = a.problem;
    float x = product * p.softmax_scale;
    if (p.softcap != 0.0f) x = p.softcap * tanh(x / p.softcap);
    const float capped = x;
    const bool inside = position < s.len_q && key < s.len_k;
    if (p.bias.data != nullptr) {
        const int64_t at = s.index * p.bias.batch + head * p.bias.head + position * p.bias.row + key * p.bias.key;
        float b = -kInfinity;
        if (!inside) {
        } else if (p.bias.dtype == DType::boolean) {
            b = p.bias.data[at] != 0 ? 0.0f : -kInfinity;
        } else if (p.bias.dtype == DType::f32) {
            b = reinterpret_cast<const float*>(p.bias.data)[at];
        } else if (p.bias.dtype == DType::bf16) {
            b = ptx::to_float(reinterpret_cast<const Bfloat16*>(p.bias.data)[at]);
        } else {
            b = ptx::to_float(reinterpret_cast<const Float16*>(p.bias.data)[at]);
        }
        x = b == -kInfinity ? b : x + b;  // a hidden key's product may be NaN
    }
    if (p.alibi_slopes != nullptr) {
        const int distance = position + s.offset() - key;
        x -= p.alibi_slopes[s.index * p.alibi_batch + head * p.alibi_head] *
             static_cast<float>(distance < 0 ? -distance : distance);
    }
    if (s.holes && (!inside || p.key_mask[s.index * p.key_mask_batch + key * p.key_mask_key] == 0)) x = -kInfinity;
    return {capped, x};
}

// From a difference of scores to a power of 2.
TF_DEVICE float base2_factor(const Arguments& a, bool modified) {
    return modified ? kLog2E : a.problem.softmax_scale * kLog2E;
}

// exp2((score - top) * factor); `top` is finite. Raw products take one multiply-add, whose error is that of
// top * factor: infinite for scores near -FLT_MAX, as a bias makes them.
template <bool kModified>
TF_DEVICE float exponential(float score, float top, float factor) {
    if constexpr (kModified) return ptx::exp2((score - top) * factor);
    return ptx::exp2(score * factor - top * factor);
}

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
