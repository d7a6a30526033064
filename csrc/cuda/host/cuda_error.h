// Errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "cuda/host/runtime.h"

namespace tf {
namespace cuda {

inline std::string words(cudaError_t error) {
    return std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ")";
}

inline void require(cudaError_t error, const char* doing) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or the next call would hear of it again
    throw Error(words(error) + " at " + doing);
}

}  // namespace cuda
}  // namespace tf
