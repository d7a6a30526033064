// What stands around the products of a model: each in one pass over memory, in float32 whatever the type.
#include <cmath>

#include "activations.h"
#include "kernels.h"
#include "reduce.h"

namespace tf {
namespace TF_ISA {
namespace {

template <DType kType>
void norm_row(const Pointwise& p, const char* x, char* out) {
    constexpr int64_t kSize = size_of(kType);
    F squares = zero();
    for_each_vector(p.columns, [&](int64_t i, auto count) TF_INLINE_LAMBDA {
        const F value = load_some<kType>(x + i * kSize, count);
        squares += value * value;
    });
    float sum = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) sum += squares[lane];
    const float inverse = 1.0f / std::sqrt(sum / static_cast<float>(p.columns) + p.eps);
    for_each_vector(p.columns, [&](int64_t i, auto count) TF_INLINE_LAMBDA {
        const F gain = load_some<kType>(p.weight + i * kSize, count) + p.gain_offset;
        store_some<kType>(out + i * kSize, load_some<kType>(x + i * kSize, count) * inverse * gain, count);
    });
}

template <DType kType, class Activation>
void gate_row(int64_t columns, const char* gate, const char* value, char* out, Activation activation) {
    constexpr int64_t kSize = size_of(kType);
    for_each_vector(columns, [&](int64_t i, auto count) TF_INLINE_LAMBDA {
        const F x = load_some<kType>(gate + i * kSize, count);
        store_some<kType>(out + i * kSize, activation(x) * load_some<kType>(value + i * kSize, count), count);
    });
}

// The halves of a head turned against each other, by the angle of each place in a half.
template <DType kType>
void rotate_row(int64_t half, const char* x, const char* cos, const char* sin, char* out) {
    constexpr int64_t kSize = size_of(kType);
    for_each_vector(half, [&](int64_t i, auto count) TF_INLINE_LAMBDA {
        const F first = load_some<kType>(x + i * kSize, count), c = load_some<kType>(cos + i * kSize, count);
        const F second = load_some<kType>(x + (half + i) * kSize, count), s = load_some<kType>(sin + i * kSize, count);
        store_some<kType>(out + i * kSize, first * c - second * s, count);
        store_some<kType>(out + (half + i) * kSize, second * c + first * s, count);
    });
}

template <DType kType>
void gelu_gradient_row(int64_t columns, const char* x, const char* dy, char* out) {
    constexpr int64_t kSize = size_of(kType);
    for_each_vector(columns, [&](int64_t i, auto count) TF_INLINE_LAMBDA {
        const F slope = gelu_tanh_slope(load_some<kType>(x + i * kSize, count));
        store_some<kType>(out + i * kSize, slope * load_some<kType>(dy + i * kSize, count), count);
    });
}

// Logits, and past the last one what has no probability.
template <DType kType, class Count>
TF_INLINE F load_logits(const char* from, Count count) {
    F x = load_some<kType>(from, count);
    for (int i = count; i < kLanes; ++i) x[i] = -kInfinity;
    return x;
}
TF_INLINE F exp_below(F x, float top) { return exp2<5>((x - top) * kLog2E); }

// A row is read twice: the second time from the level-2 cache, if it is no longer than that.
template <DType kType>
void cross_entropy_row(const Pointwise& p, int64_t r, const char* x) {
    constexpr int64_t kSize = size_of(kType), kRun = 4096;  // terms that are summed up in float32
    const CrossEntropy& c = p.loss;
    F tops = set1(-kInfinity);
    for_each_vector(p.columns, [&](int64_t i, auto count) TF_INLINE_LAMBDA {
        tops = maximum(load_logits<kType>(x + i * kSize, count), tops);
    });
    const float top = largest(tops);
    double total = 0.0;
    for (int64_t begin = 0; begin < p.columns; begin += kRun) {
        F sum = zero();
        for_each_vector(min_of(kRun, p.columns - begin), [&](int64_t i, auto count) TF_INLINE_LAMBDA {
            sum += exp_below(load_logits<kType>(x + (begin + i) * kSize, count), top);
        });
        total += sum_of(sum);
    }
    const int64_t label = c.label[r];
    const bool counts = label != c.ignored;
    c.top[r] = top, c.inverse[r] = static_cast<float>(1.0 / total);
    const double terms = total / exp_below(set1(top), top)[0];  // of which the largest is a last place below 1
    c.loss[r] = counts ? static_cast<float>(std::log(terms) - (scalar_at(kType, x + label * kSize) - top)) : 0.0f;
}

// scale * (probabilities - 1 at the label).
template <DType kType>
void cross_entropy_gradient_row(const Pointwise& p, int64_t r, const char* x, char* out) {
    constexpr int64_t kSize = size_of(kType);
    const CrossEntropy& c = p.loss;
    const int64_t label = c.label[r];
    if (label == c.ignored) {
        std::memset(out, 0, p.columns * kSize);
        return;
    }
    const float top = c.top[r], inverse = c.inverse[r];
    for_each_vector(p.columns, [&](int64_t i, auto count) TF_INLINE_LAMBDA {
        const F e = exp_below(load_some<kType>(x + i * kSize, count), top);
        store_some<kType>(out + i * kSize, e * inverse * c.scale, count);
    });
    const float e = exp_below(set1(scalar_at(kType, x + label * kSize)), top)[0];
    const float at_label = (e * inverse - 1.0f) * c.scale;
    store_row<kType>(&at_label, 1, 1.0f, out + label * kSize);
}

template <DType kType, class Activation>
void activated_row(int64_t columns, const char* x, char* out, Activation activation) {
    constexpr int64_t kSize = size_of(kType);
    for_each_vector(columns, [&](int64_t i, auto count) TF_INLINE_LAMBDA {
        store_some<kType>(out + i * kSize, activation(load_some<kType>(x + i * kSize, count)), count);
    });
}

template <DType kType>
void row(const Pointwise& p, int64_t r) {
    constexpr int64_t kSize = size_of(kType);
    constexpr bool kCoarse = kType == DType::bf16;
    const char *x = p.x + r * p.x_row * kSize, *y = p.y + r * p.y_row * kSize;
    char* out = p.out + r * p.columns * kSize;
    switch (p.what) {
        case Pointwise::rms_norm:
            return norm_row<kType>(p, x, out);
        case Pointwise::gate_silu:
            return gate_row<kType>(p.columns, x, y, out, [](F v) TF_INLINE_LAMBDA { return silu<kCoarse>(v); });
        case Pointwise::gate_gelu_tanh:
            return gate_row<kType>(p.columns, x, y, out, [](F v) TF_INLINE_LAMBDA { return gelu_tanh<kCoarse>(v); });
        case Pointwise::rotate:
            for (int64_t h = 0; h < p.heads; ++h) {
                const int64_t place = h * (p.columns / p.heads);
                rotate_row<kType>(p.columns / p.heads / 2, x + h * p.x_head * kSize, y, p.weight + r * p.y_row * kSize,
                                  out + place * kSize);
            }
            return;
        case Pointwise::gelu_tanh:
            return activated_row<kType>(p.columns, x, out, [](F v) TF_INLINE_LAMBDA { return gelu_tanh<kCoarse>(v); });
        case Pointwise::gelu_tanh_gradient:
            return gelu_gradient_row<kType>(p.columns, x, y, out);
        case Pointwise::cross_entropy:
            return cross_entropy_row<kType>(p, r, x);
        case Pointwise::cross_entropy_gradient:
            return cross_entropy_gradient_row<kType>(p, r, x, out);
    }
}

}  // namespace

void pointwise(const Pointwise& p, int64_t first, int64_t last) {
    with_number_type(p.dtype, [&](auto type) {
        for (int64_t r = first; r < last; ++r) row<type()>(p, r);
    });
}

}  // namespace TF_ISA
}  // namespace tf
