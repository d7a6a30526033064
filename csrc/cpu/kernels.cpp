// The table of this instruction set.
#include "kernels.h"

#include "tile.h"

#define TF_STRING_(x) #x
#define TF_STRING(x) TF_STRING_(x)

namespace tf {
namespace TF_ISA {
namespace {

// The rate of the kernels' inner instruction on registers alone: what "peak" means in the benchmarks.
template <class Product, bool kFactor>
double spin(int64_t repeats) {
    constexpr int kChains = 12;
    F sum[kChains], a = set1(0.5f), b = set1(1.0f);
    // Chains that differ, or the compiler keeps one of them.
    unroll<kChains>([&](auto i) TF_INLINE_LAMBDA { sum[i] = set1(static_cast<float>(repeats % 7 + i)); });
    for (int64_t k = 0; k < repeats; ++k) {
        // The running value is a factor, so that no product can be taken out of the chain.
        unroll<kChains>([&](auto i) TF_INLINE_LAMBDA {
            sum[i] = kFactor ? Product::multiply_add(b, sum[i], a) : Product::multiply_add(sum[i], a, b);
        });
    }
    F total = zero();
    unroll<kChains>([&](auto i) TF_INLINE_LAMBDA { total += sum[i]; });
    __asm__ volatile("" : : "m"(total));
    return 2.0 * kChains * kLanes * static_cast<double>(repeats);
}

#if defined(__AMX_BF16__)
// The same of tiles, on numbers that are not zero: those would take less power, and so less time.
double spin_tiles(int64_t repeats) {
    const TilesInUse tiles;
    alignas(64) uint16_t numbers[2 * kSide * kSide];
    for (int i = 0; i < 2 * kSide * kSide; ++i) numbers[i] = static_cast<uint16_t>(0x3F00 + i * 37 % 256);  // 0.5 to 2
    tile_shapes.require(kSide, 0);
    tile_load<kTileA>(numbers, kSide * 4);
    tile_load<kTileB>(numbers, kSide * 4);
    unroll<4>([&](auto c) TF_INLINE_LAMBDA { tile_zero<c>(); });
    for (int64_t k = 0; k < repeats; ++k) {
        unroll<4>([&](auto c) TF_INLINE_LAMBDA { tile_multiply_add<c, kTileA, kTileB>(); });
    }
    return 2.0 * 4 * kSide * kSide * 2 * kSide * static_cast<double>(repeats);
}
#endif

double peak_flops(DType dtype, int64_t repeats) {
#if defined(__AMX_BF16__)
    if (dtype == DType::bf16) return spin_tiles(repeats);
#elif defined(__AVX512BF16__)
    if (dtype == DType::bf16) return 2.0 * spin<Bf16PairProduct, false>(repeats);
#endif
    (void)dtype;
    return spin<Float32Product, true>(repeats);
}

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {
    TF_STRING(TF_ISA),
    kRows,
    kTiles * kRows,
    kLanes,
    kLanes / 2,
    forward_workspace,
    forward,
    decode_workspace,
    decode_state,
    decode,
    combine,
    backward_workspace,
    backward,
    store_gradient_row,
    pointwise,
    linear_layout,
    lay_out_linear,
    linear_workspace,
    linear,
    peak_flops,
};

}  // namespace TF_ISA
}  // namespace tf
