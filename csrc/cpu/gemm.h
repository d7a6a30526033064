// The one matrix product of the CPU kernels: C[r][lane] (+)= sum over k of A[r][k] * B[k][lane].
//
// A is read one element at a time and broadcast, so it may lie in memory as it is (K and V in place); B and C are
// vectors. Forward and backward are seven calls of it with A along its rows or along its depth. An "element" is 32
// bits: a float, or a pair of bf16 that one instruction multiplies and adds. B may have 16 bits that become floats.
#pragma once

#include "amx.h"
#include "simd.h"

namespace tf {
namespace TF_ISA {
namespace {

// Which dimension of A is contiguous; the other has the stride that is passed.
enum class Along { depth, rows };

// A product's kByKeys says how it wants K or V where its depth is keys: in place, along its rows, or turned.
struct Float32Product {
    static constexpr Along kByKeys = Along::rows;
    struct InUse {};
    using Lane = float;
    static TF_INLINE F lanes(const float* p) { return load(p); }
    static TF_INLINE F broadcast(const char* p) {
        float x;
        std::memcpy(&x, p, 4);
        return set1(x);
    }
    static TF_INLINE F multiply_add(F sum, F a, F b) { return a * b + sum; }
};

// B is of a type that has no product of its own, and is widened each time that it is read.
template <DType kType>
struct WideningProduct : Float32Product {
    using Lane = uint16_t;
    static TF_INLINE F lanes(const uint16_t* p) { return load_as_float<kType>(reinterpret_cast<const char*>(p)); }
};

#if defined(__AVX512BF16__)
struct Bf16PairProduct {
#if defined(__AMX_BF16__)
    static constexpr Along kByKeys = Along::depth;
    using InUse = TilesInUse;
#else
    static constexpr Along kByKeys = Along::rows;
    struct InUse {};
#endif
    using Lane = float;
    static TF_INLINE F lanes(const float* p) { return load(p); }
    static TF_INLINE F broadcast(const char* p) {
        int32_t pair;
        std::memcpy(&pair, p, 4);
        return reinterpret_cast<F>(_mm512_set1_epi32(pair));
    }
    static TF_INLINE F multiply_add(F sum, F a, F b) {
        return reinterpret_cast<F>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a),
                                                    reinterpret_cast<__m512bh>(b)));
    }
};
#endif

// Rows of C that one register tile holds beside V vectors: 16 or 24 accumulators with 32 registers, 12 with 16.
#if defined(__AVX512F__)
constexpr int kMaxVectors = 4;
constexpr int tile_rows_for(int vectors) { return vectors == 4 ? 4 : 8; }
#else
constexpr int kMaxVectors = 2;
constexpr int tile_rows_for(int vectors) { return vectors == 2 ? 6 : 8; }
#endif

// What is called before each tile of C and at every step of its depth, to prepare what follows while the product keeps
// the processor busy.
struct Nothing {
    template <int R, int V>
    TF_INLINE void tile(const float*, int64_t) {}
    TF_INLINE void step() {}
};

template <class Product, Along kAlong, bool kAdd, int R, int V, class Meanwhile>
TF_INLINE void micro_kernel(const char* a, int64_t a_stride, const typename Product::Lane* b, int64_t b_stride,
                            float* c, int64_t c_stride, int64_t depth, Meanwhile& meanwhile) {
    const int64_t row_step = kAlong == Along::rows ? 4 : a_stride;
    const int64_t depth_step = kAlong == Along::rows ? a_stride : 4;
    meanwhile.template tile<R, V>(c, c_stride);
    F sum[R * V];
    unroll<R * V>([&](auto i) TF_INLINE_LAMBDA { sum[i] = zero(); });
    for (int64_t k = 0; k < depth; ++k) {
        F lanes[V];
        unroll<V>([&](auto v) TF_INLINE_LAMBDA { lanes[v] = Product::lanes(b + v * kLanes); });
        unroll<R>([&](auto r) TF_INLINE_LAMBDA {
            const F element = Product::broadcast(a + r * row_step);
            unroll<V>([&](auto v) TF_INLINE_LAMBDA {
                sum[r * V + v] = Product::multiply_add(sum[r * V + v], element, lanes[v]);
            });
        });
        a += depth_step;
        b += b_stride;
        meanwhile.step();
    }
    // C joins at the end: a long sum made of short sums keeps its accuracy.
    unroll<R * V>([&](auto i) TF_INLINE_LAMBDA {
        float* to = c + (i / V) * c_stride + (i % V) * kLanes;
        store(to, kAdd ? load(to) + sum[i] : sum[i]);
    });
}

// All rows, R at a time, the rest in halves of it.
template <class Product, Along kAlong, bool kAdd, int R, int V, class Meanwhile>
TF_INLINE void row_loop(const char* a, int64_t a_stride, const typename Product::Lane* b, int64_t b_stride, float* c,
                        int64_t c_stride, int64_t rows, int64_t depth, Meanwhile& meanwhile) {
    const int64_t row_step = kAlong == Along::rows ? 4 : a_stride;
    for (; rows >= R; rows -= R) {
        micro_kernel<Product, kAlong, kAdd, R, V>(a, a_stride, b, b_stride, c, c_stride, depth, meanwhile);
        a += R * row_step;
        c += R * c_stride;
    }
    if constexpr (R > 1) {
        row_loop<Product, kAlong, kAdd, R / 2, V>(a, a_stride, b, b_stride, c, c_stride, rows, depth, meanwhile);
    }
}

// a_stride in bytes, b_stride and c_stride in floats, `vectors` of kLanes floats.
template <class Product, Along kAlong, bool kAdd>
__attribute__((noinline)) void gemm(const void* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                                    int64_t c_stride, int64_t rows, int64_t vectors, int64_t depth) {
    Nothing meanwhile;
    const char* a_bytes = static_cast<const char*>(a);
    for (; vectors > 0; vectors -= kMaxVectors, b += kMaxVectors * kLanes, c += kMaxVectors * kLanes) {
        unroll<kMaxVectors>([&](auto less_one) TF_INLINE_LAMBDA {
            constexpr int V = less_one + 1;
            const bool mine = V == kMaxVectors ? vectors >= V : vectors == V;
            if (!mine) return;
#if defined(__AMX_BF16__)
            if constexpr (std::is_same_v<Product, Bf16PairProduct>) {
                static_assert(kAlong == Along::depth, "tiles are loaded by rows");
                return tile_rows<kAdd, V>(a_bytes, a_stride, b, b_stride, c, c_stride, rows, depth);
            }
#endif
            row_loop<Product, kAlong, kAdd, tile_rows_for(V), V>(a_bytes, a_stride, b, b_stride, c, c_stride, rows,
                                                                 depth, meanwhile);
        });
    }
}

}  // namespace
}  // namespace TF_ISA
}  // namespace tf
