// What every other file takes for granted: element types and compiler words.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define TF_INLINE __host__ __device__ __forceinline__
#else
#define TF_INLINE inline __attribute__((always_inline))
#endif
#define TF_INLINE_LAMBDA __attribute__((always_inline))

namespace tf {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, boolean = 3 };

TF_INLINE constexpr int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::boolean ? 1 : 2; }

template <class T>
TF_INLINE constexpr T min_of(T a, T b) {
    return a < b ? a : b;
}
template <class T>
TF_INLINE constexpr T max_of(T a, T b) {
    return a > b ? a : b;
}
TF_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
TF_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace tf
