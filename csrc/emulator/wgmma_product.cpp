// One wgmma: descriptors, swizzled operands and the product.
#include <algorithm>
#include <cstring>

#include "emulator/block.h"
#include "emulator/operations.h"
#include "emulator/product.h"

namespace tf::emulator {

namespace {

constexpr int kDepth = kProductDepth;
constexpr int kFieldEnd = 1 << 18;

struct Descriptor {
    uint32_t start;
    int leading, stride;
};

// PTX ISA 9.0, "Matrix descriptor format"; of the layouts only the one of cuda/ptx_wgmma.cuh.
Descriptor decode(const Block& block, uint64_t bits, bool transposed, int rows, Where where) {
    const auto field = [&](int at) { return static_cast<int>(bits >> at & 0x3fff) << 4; };
    const Descriptor d{static_cast<uint32_t>(field(0)), field(16), field(32)};
    const auto refuse = [&](const std::string& what) {
        block.fail(Operation::wgmma, where,
                   "matrix descriptor with start " + std::to_string(d.start) + ", leading " +
                       std::to_string(d.leading) + ", stride " + std::to_string(d.stride) + ": " + what);
    };
    if (bits >> 62 != 1) refuse("only the layout with 128-byte swizzle is known");
    if ((bits & 0x3fffc000c000c000u) != 0) refuse("bits that mean nothing, or a base offset, are set");
    if (d.start % 1024 >= 128) refuse("the start is 1024-byte aligned but for steps along a row");
    const int column = static_cast<int>(d.start % 128) / 2;
    if (column + (transposed ? std::min(rows, 64) : kDepth) > 64 || (transposed && column != 0 && rows > 64)) {
        refuse("reaches beyond the end of a row of 64 elements");
    }
    return d;
}

// The matrix as floats: visit(row along M or N, k, eight numbers that follow each other along K, or along M or N where
// it is transposed).
template <bool kBfloat16, class Visit>
void for_each_eight(Block& block, const Product& product, uint64_t bits, bool transposed, int rows, Visit visit) {
    const Descriptor d = decode(block, bits, transposed, rows, product.where);
    const auto load = [&](int row, int k, uint32_t address) {
        address ^= (address >> 7 & 7) << 4;  // the swizzle is one of address bits
        if (!block.memory().contains(address, 16)) {
            block.fail(Operation::wgmma, product.where,
                       "an operand reaches beyond the end of shared memory, in row " + std::to_string(row));
        }
        block.check_proxy(address, 16, product.where, Operation::wgmma);
        uint16_t halves[8];
        std::memcpy(halves, block.memory().at(address), 16);
        float eight[8];
        convert<kBfloat16>(halves, eight, 8);
        visit(row, k, eight);
    };
    if (transposed) {
        for (int k = 0; k < kDepth; ++k) {
            for (int row = 0; row < rows; row += 8) {
                const int offset = row / 64 * d.leading + k / 8 * d.stride + k % 8 * 128 + row % 64 * 2;
                load(row, k, d.start + static_cast<uint32_t>(offset));
            }
        }
    } else {
        for (int row = 0; row < rows; ++row) {
            const int offset = row / 8 * d.stride + row % 8 * 128;
            for (int k = 0; k < kDepth; k += 8) load(row, k, d.start + static_cast<uint32_t>(offset + 2 * k));
        }
    }
}

template <bool kBfloat16>
void multiply_as(Block& block, Product& product, WgmmaScratch& scratch) {
    const WgmmaArguments& x = product.arguments;
    float* a = scratch.a;  // (64, 16)
    float* b = scratch.b;  // (16, columns)
    for_each_eight<kBfloat16>(block, product, x.b, x.transposed_b, x.columns,
                              [&](int n, int k, const float (&eight)[8]) {
                                  float* to = b + k * x.columns + n;
                                  if (x.transposed_b) {
                                      std::memcpy(to, eight, sizeof(eight));
                                  } else {
                                      for (int i = 0; i < 8; ++i) to[i * x.columns] = eight[i];
                                  }
                              });
    if (x.registers == nullptr) {
        for_each_eight<kBfloat16>(block, product, x.a, x.transposed_a, 64, [&](int m, int k, const float (&eight)[8]) {
            float* to = a + m * kDepth + k;
            const int step = x.transposed_a ? kDepth : 1;
            for (int i = 0; i < 8; ++i) to[i * step] = eight[i];
        });
    }
    for (int w = 0; w < 4; ++w) {
        for (int lane = 0; x.registers != nullptr && lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; ++i) {
                const uint32_t pair = product.registers[w].values[lane][i];
                float* to = a + (16 * w + g + i % 2 * 8) * kDepth + 2 * t + i / 2 * 8;
                to[0] = half_to_float<kBfloat16>(pair & 0xffff);
                to[1] = half_to_float<kBfloat16>(pair >> 16);
            }
        }
        multiply_rows(product.accumulators[w]->values.data(), a + 16 * w * kDepth, b, x.columns, x.accumulate);
    }
}

}  // namespace

void multiply(Block& block, Product& product, WgmmaScratch& scratch) {
    product.arguments.bfloat16 ? multiply_as<true>(block, product, scratch)
                               : multiply_as<false>(block, product, scratch);
}

uint64_t matrix_descriptor(const void* shared, int leading, int stride, Where where) {
    for (const int bytes : {leading, stride}) {
        if (bytes < 0 || bytes % 16 != 0 || bytes >= kFieldEnd) {
            block().fail(Operation::matrix_descriptor, where,
                         std::to_string(bytes) + " bytes; allowed are multiples of 16 below 262144");
        }
    }
    const uint32_t address = shared_address(shared, where);
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
           static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 62;
}

}  // namespace tf::emulator
