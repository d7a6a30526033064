// gemm.h's product on AMX tiles (Intel's Advanced Matrix Extensions, Sapphire Rapids and later): sixteen rows of A,
// sixteen pairs of depth and sixteen lanes of B an instruction. The layouts of the vector kernels are what it reads:
// A as rows of pairs, B as rows of lanes of pairs.
#pragma once

#if defined(__AMX_BF16__)

#include "simd.h"

namespace tf {
namespace TF_ISA {
namespace {

constexpr int kSide = 16;  // rows of a tile, and 32-bit elements of its row

// Tiles 0 to 3 are C. A and B have one each, and one each for what is left of the depth.
enum : int { kTileA = 4, kTileB = 5, kTileATail = 6, kTileBTail = 7 };

template <int kTile>
TF_INLINE void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
TF_INLINE void tile_load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
TF_INLINE void tile_store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}
// C += A B
template <int kC, int kA, int kB>
TF_INLINE void tile_multiply_add() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

// The shapes that the processor's tiles have: setting them takes as long as ten products (47 ns), so it is done when
// others are needed. Whoever ran before on this thread may have set others: a task begins with `forget`.
struct TileShapes {
    int rows = 0, tail = 0;

    TF_INLINE void require(int wanted_rows, int wanted_tail) {
        if (rows != wanted_rows || (wanted_tail != 0 && tail != wanted_tail)) set(wanted_rows, wanted_tail);
    }
    void forget() { rows = tail = 0; }

  private:
    __attribute__((noinline)) void set(int wanted_rows, int wanted_tail) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t row_count[16] = {};
        } shapes;
        static_assert(sizeof(shapes) == 64, "as the processor reads it");
        const auto shape = [&](int tile, int row_count, int elements) {
            shapes.row_count[tile] = static_cast<uint8_t>(row_count);
            shapes.row_bytes[tile] = static_cast<uint16_t>(elements * 4);
        };
        for (int c = 0; c < 4; ++c) shape(c, wanted_rows, kSide);
        shape(kTileA, wanted_rows, kSide);
        shape(kTileB, kSide, kSide);
        // Without a tail these go unused; a shape of zero would be an error.
        shape(kTileATail, wanted_rows, max_of(wanted_tail, 1));
        shape(kTileBTail, max_of(wanted_tail, 1), kSide);
        __asm__ volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
        rows = wanted_rows;
        tail = wanted_tail;
    }
};

inline thread_local TileShapes tile_shapes;

// Held while a task computes. Released tiles cost nothing when the system switches threads.
struct TilesInUse {
    TilesInUse() { tile_shapes.forget(); }
    ~TilesInUse() { __asm__ volatile("tilerelease"); }
};

// One row of tiles of C, V tiles wide.
template <bool kAdd, int V>
TF_INLINE void tile_row(const char* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride,
                        int64_t depth) {
    unroll<V>([&](auto v) TF_INLINE_LAMBDA {
        if constexpr (kAdd) {
            tile_load<v>(c + v * kSide, c_stride * 4);
        } else {
            tile_zero<v>();
        }
    });
    const auto multiply = [&](auto tile_a, auto tile_b) TF_INLINE_LAMBDA {
        tile_load<tile_a>(a, a_stride);
        unroll<V>([&](auto v) TF_INLINE_LAMBDA {
            tile_load<tile_b>(b + v * kSide, b_stride * 4);
            tile_multiply_add<v, tile_a, tile_b>();
        });
    };
    for (; depth >= kSide; depth -= kSide, a += kSide * 4, b += kSide * b_stride) {
        multiply(std::integral_constant<int, kTileA>{}, std::integral_constant<int, kTileB>{});
    }
    if (depth > 0) multiply(std::integral_constant<int, kTileATail>{}, std::integral_constant<int, kTileBTail>{});
    unroll<V>([&](auto v) TF_INLINE_LAMBDA { tile_store<v>(c + v * kSide, c_stride * 4); });
}

// Rows of two tiles by two: each tile that is loaded takes part in two products, where `tile_row` loads five for four.
// For whole tiles, of which `rows` are a multiple of 32 and `depth` of 16.
template <bool kAdd>
TF_INLINE void tile_squares(const char* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                            int64_t c_stride, int64_t rows, int64_t depth) {
    tile_shapes.require(kSide, kSide);
    for (; rows > 0; rows -= 2 * kSide, a += 2 * kSide * a_stride, c += 2 * kSide * c_stride) {
        float* lower = c + kSide * c_stride;
        if constexpr (kAdd) {
            tile_load<0>(c, c_stride * 4), tile_load<1>(c + kSide, c_stride * 4);
            tile_load<2>(lower, c_stride * 4), tile_load<3>(lower + kSide, c_stride * 4);
        } else {
            unroll<4>([&](auto i) TF_INLINE_LAMBDA { tile_zero<i>(); });
        }
        const char *upper_a = a, *lower_a = a + kSide * a_stride;
        const float* b_row = b;
        for (int64_t k = 0; k < depth;
             k += kSide, upper_a += kSide * 4, lower_a += kSide * 4, b_row += kSide * b_stride) {
            tile_load<kTileB>(b_row, b_stride * 4);
            tile_load<kTileA>(upper_a, a_stride);
            tile_multiply_add<0, kTileA, kTileB>();
            tile_load<kTileBTail>(b_row + kSide, b_stride * 4);
            tile_multiply_add<1, kTileA, kTileBTail>();
            tile_load<kTileATail>(lower_a, a_stride);
            tile_multiply_add<2, kTileATail, kTileB>();
            tile_multiply_add<3, kTileATail, kTileBTail>();
        }
        tile_store<0>(c, c_stride * 4), tile_store<1>(c + kSide, c_stride * 4);
        tile_store<2>(lower, c_stride * 4), tile_store<3>(lower + kSide, c_stride * 4);
    }
}

// As gemm.h's `gemm` with V vectors and A along its depth.
template <bool kAdd, int V>
TF_INLINE void tile_rows(const char* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride,
                         int64_t rows, int64_t depth) {
    const int tail = static_cast<int>(depth % kSide);
    for (; rows > 0; rows -= kSide, a += kSide * a_stride, c += kSide * c_stride) {
        tile_shapes.require(static_cast<int>(min_of<int64_t>(kSide, rows)), tail);
        tile_row<kAdd, V>(a, a_stride, b, b_stride, c, c_stride, depth);
    }
}

}  // namespace
}  // namespace TF_ISA
}  // namespace tf

#endif
