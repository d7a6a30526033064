// What a kernel is written in: C++17, the words below, and the functions of tf::ptx. Nothing else of CUDA.
//
// So one source is compiled twice: by nvcc, where tf::ptx is inline assembly (cuda/ptx.cuh), and by any C++ compiler
// with TF_EMULATED, where it is plain C++ (emulator/ptx.h) and a block's threads are fibers of one CPU thread.
#pragma once

#include "core/platform.h"

#if defined(TF_EMULATED)
#define TF_DEVICE inline
#define TF_UNROLL
#define TF_NO_UNROLL
#elif defined(__CUDACC__)
#define TF_DEVICE __device__ __forceinline__
#define TF_UNROLL _Pragma("unroll")
#define TF_NO_UNROLL _Pragma("unroll 1")
#endif  // else: the host side of CUDA, which takes the types alone

namespace tf {

// Two-byte elements as kernels name them. Their arithmetic is that of packed conversions and matrix products.
struct Bfloat16 {
    uint16_t bits;
    static constexpr DType kType = DType::bf16;
};
struct Float16 {
    uint16_t bits;
    static constexpr DType kType = DType::f16;
};

struct alignas(16) Vector16 {  // 16 bytes: what one load, store or cp.async moves
    uint32_t word[4];
};

// A TMA descriptor: CUtensorMap to the driver (whose alignment CUDA 13 has raised from 64 to 128), the emulator's own
// fields on a CPU. Opaque to kernels.
struct alignas(128) TensorMap {
    uint64_t opaque[16] = {};
};

// The geometry of a TMA descriptor, from the fastest dimension on. Strides are in bytes, of dimensions 1 and up, and
// multiples of 16, as is the address. Boxes have at most 256 entries a dimension, and 128 bytes in dimension 0 where
// they are swizzled by 128 bytes. What a box covers beyond a size is read as 0 and never written.
struct TensorGeometry {
    DType dtype = DType::bf16;
    int rank = 4;
    const void* data = nullptr;
    uint64_t size[5] = {1, 1, 1, 1, 1};
    uint64_t stride[4] = {16, 16, 16, 16};
    uint32_t box[5] = {1, 1, 1, 1, 1};
    bool swizzle_128 = true;
};

}  // namespace tf

#if defined(TF_EMULATED)
#include "emulator/ptx.h"
#elif defined(__CUDACC__)
#include "cuda/ptx.cuh"
#endif
