// The arithmetic of mma and wgmma: small products of floats.
#pragma once

#include <cstring>

#include "emulator/numbers.h"

namespace tf::emulator {

constexpr int kProductDepth = 16;  // K of one instruction

// c (16, columns) = or += a (16, 16) b (16, columns), for multiples of 8 columns. The sum over k is taken first, and
// then added. Vector types, because the compiler keeps an array of sums in memory: 13 GFLOP/s and not 36.
inline void multiply_rows(float* c, const float* a, const float* b, int columns, bool accumulate) {
    typedef float Four __attribute__((vector_size(16)));
    constexpr int kRows = 4;
    for (int row = 0; row < 16; row += kRows) {
        for (int column = 0; column < columns; column += 8) {
            Four sum[kRows][2] = {};
            for (int k = 0; k < kProductDepth; ++k) {
                Four right[2];
                std::memcpy(&right[0], b + k * columns + column, sizeof(Four));
                std::memcpy(&right[1], b + k * columns + column + 4, sizeof(Four));
#pragma GCC unroll 4
                for (int i = 0; i < kRows; ++i) {
                    const float left = a[(row + i) * kProductDepth + k];
                    sum[i][0] += left * right[0];
                    sum[i][1] += left * right[1];
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) {
                float* to = c + (row + i) * columns + column;
                Four before[2] = {};
                if (accumulate) std::memcpy(before, to, sizeof(before));
                before[0] += sum[i][0];
                before[1] += sum[i][1];
                std::memcpy(to, before, sizeof(before));
            }
        }
    }
}

template <bool kBfloat16>
void convert(const uint16_t* from, float* to, int count) {
    for (int i = 0; i < count; ++i) to[i] = half_to_float<kBfloat16>(from[i]);
}

}  // namespace tf::emulator
