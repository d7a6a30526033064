// One vector of floats, written in the compiler's own vector types so that a single text serves every instruction
// set. Only what those types cannot say (bf16 products, half conversions) names an instruction, under #ifdef.
#pragma once

#include <cstring>
#include <utility>

#include "core/platform.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tf {
namespace TF_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));
typedef F FUnaligned __attribute__((aligned(4), may_alias));
typedef I IUnaligned __attribute__((aligned(4), may_alias));
typedef H HUnaligned __attribute__((aligned(2), may_alias));

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInfinity = __builtin_inff();

TF_INLINE F load(const float* p) { return *reinterpret_cast<const FUnaligned*>(p); }
TF_INLINE void store(float* p, F x) { *reinterpret_cast<FUnaligned*>(p) = x; }
TF_INLINE I load_int(const int32_t* p) { return *reinterpret_cast<const IUnaligned*>(p); }
TF_INLINE F set1(float x) { return x - F{}; }  // a broadcast; x - 0 keeps the sign of zero
TF_INLINE F zero() { return F{}; }
TF_INLINE F as_float(I x) { return reinterpret_cast<F>(x); }
TF_INLINE I as_int(F x) { return reinterpret_cast<I>(x); }
TF_INLINE U as_bits(F x) { return reinterpret_cast<U>(x); }
TF_INLINE F select(I condition, F yes, F no) { return condition ? yes : no; }

// The larger; where either is NaN the second.
TF_INLINE F maximum(F a, F b) {
#if defined(__AVX512F__)
    return reinterpret_cast<F>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
    return reinterpret_cast<F>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
    return a > b ? a : b;
#endif
}

// The smaller; where either is NaN the second.
TF_INLINE F minimum(F a, F b) {
#if defined(__AVX512F__)
    return reinterpret_cast<F>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
    return reinterpret_cast<F>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
    return a < b ? a : b;
#endif
}

TF_INLINE bool any(I condition) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(condition)) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_epi8(reinterpret_cast<__m256i>(condition)) != 0;
#else
    int32_t set = 0;
    for (int i = 0; i < kLanes; ++i) set |= condition[i];
    return set != 0;
#endif
}

// fn(0), fn(1), ... with constant arguments: arrays indexed by them live in registers.
template <class Fn, int... kIndex>
TF_INLINE void unroll_impl(Fn&& fn, std::integer_sequence<int, kIndex...>) {
    (fn(std::integral_constant<int, kIndex>{}), ...);
}
template <int kCount, class Fn>
TF_INLINE void unroll(Fn&& fn) {
    unroll_impl(fn, std::make_integer_sequence<int, kCount>{});
}

// 2^x, to 1 ulp or so with kDegree 5 and to 1e-4 with kDegree 3. Results below 2^-126 may be 0; NaN stays NaN.
//
// x = n + f with n = floor(x), 2^x = 2^n * 2^f, and the polynomials are minimax fits of 2^f on [0, 1). AVX-512 has
// both steps as instructions. Elsewhere adding 1.5 * 2^23 to x - 0.5 leaves n in the low bits of the sum.
template <int kDegree>
TF_INLINE F exp2(F x) {
    static_assert(kDegree == 3 || kDegree == 5, "fitted degrees");
#if defined(__AVX512F__)
    const F f = reinterpret_cast<F>(_mm512_reduce_ps(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEG_INF));
#else
    x = maximum(set1(-126.5f), x);  // which has n = -127 and comes out as 0
    const F magic = set1(12582912.0f);
    const F shifted = (x - 0.5f) + magic;
    const F f = x - (shifted - magic);
#endif
    F p;
    if constexpr (kDegree == 3) {
        p = set1(0.0780245215f);
        p = p * f + 0.226067156f;
        p = p * f + 0.695833564f;
        p = p * f + 0.999925196f;
    } else {
        p = set1(0.00187757669f);
        p = p * f + 0.00898934063f;
        p = p * f + 0.0558263175f;
        p = p * f + 0.240153611f;
        p = p * f + 0.693153083f;
        p = p * f + 0.99999994f;
    }
#if defined(__AVX512F__)
    return reinterpret_cast<F>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(x)));
#else
    return p * as_float((as_int(shifted) << 23) + (127 << 23));
#endif
}

