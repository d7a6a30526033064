// Sums and maxima across the lanes of a vector, for kernels whose lanes run along a row.
#pragma once

#include "simd.h"

namespace tf {
namespace TF_ISA {
namespace {

typedef float Q __attribute__((vector_size(16)));

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

TF_INLINE float sum_of(F x) {
    const Q q = add_quarters(x);
    return (q[0] + q[1]) + (q[2] + q[3]);
}

TF_INLINE float largest(F x) {
    alignas(64) float lane[kLanes];
    store(lane, x);
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lane[i] = max_of(lane[i], lane[i + half]);
    }
    return lane[0];
}

}  // namespace
}  // namespace TF_ISA
}  // namespace tf
