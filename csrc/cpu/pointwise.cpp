// What stands around the products of a model: each in one pass over memory, in float32 whatever the type.
#include <cmath>

#include "activations.h"
#include "kernels.h"

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