// tanh(x) = e / (e + 2) with e = exp(2x) - 1, which is accurate near 0 because 2^f - 1 = f * q(f) is formed before
// anything is added to it. The polynomial is a minimax fit of (2^f - 1) / f.
TF_INLINE F tanh(F x) {
    F t = x * (2.0f * kLog2E);
    t = select(t > 60.0f, set1(60.0f), t);
    t = select(t < -60.0f, set1(-60.0f), t);
    const F magic = set1(12582912.0f);
    const F shifted = t + magic;
    const F f = t - (shifted - magic);
    F q = set1(0.000153533620f);
    q = q * f + 0.00133988750f;
    q = q * f + 0.00961843692f;
    q = q * f + 0.0555033237f;
    q = q * f + 0.240226477f;
    q = q * f + 0.693147182f;
    const F scale = as_float((as_int(shifted) << 23) + (127 << 23));
    const F e = scale * (q * f) + (scale - 1.0f);
    return e / (e + 2.0f);
}

// -------------------------------------------------------------------------------------------------- half types

TF_INLINE float scalar_from_half(DType dtype, const char* p) {
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    if (dtype == DType::bf16) {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float x;
        std::memcpy(&x, &wide, 4);
        return x;
    }
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return static_cast<float>(half);
}

TF_INLINE float scalar_at(DType dtype, const char* p) {
    if (dtype == DType::boolean) return *p ? 0.0f : -kInfinity;  // a boolean mask as the bias it stands for
    if (dtype != DType::f32) return scalar_from_half(dtype, p);
    float x;
    std::memcpy(&x, p, 4);
    return x;
}

TF_INLINE uint16_t scalar_to_half(DType dtype, float x) {
    uint16_t bits;
    if (dtype == DType::bf16) {
        uint32_t wide;
        std::memcpy(&wide, &x, 4);
        if (x != x) return static_cast<uint16_t>((wide >> 16) | 0x40);
        return static_cast<uint16_t>((wide + 0x7FFFu + ((wide >> 16) & 1u)) >> 16);  // round to nearest even
    }
    const _Float16 half = static_cast<_Float16>(x);
    std::memcpy(&bits, &half, 2);
    return bits;
}

TF_INLINE F from_bf16(H bits) { return reinterpret_cast<F>(__builtin_convertvector(bits, U) << 16); }

TF_INLINE H to_bf16(F x) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<H>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
#else
    const U bits = as_bits(x);
    const U rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const U quiet = (bits >> 16) | 0x40u;
    return __builtin_convertvector(x != x ? quiet : rounded, H);
#endif
}

TF_INLINE F load_bf16(const char* p) { return from_bf16(*reinterpret_cast<const HUnaligned*>(p)); }

TF_INLINE F load_f16(const char* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<F>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
    return reinterpret_cast<F>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    F x;
    for (int i = 0; i < kLanes; ++i) x[i] = scalar_from_half(DType::f16, p + 2 * i);
    return x;
#endif
}

TF_INLINE void store_f16(char* p, F x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(reinterpret_cast<__m512>(x), 0));
#elif defined(__AVX2__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(x), 0));
#else
    for (int i = 0; i < kLanes; ++i) {
        const uint16_t bits = scalar_to_half(DType::f16, x[i]);
        std::memcpy(p + 2 * i, &bits, 2);
    }
#endif
}

template <DType kType>
TF_INLINE F load_as_float(const char* p) {
    if constexpr (kType == DType::f32) return load(reinterpret_cast<const float*>(p));
    if constexpr (kType == DType::bf16) return load_bf16(p);
    if constexpr (kType == DType::f16) return load_f16(p);
    typedef uint8_t B __attribute__((vector_size(kLanes)));
    B bytes;
    std::memcpy(&bytes, p, kLanes);
    return select(__builtin_convertvector(bytes, I) != 0, zero(), set1(-kInfinity));
}

template <DType kType>
TF_INLINE void store_from_float(char* p, F x) {
    if constexpr (kType == DType::f32) store(reinterpret_cast<float*>(p), x);
    if constexpr (kType == DType::bf16) *reinterpret_cast<HUnaligned*>(p) = to_bf16(x);
    if constexpr (kType == DType::f16) store_f16(p, x);
}

}  // namespace
}  // namespace TF_ISA
}  // namespace tf
