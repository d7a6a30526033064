// Products of a warp in a loop, with switches for faults, for the tests of the kernel report. Compiled and never run.
#include "cuda/device.cuh"

#ifndef TOY_MIN_BLOCKS
#define TOY_MIN_BLOCKS 1
#endif

namespace tf {

struct Toy {
    static constexpr int kThreads = 128, kMinBlocks = TOY_MIN_BLOCKS, kBlockM = 64, kBlockN = 64, kSharedBytes = 16384;
};

__global__ void __launch_bounds__(Toy::kThreads, Toy::kMinBlocks) toy_kernel(float* out, int blocks) {
    extern __shared__ __align__(1024) char shared[];
    float d[64] = {};
    for (int n = 0; n < blocks; ++n) {
        TF_UNROLL
        for (int i = 0; i < 16; ++i) {
            uint32_t a[4], b[4];
            ptx::ldmatrix(a, ptx::shared_address(shared + 1024 * i));
            ptx::ldmatrix(b, ptx::shared_address(shared + 1024 * i + 512));
#ifdef TOY_NO_TENSOR_CORES
            TF_UNROLL
            for (int j = 0; j < 4; ++j) d[4 * i + j] += static_cast<float>(a[j]) * static_cast<float>(b[j]);
#else
            ptx::mma<Bfloat16>(d + 4 * i, a, b[0], b[1]);
            ptx::mma<Bfloat16>(d + 4 * ((i + 1) % 16), a, b[2], b[3]);
#endif
        }
        ptx::sync_threads();
#ifdef TOY_LOCAL_MEMORY
        volatile float scratch[8];  // an array with a place that is known at run time only has no registers
        scratch[n % 8] = d[0];
        d[1] += scratch[(n + 1) % 8];
#endif
    }
    TF_UNROLL
    for (int e = 0; e < 64; ++e) out[ptx::thread() * 64 + e] = d[e];
}

// As the build's own sources say it; see transformer_fast/testing/cuda_objects.py.
extern "C" __attribute__((used, section("tf_facts")))
const int toy_facts[] = {Toy::kThreads, Toy::kMinBlocks, Toy::kBlockM, Toy::kBlockN, Toy::kSharedBytes};

}  // namespace tf
