// What the 32 lanes of a warp do together.
#include <cstring>

#include "emulator/block.h"
#include "emulator/operations.h"
#include "emulator/product.h"

namespace tf::emulator {

// ------------------------------------------------------------------------------------------ registers

uint64_t shuffle(Operation operation, uint64_t bits, int argument, Where where) {
    struct Lane {
        uint64_t bits, result;
        int argument;
    } self{bits, 0, argument};
    collective(operation, where, &self, [&](Block&, Warp& warp) {
        for (int lane = 0; lane < 32; ++lane) {
            Lane& to = warp.argument<Lane>(lane);
            // As the instruction does with a segment of 32 lanes: only five bits of a lane's number count.
            const int from = operation == Operation::shuffle_xor ? lane ^ to.argument : to.argument;
            to.result = warp.argument<Lane>(from & 31).bits;
        }
        return true;
    });
    return self.result;
}

bool vote(Operation operation, bool value, Where where) {
    bool self = value;
    collective(operation, where, &self, [&](Block&, Warp& warp) {
        bool any = false, all = true;
        for (int lane = 0; lane < 32; ++lane) {
            any |= warp.argument<bool>(lane);
            all &= warp.argument<bool>(lane);
        }
        for (int lane = 0; lane < 32; ++lane) warp.argument<bool>(lane) = operation == Operation::any ? any : all;
        return true;
    });
    return self;
}

// Which lane it is, is not told to kernels. It is drawn for each block.
bool elect_one(Where where) {
    collective(Operation::elect_one, where, nullptr, [](Block&, Warp&) { return true; });
    return identity->lane == block().elected_lane();
}

void converge(Operation operation, Where where) {
    if (operation == Operation::sync_warp && skipped(operation, where)) return;
    collective(operation, where, nullptr, [](Block&, Warp&) { return true; });
}

void set_registers(Operation operation, int count, Where where) {
    collective(operation, where, &count, [&](Block& block, Warp& warp) {
        if (warp.index / 4 * 4 + 4 > block.num_warps()) block.fail(operation, where, "by less than a warpgroup");
        return true;
    });
}

// ------------------------------------------------------------------------------------------ matrices

void ldmatrix(Operation operation, uint32_t (&r)[4], uint32_t row_address, Where where) {
    struct Lane {
        uint32_t* r;
        uint32_t address;
    } self{r, row_address};
    const SharedMemory& memory = block().memory();
    if (row_address % 16 != 0 || !memory.contains(row_address, 16)) {
        block().fail(operation, where,
                     "a row's address of " + std::to_string(row_address) +
                         ", which is no multiple of 16 or not in shared memory (which begins at 1024)");
    }
    collective(operation, where, &self, [&](Block&, Warp& warp) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t rows[8][8];
            for (int i = 0; i < 8; ++i)
                std::memcpy(rows[i], memory.at(warp.argument<Lane>(8 * matrix + i).address), 16);
            for (int lane = 0; lane < 32; ++lane) {
                const int g = lane / 4, t = lane % 4;
                const bool transposed = operation == Operation::ldmatrix_transposed;
                const uint32_t low = transposed ? rows[2 * t][g] : rows[g][2 * t];
                const uint32_t high = transposed ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
                warp.argument<Lane>(lane).r[matrix] = low | high << 16;
            }
        }
        return true;
    });
}

namespace {

struct MmaLane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

// Operands are gathered as they are and converted as a whole, which the compiler vectorises.
template <bool kBfloat16>
void multiply(const Warp& warp) {
    uint16_t a_halves[16][16], b_halves[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const MmaLane& from = warp.argument<MmaLane>(lane);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) std::memcpy(&a_halves[g + i % 2 * 8][2 * t + i / 2 * 8], &from.a[i], 4);
        for (int i = 0; i < 2; ++i) {
            b_halves[2 * t + 8 * i][g] = static_cast<uint16_t>(from.b[i]);
            b_halves[2 * t + 8 * i + 1][g] = static_cast<uint16_t>(from.b[i] >> 16);
        }
    }
    float a[16 * 16], b[16 * 8], d[16][8];
    convert<kBfloat16>(a_halves[0], a, 16 * 16);
    convert<kBfloat16>(b_halves[0], b, 16 * 8);
    multiply_rows(d[0], a, b, 8, false);
    for (int lane = 0; lane < 32; ++lane) {
        float* to = warp.argument<MmaLane>(lane).d;
        const int g = lane / 4, t = lane % 4;
        to[0] += d[g][2 * t];
        to[1] += d[g][2 * t + 1];
        to[2] += d[g + 8][2 * t];
        to[3] += d[g + 8][2 * t + 1];
    }
}

}  // namespace

void mma(bool bfloat16, float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Where where) {
    MmaLane self{d, a, {b0, b1}};
    collective(Operation::mma, where, &self, [&](Block&, Warp& warp) {
        bfloat16 ? multiply<true>(warp) : multiply<false>(warp);
        return true;
    });
}

}  // namespace tf::emulator
