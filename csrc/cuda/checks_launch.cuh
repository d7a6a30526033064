// What the checks' kernels are given, and how each is launched.
#pragma once

#include <vector>

#include "cuda/device.cuh"

#if defined(TF_EMULATED)
#include "emulator/launch.h"
#else
#include <cuda_runtime.h>

#include "cuda/host/cuda_error.h"
#endif

namespace tf {
namespace cuda {

struct CheckArguments {
    const void* in[4];
    void* out[2];
    int64_t number[16];
    TensorMap map;
};

template <class T>
TF_DEVICE const T* input(const CheckArguments& a, int i) {
    return static_cast<const T*>(a.in[i]);
}
template <class T>
TF_DEVICE T* output(const CheckArguments& a, int i) {
    return static_cast<T*>(a.out[i]);
}
TF_DEVICE int number(const CheckArguments& a, int i) { return static_cast<int>(a.number[i]); }

// What a check's kernel inherits: its grid, its block and its shared memory.
template <int kThreads_, int kSharedBytes_ = 1024, int kBlocksX_ = 1, int kBlocksY_ = 1>
struct CheckShape {
    static constexpr int kThreads = kThreads_, kSharedBytes = kSharedBytes_;
    static constexpr int kBlocksX = kBlocksX_, kBlocksY = kBlocksY_;
};

// Plain copies of words, by all threads of a block.
template <class K>
TF_DEVICE void copy_words(uint32_t* target, const uint32_t* source, int bytes) {
    for (int i = ptx::thread(); i < bytes / 4; i += K::kThreads) target[i] = source[i];
}
template <class K>
TF_DEVICE void fill_words(uint32_t* target, uint32_t word, int bytes) {
    for (int i = ptx::thread(); i < bytes / 4; i += K::kThreads) target[i] = word;
}
TF_DEVICE uint32_t* words(void* p) { return static_cast<uint32_t*>(p); }

struct Check {
    const char* name;
    int capability;
    void (*launch)(const CheckArguments&, void* stream);
};

#if defined(TF_EMULATED)

template <class K>
void launch_check(const CheckArguments& a, void*) {
    emulator::launch({K::kBlocksX, K::kBlocksY, K::kThreads, K::kSharedBytes},
                     [&](char* shared) { K::run(a, shared); });
}

#else

template <class K>
__global__ void __launch_bounds__(K::kThreads, 1) check_kernel(const __grid_constant__ CheckArguments a) {
    extern __shared__ __align__(1024) char shared[];
    K::run(a, shared);
}

template <class K>
void launch_check(const CheckArguments& a, void* stream) {
    require(cudaFuncSetAttribute(check_kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, K::kSharedBytes),
            "asking for shared memory");
    check_kernel<K>
        <<<dim3(K::kBlocksX, K::kBlocksY), K::kThreads, K::kSharedBytes, static_cast<cudaStream_t>(stream)>>>(a);
    require(cudaGetLastError(), "a check's launch");
}

#endif

// The tables, each in a file compiled for the architectures it is of.
std::vector<Check> checks_sm80();
std::vector<Check> checks_sm90();
std::vector<Check> checks_wgmma();
#if defined(TF_EMULATED)
std::vector<Check> checks_faults();  // of the emulator itself: what it must catch
#endif

}  // namespace cuda
}  // namespace tf
