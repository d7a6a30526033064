// Moving rows between the caller's memory and the kernels' scratch: conversion, transposition, pairing.
#pragma once

#include "simd.h"

namespace tf {
namespace TF_ISA {
namespace {

// Calls fn with the element type as a constant.
template <class Fn>
TF_INLINE void with_dtype(DType dtype, Fn&& fn) {
    switch (dtype) {
        case DType::f32:
            return fn(std::integral_constant<DType, DType::f32>{});
        case DType::bf16:
            return fn(std::integral_constant<DType, DType::bf16>{});
        case DType::f16:
            return fn(std::integral_constant<DType, DType::f16>{});
        case DType::boolean:
            return fn(std::integral_constant<DType, DType::boolean>{});
    }
}

// The same of types that numbers have: booleans are left out.
template <class Fn>
TF_INLINE void with_number_type(DType dtype, Fn&& fn) {
    with_dtype(dtype, [&](auto type) {
        if constexpr (type() != DType::boolean) fn(type);
    });
}

// `count` elements as floats, then zeros up to `padded`. Booleans become 0 (True) and -inf (False).
template <DType kType>
TF_INLINE void load_row(const char* source, int64_t count, float* target, int64_t padded) {
    constexpr int64_t kSize = kType == DType::f32 ? 4 : kType == DType::boolean ? 1 : 2;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(target + i, load_as_float<kType>(source + i * kSize));
    for (; i < count; ++i) target[i] = scalar_at(kType, source + i * kSize);
    for (; i < padded; ++i) target[i] = 0.0f;
}

inline void load_row(DType dtype, const char* source, int64_t count, float* target, int64_t padded) {
    with_dtype(dtype, [&](auto type) { load_row<type()>(source, count, target, padded); });
}

// `count` 16-bit elements as they are, then zeros up to `padded` 32-bit ones.
inline void copy_row(const char* source, int64_t count, float* target, int64_t padded) {
    typedef F Halves __attribute__((aligned(2), may_alias));
    int64_t i = 0;
    for (; i + kLanes <= count / 2; i += kLanes) {
        *reinterpret_cast<Halves*>(target + i) = *reinterpret_cast<const Halves*>(source + 4 * i);
    }
    if (i == padded) return;  // a call for a few bytes, or none, takes longer than the row
    const auto rest = static_cast<size_t>(2 * (count - 2 * i));
    std::memcpy(target + i, source + 4 * i, rest);
    std::memset(reinterpret_cast<char*>(target + i) + rest, 0, static_cast<size_t>(4 * (padded - i)) - rest);
}

// Asks for a row that is far from the last one: the processor's own fetching does not find it, and a loop that waits
// for each row asks for few at a time.
TF_INLINE void prefetch_row(const char* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
}

template <DType kType>
TF_INLINE void store_row(const float* source, int64_t count, float scale, char* target) {
    constexpr int64_t kSize = kType == DType::f32 ? 4 : 2;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store_from_float<kType>(target + i * kSize, load(source + i) * scale);
    for (; i < count; ++i) {
        const float x = source[i] * scale;
        if constexpr (kType == DType::f32) {
            std::memcpy(target + 4 * i, &x, 4);
        } else {
            const uint16_t bits = scalar_to_half(kType, x);
            std::memcpy(target + 2 * i, &bits, 2);
        }
    }
}

inline void store_row(DType dtype, const float* source, int64_t count, float scale, char* target) {
    with_number_type(dtype, [&](auto type) { store_row<type()>(source, count, scale, target); });
}

// Two rows of bf16 as pairs: 32-bit element i holds (first[i], second[i]). A missing row counts as zeros.
inline void load_pair_row(const char* first, const char* second, int64_t count, float* target, int64_t padded) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const I low = first ? as_int(load_bf16(first + 2 * i)) : I{};
        const I high = second ? as_int(load_bf16(second + 2 * i)) : I{};
        store(target + i, as_float(reinterpret_cast<I>(reinterpret_cast<U>(low) >> 16) | high));
    }
    for (; i < padded; ++i) {
        uint16_t low = 0, high = 0;
        if (i < count && first) std::memcpy(&low, first + 2 * i, 2);
        if (i < count && second) std::memcpy(&high, second + 2 * i, 2);
        const uint32_t pair = low | static_cast<uint32_t>(high) << 16;
        std::memcpy(target + i, &pair, 4);
    }
}

// Two vectors of floats, rounded to bf16, as pairs (a[i], b[i]). Adding half of the last place that stays rounds to
// nearest, ties away from zero; the instruction that rounds ties to even takes as long as four of these.
TF_INLINE F pair_bf16(F a, F b) {
#if defined(__AVX512BF16__)
    const U low = (as_bits(a) + 0x8000u) >> 16, high = as_bits(b) + 0x8000u;
    return reinterpret_cast<F>(
        _mm512_mask_blend_epi16(0xAAAAAAAAu, reinterpret_cast<__m512i>(low), reinterpret_cast<__m512i>(high)));
#else
    (void)b;
    return a;
#endif
}

// Two rows of bf16 as pairs (first[i], second[i]), in the order that one instruction a vector gives: of each quarter
// of the row, the first half goes to `low` and the second to `high`.
TF_INLINE void interleave(F first, F second, F& low, F& high) {
#if defined(__AVX512F__)
    const __m512i a = reinterpret_cast<__m512i>(first), b = reinterpret_cast<__m512i>(second);
    low = reinterpret_cast<F>(_mm512_unpacklo_epi16(a, b));
    high = reinterpret_cast<F>(_mm512_unpackhi_epi16(a, b));
#else
    (void)first, (void)second, (void)low, (void)high;  // only AVX-512 has paired products
#endif
}

// A square of kLanes by kLanes, turned in registers: step s exchanges the off-diagonal blocks of s by s.
TF_INLINE void transpose_square(F (&row)[kLanes]) {
    const auto step = [&](auto size) TF_INLINE_LAMBDA {
        constexpr int s = size;
        I upper, lower;
        for (int k = 0; k < kLanes; ++k) {
            upper[k] = k & s ? kLanes + k - s : k;
            lower[k] = k & s ? kLanes + k : k + s;
        }
        unroll<kLanes>([&](auto r) TF_INLINE_LAMBDA {
            if constexpr ((r & s) == 0) {
                const F a = row[r], b = row[r + s];
                row[r] = __builtin_shuffle(a, b, upper);
                row[r + s] = __builtin_shuffle(a, b, lower);
            }
        });
    };
    step(std::integral_constant<int, 1>{});
    step(std::integral_constant<int, 2>{});
    if constexpr (kLanes > 4) step(std::integral_constant<int, 4 % kLanes>{});
    if constexpr (kLanes > 8) step(std::integral_constant<int, 8 % kLanes>{});
}

TF_INLINE void transpose_square(const float* source, int64_t source_stride, float* target, int64_t target_stride) {
    F row[kLanes];
    unroll<kLanes>([&](auto r) TF_INLINE_LAMBDA { row[r] = load(source + r * source_stride); });
    transpose_square(row);
    unroll<kLanes>([&](auto r) TF_INLINE_LAMBDA { store(target + r * target_stride, row[r]); });
}

// target[c][r] = source[r][c]; strides in 32-bit elements. What is not a whole square is moved one by one.
inline void transpose(const float* source, int64_t source_stride, float* target, int64_t target_stride, int64_t rows,
                      int64_t columns) {
    const int64_t whole_rows = rows / kLanes * kLanes, whole_columns = columns / kLanes * kLanes;
    for (int64_t r = 0; r < whole_rows; r += kLanes) {
        for (int64_t c = 0; c < whole_columns; c += kLanes) {
            transpose_square(source + r * source_stride + c, source_stride, target + c * target_stride + r,
                             target_stride);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) {
            target[c * target_stride + r] = source[r * source_stride + c];
        }
    }
}

// Rows of bf16 turned, in whole squares of 32: row d of the target holds element d of each source row, in order, and
// zeros for rows and columns that the source lacks. Strides in bytes and in floats.
inline void turn_bf16(const char* source, int64_t stride, int64_t rows, int64_t columns, float* target,
                      int64_t target_stride) {
#if defined(__AVX512BF16__)
    for (int64_t c = 0; c < columns; c += 32) {
        const __mmask32 some = columns - c >= 32 ? ~0u : (1u << (columns - c)) - 1;
        for (int64_t r = 0; r < rows; r += 32) {
            const auto load_some = [&](int64_t row) TF_INLINE_LAMBDA {
                const bool is_there = r + row < rows;
                const char* from = source + (is_there ? (r + row) * stride + c * 2 : 0);
                return reinterpret_cast<F>(_mm512_maskz_loadu_epi16(is_there ? some : 0, from));
            };
            // Half of the columns after the other: both would need all registers.
            unroll<2>([&](auto half) TF_INLINE_LAMBDA {
                F square[16];
                unroll<16>([&](auto i) TF_INLINE_LAMBDA {
                    F low, high;
                    interleave(load_some(2 * i), load_some(2 * i + 1), low, high);
                    square[i] = half == 0 ? low : high;
                });
                transpose_square(square);
                unroll<16>([&](auto i) TF_INLINE_LAMBDA {
                    store(target + (c + i / 4 * 8 + half * 4 + i % 4) * target_stride + r / 2, square[i]);
                });
            });
        }
    }
#else
    (void)source, (void)stride, (void)rows, (void)columns, (void)target, (void)target_stride;  // only for pairs
#endif
}

inline bool all_finite(const float* x, int64_t count) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        bad |= (bits & 0x7F800000u) == 0x7F800000u;
    }
    return bad == 0;
}

inline bool all_finite_half(DType dtype, const char* x, int64_t count) {
    const uint32_t exponent = dtype == DType::bf16 ? 0x7F80u : 0x7C00u;
    uint32_t bad = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint16_t bits;
        std::memcpy(&bits, x + 2 * i, 2);
        bad |= (bits & exponent) == exponent;
    }
    return bad == 0;
}

inline bool row_is_finite(DType dtype, const char* row, int64_t count) {
    return dtype == DType::f32 ? all_finite(reinterpret_cast<const float*>(row), count)
                               : all_finite_half(dtype, row, count);
}

}  // namespace
}  // namespace TF_ISA
}  // namespace tf
