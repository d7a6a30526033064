// Products of a warp by mma.sync, with operands from the swizzled tiles of cuda/tile.cuh through ldmatrix.
//
// mma computes 16 x 8 += (16 x 16) (16 x 8): A has its rows along M, B has columns along N, both pair neighbours in K.
// ldmatrix hands out 8x8 matrices as they lie in memory or transposed, so that either operand may lie either way:
//
//   operand            rows of the tile are   columns are   function               lane's base
//   A  (Q, dO, P)      m                      k             load_a                 row_base
//   A  (P^T, dS^T)     k                      m             load_a_transposed      column_base
//   B  (K in Q K^T)    n                      k             load_b                 column_base
//   B  (V in P V)      k                      n             load_b_transposed      row_base
//
// All of them fetch 16 x 16 elements, four matrices. The bases differ in which of the four come from the next eight
// rows, and which from the next eight columns: a product takes its operands from registers in a row, and with one base
// for all, every second fetch would be followed by moves (a quarter more instructions in a forward kernel). A base is
// made once; since the swizzle is an exclusive or with bits that only the lane decides, 16 columns further is an
// exclusive or with a constant, and rows and groups of 64 columns are constants that fit into the instruction: four
// address registers, and the same for tiles that are a constant apart.
#pragma once

#include "cuda/tile.cuh"

namespace tf {
namespace cuda {

// ------------------------------------------------------------------------------------------ addresses

// Lanes 0-15 point at the rows 0-15 of the first eight columns, lanes 16-31 at those of the next eight.
// `tile` is its shared address (1024-byte aligned); to start at row 8i of it, add 1024i bytes.
TF_DEVICE uint32_t row_base(uint32_t tile) {
    const int lane = ptx::lane();
    return tile + static_cast<uint32_t>(lane % 16 * 128 + ((lane / 16) ^ (lane % 8)) * 16);
}
// Lanes 0-7: rows 0-7 of the first eight columns, 8-15: of the next eight; 16-31 the same of rows 8-15.
TF_DEVICE uint32_t column_base(uint32_t tile) {
    const int lane = ptx::lane();
    return tile + static_cast<uint32_t>((lane % 8 + lane / 16 * 8) * 128 + ((lane / 8 % 2) ^ (lane % 8)) * 16);
}
// `base` for row `row` (a multiple of 8) and column `column` (of 16) of a tile of kRows rows; both are known to the
// compiler where the loops around are unrolled.
template <int kRows>
TF_DEVICE uint32_t tile_address(uint32_t base, int row, int column) {
    return (base ^ static_cast<uint32_t>(column % 64 * 2)) +
           static_cast<uint32_t>(column / 64 * kRows * 128 + row * 128);
}

// ------------------------------------------------------------------------------------------ fragments

// A of rows m..m+15, columns k..k+15.
template <int kRows>
TF_DEVICE void load_a(uint32_t (&a)[4], uint32_t row_base, int m, int k) {
    ptx::ldmatrix(a, tile_address<kRows>(row_base, m, k));
}
// The same of a tile whose rows are k.
template <int kRows>
TF_DEVICE void load_a_transposed(uint32_t (&a)[4], uint32_t column_base, int m, int k) {
    ptx::ldmatrix_transposed(a, tile_address<kRows>(column_base, k, m));
}
// B of columns n..n+15, rows k..k+15 of the product: b[0], b[1] are for columns n..n+7, b[2], b[3] for the next eight.
template <int kRows>
TF_DEVICE void load_b(uint32_t (&b)[4], uint32_t column_base, int n, int k) {
    ptx::ldmatrix(b, tile_address<kRows>(column_base, n, k));
}
// The same of a tile whose rows are k.
template <int kRows>
TF_DEVICE void load_b_transposed(uint32_t (&b)[4], uint32_t row_base, int n, int k) {
    ptx::ldmatrix_transposed(b, tile_address<kRows>(row_base, k, n));
}

// ------------------------------------------------------------------------------------------ products

// d (16 kM x kN) += A (16 kM x 16) B (16 x kN) for one step along K. `load(b, n)` fetches B's columns n..n+15; each is
// used for all the kM groups of rows, which is what spares shared memory its bandwidth: an ldmatrix takes as long as
// two products on sm_80.
template <class E, int kM, int kN, class LoadB>
TF_DEVICE void multiply_step(float (&d)[kM][kN / 2], const uint32_t (&a)[kM][4], LoadB&& load) {
    TF_UNROLL
    for (int n = 0; n < kN; n += 16) {
        uint32_t b[4];
        load(b, n);
        TF_UNROLL
        for (int m = 0; m < kM; ++m) {
            ptx::mma<E>(&d[m][n / 2], a[m], b[0], b[1]);
            ptx::mma<E>(&d[m][n / 2 + 4], a[m], b[2], b[3]);
        }
    }
}

}  // namespace cuda
}  // namespace tf
