// From a kernel's struct to its KernelInfo. Included by the generated sources alone, one for each instance.
#pragma once

#include <type_traits>

#include "cuda/host/runtime.h"

#if defined(TF_EMULATED)
#include "emulator/launch.h"
#else
#include <cuda_runtime.h>

#include <atomic>

#include "cuda/host/cuda_error.h"
#endif

namespace tf {
namespace cuda {

static_assert(sizeof(Arguments) <= 4096, "what a kernel of compute capability 8.0 takes by value");

// ------------------------------------------------------------------------------------------ what a kernel may have

template <class K, class = void>
struct PersistentOf {
    static constexpr bool value = false;
};
template <class K>
struct PersistentOf<K, std::void_t<decltype(K::kPersistent)>> {
    static constexpr bool value = K::kPersistent;
};

template <class K, class = void>
struct DescribeOf {
    static constexpr void (*value)(const Arguments&, MapRequests&) = nullptr;
};
template <class K>
struct DescribeOf<K, std::void_t<decltype(&K::describe)>> {
    static constexpr void (*value)(const Arguments&, MapRequests&) = &K::describe;
};

template <class K, class = void>
struct RefusesOf {
    static constexpr const char* (*value)(const Arguments&) = nullptr;
};
template <class K>
struct RefusesOf<K, std::void_t<decltype(&K::refuses)>> {
    static constexpr const char* (*value)(const Arguments&) = &K::refuses;
};

template <class K, class = void>
struct SuitsOf {
    static constexpr bool (*value)(const Problem&) = nullptr;
};
template <class K>
struct SuitsOf<K, std::void_t<decltype(&K::suits)>> {
    static constexpr bool (*value)(const Problem&) = &K::suits;
};

template <class K, class = void>
struct SumsOf {
    static constexpr int64_t (*floats)(const Problem&) = nullptr;
    static constexpr int64_t (*turns)(const Problem&) = nullptr;
};
template <class K>
struct SumsOf<K, std::void_t<decltype(&K::dquery_sum_floats)>> {
    static constexpr int64_t (*floats)(const Problem&) = &K::dquery_sum_floats;
    static constexpr int64_t (*turns)(const Problem&) = &K::turn_count;
};

// ------------------------------------------------------------------------------------------ the launch

#if defined(TF_EMULATED)

template <class K>
void launch(const KernelInfo& info, const Arguments& a, int grid_x, int grid_y, Stream) {
    emulator::launch({grid_x, grid_y, info.threads, info.shared_bytes}, [&](char* shared) { K::run(a, shared); });
}

#else

template <class K>
__global__ void __launch_bounds__(K::kThreads, K::kMinBlocks) attention_kernel(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) char shared[];
    K::run(a, shared);
}

template <class K>
void launch(const KernelInfo& info, const Arguments& a, int grid_x, int grid_y, Stream stream) {
    const void* kernel = reinterpret_cast<const void*>(&attention_kernel<K>);
    if (info.shared_bytes > 48 << 10) {  // more than that has to be asked for, once on each device
        static std::atomic<uint64_t> asked{0};
        int device = 0;
        require(cudaGetDevice(&device), "asking for the device");
        const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
        if ((asked.load(std::memory_order_relaxed) & bit) == 0) {
            require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, info.shared_bytes),
                    "asking for shared memory");
            asked.fetch_or(bit, std::memory_order_relaxed);
        }
    }
    void* arguments[] = {const_cast<Arguments*>(&a)};
    require(cudaLaunchKernel(kernel, dim3(grid_x, grid_y), dim3(info.threads), arguments, info.shared_bytes,
                             static_cast<cudaStream_t>(stream)),
            "the launch");
}

#endif

template <class K>
constexpr KernelInfo info_of(const char* name, const char* phase, int family, DType dtype, int head_dim, int modified) {
    return {name,
            phase,
            family,
            dtype,
            head_dim,
            modified,
            K::kBlockM,
            K::kBlockN,
            K::kThreads,
            K::kMinBlocks,
            K::kSharedBytes,
            PersistentOf<K>::value,
            SuitsOf<K>::value,
            RefusesOf<K>::value,
            DescribeOf<K>::value,
            SumsOf<K>::floats,
            SumsOf<K>::turns,
            &launch<K>};
}

}  // namespace cuda
}  // namespace tf
