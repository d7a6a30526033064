// Checks of wgmma: every width, type, and layout of its operands.
#include <initializer_list>

#include "cuda/checks_launch.cuh"

namespace tf {
namespace cuda {
namespace {

enum class Source { registers, rows_along_k, rows_along_m };  // of A; B has no registers

constexpr int kImageBytes = 196608;

// Where a matrix lies, five numbers: offset in shared memory, the descriptor's leading and stride, and the bytes from
// 16 elements of K to the next and from 64 to the next.
struct Placed {
    int offset, leading, stride, step, jump;

    TF_DEVICE uint64_t descriptor(const char* shared, int k16) const {
        return ptx::matrix_descriptor(shared + offset + k16 / 4 * jump + k16 % 4 * step, leading, stride);
    }
};
TF_DEVICE Placed placed(const CheckArguments& a, int first) {
    return {number(a, first), number(a, first + 1), number(a, first + 2), number(a, first + 3), number(a, first + 4)};
}

// in 0: number 0 bytes of shared memory; number 1: elements of K, a multiple of 64; number 2: whether the first product
// adds to d; numbers 3 and 8 on: where A and B lie. in 1: d at first (thread, N / 2), in 2: A of each thread where it
// comes in registers (K / 16, thread, 4). out 0: d.
template <class E, int N, Source kA, bool kTransposedB>
struct WgmmaCheck : CheckShape<128, kImageBytes> {
    static TF_DEVICE void run(const CheckArguments& a, char* shared) {
        const int thread = ptx::thread(), blocks = number(a, 1) / 64;
        const Placed left = placed(a, 3), right = placed(a, 8);
        bool accumulate = number(a, 2) != 0;
        copy_words<WgmmaCheck>(words(shared), input<uint32_t>(a, 0), number(a, 0));
        ptx::fence_async_proxy();
        ptx::sync_threads();
        float d[N / 2];
        TF_UNROLL
        for (int i = 0; i < N / 2; ++i) d[i] = input<float>(a, 1)[thread * (N / 2) + i];
        for (int block = 0; block < blocks; ++block) {
            uint32_t fragment[4][4];
            if constexpr (kA == Source::registers) {
                TF_UNROLL
                for (int i = 0; i < 16; ++i) {
                    fragment[i / 4][i % 4] =
                        input<uint32_t>(a, 2)[((block * 4 + i / 4) * kThreads + thread) * 4 + i % 4];
                }
            }
            ptx::wgmma_pin(d);
            ptx::wgmma_fence();
            TF_UNROLL
            for (int k = 0; k < 4; ++k) {
                const uint64_t b = right.descriptor(shared, block * 4 + k);
                if constexpr (kA == Source::registers) {
                    ptx::wgmma<E, N, kTransposedB>(d, fragment[k], b, accumulate);
                } else {
                    ptx::wgmma<E, N, kA == Source::rows_along_m, kTransposedB>(
                        d, left.descriptor(shared, block * 4 + k), b, accumulate);
                }
                accumulate = true;
            }
            ptx::wgmma_commit();
            ptx::wgmma_wait<0>();
            ptx::wgmma_pin(d);
        }
        TF_UNROLL
        for (int i = 0; i < N / 2; ++i) output<float>(a, 0)[thread * (N / 2) + i] = d[i];
    }
};

// Two warpgroups, each with its own 64 rows of A (numbers 3 on, number 13 bytes apart), and two groups of products in
// flight: the first 64 columns of B, then the next (number 14 bytes further). out 0: (half, thread, 32).
template <class E>
struct WgmmaInFlight : CheckShape<256, kImageBytes> {
    static TF_DEVICE void product(float (&d)[32], const char* shared, const Placed& left, const Placed& right) {
        ptx::wgmma_pin(d);
        ptx::wgmma_fence();
        TF_UNROLL
        for (int k = 0; k < 4; ++k) {
            ptx::wgmma<E, 64, false, false>(d, left.descriptor(shared, k), right.descriptor(shared, k), k != 0);
        }
        ptx::wgmma_commit();
    }
    static TF_DEVICE void run(const CheckArguments& a, char* shared) {
        const int thread = ptx::thread();
        Placed left = placed(a, 3), right = placed(a, 8), next = right;
        left.offset += ptx::warp() / 4 * number(a, 13);
        next.offset += number(a, 14);
        copy_words<WgmmaInFlight>(words(shared), input<uint32_t>(a, 0), number(a, 0));
        ptx::fence_async_proxy();
        ptx::sync_threads();
        float first[32], second[32];
        TF_UNROLL
        for (int i = 0; i < 32; ++i) first[i] = second[i] = 0.0f;
        product(first, shared, left, right);
        product(second, shared, left, next);
        ptx::wgmma_wait<1>();
        ptx::wgmma_pin(first);
        TF_UNROLL
        for (int i = 0; i < 32; ++i) output<float>(a, 0)[thread * 32 + i] = first[i];
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(second);
        TF_UNROLL
        for (int i = 0; i < 32; ++i) output<float>(a, 0)[(kThreads + thread) * 32 + i] = second[i];
    }
};

template <class E, int N, Source kA, bool kTransposedB>
constexpr void (*check_of)(const CheckArguments&, void*) = launch_check<WgmmaCheck<E, N, kA, kTransposedB>>;

// Names: the type, the width, A's layout, B's: r in registers, k with rows along K, t with rows along M or N.
#define TF_CHECK_LAYOUTS(E, TYPE, N)                                                     \
    {"wgmma_" TYPE "_" #N "_rk", 90, check_of<E, N, Source::registers, false>},          \
        {"wgmma_" TYPE "_" #N "_rt", 90, check_of<E, N, Source::registers, true>},       \
        {"wgmma_" TYPE "_" #N "_kk", 90, check_of<E, N, Source::rows_along_k, false>},   \
        {"wgmma_" TYPE "_" #N "_kt", 90, check_of<E, N, Source::rows_along_k, true>},    \
        {"wgmma_" TYPE "_" #N "_tk", 90, check_of<E, N, Source::rows_along_m, false>}, { \
        "wgmma_" TYPE "_" #N "_tt", 90, check_of<E, N, Source::rows_along_m, true>       \
    }
#define TF_CHECK_TYPES(N) TF_CHECK_LAYOUTS(Bfloat16, "bf16", N), TF_CHECK_LAYOUTS(Float16, "f16", N)

}  // namespace

std::vector<Check> checks_wgmma() {
    return {
        TF_CHECK_TYPES(32),
        TF_CHECK_TYPES(64),
        TF_CHECK_TYPES(80),
        TF_CHECK_TYPES(96),
        TF_CHECK_TYPES(128),
        TF_CHECK_TYPES(160),
        TF_CHECK_TYPES(176),
        TF_CHECK_TYPES(192),
        TF_CHECK_TYPES(256),
        {"wgmma_in_flight_bf16", 90, launch_check<WgmmaInFlight<Bfloat16>>},
        {"wgmma_in_flight_f16", 90, launch_check<WgmmaInFlight<Float16>>},
    };
}

#undef TF_CHECK_TYPES
#undef TF_CHECK_LAYOUTS

}  // namespace cuda
}  // namespace tf
