// Linked to the CUDA runtime statically, and to the driver not at all: the module imports where there is none.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "cuda/host/cuda_error.h"

namespace tf {
namespace cuda {

namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled find_encode_tiled() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    require(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
            "asking the driver for cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess)
        throw Error("the driver has no cuTensorMapEncodeTiled (it came with 12.0)");
    return reinterpret_cast<EncodeTiled>(found);
}

}  // namespace

Machine machine_of(int device) {
    const auto ask = [&](cudaDeviceAttr attribute) {
        int value = 0;
        require(cudaDeviceGetAttribute(&value, attribute, device), "asking what the device has");
        return value;
    };
    return {ask(cudaDevAttrComputeCapabilityMajor) * 10 + ask(cudaDevAttrComputeCapabilityMinor),
            ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrL2CacheSize),
            ask(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

int device_count() {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        cudaGetLastError();
        return 0;
    }
    return count;
}

std::string why_not() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess) return count > 0 ? "" : "there is no CUDA device";
    cudaGetLastError();
    if (error == cudaErrorNoDevice) return "there is no CUDA device";
    if (error != cudaErrorInsufficientDriver) return words(error);
    int driver = 0;  // of CUDA, 12040 for 12.4; 0 without a driver
    cudaDriverGetVersion(&driver);
    if (driver == 0) return "there is no NVIDIA driver";
    const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
    return "the NVIDIA driver is of CUDA " + version(driver) + ", and this module is built with CUDA " +
           version(CUDART_VERSION);
}

// Also where it seems to be current already: PyTorch has a runtime of its own, which changes it unseen.
void make_current(int device) { require(cudaSetDevice(device), "making the device current"); }

void encode(TensorMap& map, const TensorGeometry& geometry, const char* what) {
    static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
    static const EncodeTiled encode_tiled = find_encode_tiled();
    const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
    const auto type = geometry.dtype == DType::bf16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                      : geometry.dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                     : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    const CUresult result = encode_tiled(
        reinterpret_cast<CUtensorMap*>(&map), type, static_cast<cuuint32_t>(geometry.rank),
        const_cast<void*>(geometry.data), reinterpret_cast<const cuuint64_t*>(geometry.size),
        reinterpret_cast<const cuuint64_t*>(geometry.stride), geometry.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        geometry.swizzle_128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result == CUDA_SUCCESS) return;
    std::string text = "no TMA descriptor of " + std::string(what) + ": CUresult " + std::to_string(result) + "; sizes";
    for (int i = 0; i < geometry.rank; ++i) text += " " + std::to_string(geometry.size[i]);
    text += ", strides";
    for (int i = 0; i + 1 < geometry.rank; ++i) text += " " + std::to_string(geometry.stride[i]);
    text += ", box";
    for (int i = 0; i < geometry.rank; ++i) text += " " + std::to_string(geometry.box[i]);
    throw Error(text);
}

}  // namespace cuda
}  // namespace tf
