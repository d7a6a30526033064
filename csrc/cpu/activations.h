// Activations, and vectors of a row's end, for kernels whose lanes run along a row.
#pragma once

#include "pack.h"

namespace tf {
namespace TF_ISA {
namespace {

// Calls fn(place, floats there) for whole vectors of a row, and at its end with some lanes: `count` of kLanes.
template <class Fn>
TF_INLINE void for_each_vector(int64_t columns, Fn&& fn) {
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) fn(i, std::integral_constant<int, kLanes>{});
    if (i < columns) fn(i, static_cast<int>(columns - i));
}

// Lanes past `count` are 0, and are not stored.
template <DType kType, class Count>
TF_INLINE F load_some(const char* from, Count count) {
    if constexpr (!std::is_same_v<Count, int>) return load_as_float<kType>(from);
    alignas(64) float lanes[kLanes] = {};
    for (int i = 0; i < min_of<int>(count, kLanes); ++i) lanes[i] = scalar_at(kType, from + i * size_of(kType));
    return load(lanes);
}

template <DType kType, class Count>
TF_INLINE void store_some(char* to, F x, Count count) {
    if constexpr (!std::is_same_v<Count, int>) return store_from_float<kType>(to, x);
    alignas(64) float lanes[kLanes];
    store(lanes, x);
    for (int i = 0; i < min_of<int>(count, kLanes); ++i) store_row<kType>(lanes + i, 1, 1.0f, to + i * size_of(kType));
}

// Below, kCoarse is for results that are rounded to bf16, half of whose last place is 2e-3: errors up to 3e-4.
template <bool kCoarse>
TF_INLINE F reciprocal(F x) {
#if defined(__AVX512F__)
    if constexpr (kCoarse) return reinterpret_cast<F>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
#endif
    return 1.0f / x;
}

// x / (1 + 2^exponent), with 0 where the power leaves the range in which every instruction set's exp2 is right.
template <bool kCoarse>
TF_INLINE F over_one_plus_exp2(F x, F exponent) {
    const F inverse = reciprocal<kCoarse>(1.0f + exp2<kCoarse ? 3 : 5>(minimum(set1(126.0f), exponent)));
    return x * select(exponent > 126.0f, zero(), inverse);
}

template <bool kCoarse>
TF_INLINE F silu(F x) {
    return over_one_plus_exp2<kCoarse>(x, x * -kLog2E);
}

// x / 2 * (1 + tanh(u)), which is x / (1 + exp(-2 u)): nothing cancels where the tanh is near -1.
template <bool kCoarse>
TF_INLINE F gelu_tanh(F x) {
    const F u = 0.797884561f * (x + 0.044715f * (x * x * x));
    return over_one_plus_exp2<kCoarse>(x, u * (-2.0f * kLog2E));
}

// Its derivative, s + x s (1 - s) du/dx * 2 with s = 1 / (1 + e) and e = exp(-2 u). From 12 on it is 0 or 1, to a
// float.
TF_INLINE F gelu_tanh_slope(F x) {
    x = maximum(set1(-12.0f), minimum(set1(12.0f), x));
    const F square = x * x;
    const F u = 0.797884561f * (x + 0.044715f * (square * x));
    const F e = exp2<5>(minimum(set1(126.0f), u * (-2.0f * kLog2E)));
    const F s = 1.0f / (1.0f + e);
    return s + x * s * (e * s) * (1.595769122f + 0.214064453f * square);
}

// x times the normal distribution's integral, whose half below 0 is exp(-x^2 / 2) P(1 / (1 + p |x|)). P is a minimax
// fit of exp(z^2) erfc(z) / 2, with z = |x| / sqrt(2) to 9.4, to a relative error of 2e-8 (coarse: 2.3e-4).
template <bool kCoarse>
TF_INLINE F gelu(F x) {
    constexpr float kRootHalf = 0.707106781f;
    const F magnitude = as_float(as_int(x) & 0x7FFFFFFF);
    const F t = reciprocal<kCoarse>(1.0f + (kCoarse ? 0.42f : 0.30f) * kRootHalf * magnitude);
    F p;
    if constexpr (kCoarse) {
        p = set1(0.220739476f);
        p = p * t + 0.0218402901f;
        p = p * t + 0.140986421f;
        p = p * t + 0.116442477f;
    } else {
        p = set1(-0.0647017699f);
        p = p * t + 0.242468570f;
        p = p * t + -0.255434951f;
        p = p * t + 0.272974260f;
        p = p * t + -0.0466447399f;
        p = p * t + 0.107136406f;
        p = p * t + 0.0742650356f;
        p = p * t + 0.0853421051f;
        p = p * t + 0.0845950738f;
    }
    const F tail = p * t * exp2<kCoarse ? 3 : 5>(maximum(set1(-126.0f), x * x * (-0.5f * kLog2E)));
    // Beyond the fit the tail is nothing beside 1, and times x below what a float can hold.
    const F below = select(magnitude > 13.2f, zero(), tail);
    return x * select(x < 0.0f, below, 1.0f - below);
}

}  // namespace
}  // namespace TF_ISA
}  // namespace tf
