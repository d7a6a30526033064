// What the functions of emulator/ptx.h call: the operations of one thread, or of one lane of a warp.
#pragma once

#include <cstdint>

#include "emulator/device.h"
#include "emulator/sites.h"

namespace tf::emulator {

uint32_t shared_address(const void*, Where);

// barriers.cpp
void sync_threads(Where);
void named_barrier(Operation, int id, int threads, Where);
void mbarrier_init(uint64_t* barrier, int count, Where);
void fence_mbarrier_init(Where);
void mbarrier_arrive(Operation, uint64_t* barrier, int bytes, Where);
void mbarrier_wait(uint64_t* barrier, uint32_t parity, Where);
int load_acquire(const int* address, Where);
int atomic_add(int* address, int value);  // by which blocks tell each other something

// collectives.cpp
uint64_t shuffle(Operation, uint64_t bits, int argument, Where);
bool vote(Operation, bool value, Where);
bool elect_one(Where);
void converge(Operation, Where);  // sync_warp and warp
void set_registers(Operation, int count, Where);
void ldmatrix(Operation, uint32_t (&r)[4], uint32_t row_address, Where);
void mma(bool bfloat16, float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Where);

// async_copy.cpp, tma.cpp
void cp_async_16(uint32_t target, const void* source, int bytes, Where);
void cp_async_commit(Where);
void cp_async_wait(int n, Where);
void prefetch_tensor_map(const TensorMap*, Where);
void tma_load(void* target, const TensorMap*, uint64_t* barrier, const int* coordinate, int rank, Where);
void tma_store(const TensorMap*, const void* source, const int* coordinate, int rank, Where);
void bulk_reduce_add(float* target, const float* source, int bytes, Where);
void bulk_commit(Where);
void bulk_wait(Operation, int n, Where);
void fence_async_proxy(Where);

// wgmma.cpp
uint64_t matrix_descriptor(const void* shared, int leading, int stride, Where);
void wgmma_fence(Where);
void wgmma_commit(Where);
void wgmma_wait(int n, Where);

struct WgmmaArguments {
    bool bfloat16;
    int columns;
    bool transposed_a, transposed_b;
    float* d;
    const uint32_t* registers;  // of A; null where it comes from shared memory
    uint64_t a, b;
    bool accumulate;
};
void wgmma(WgmmaArguments&, Where);

}  // namespace tf::emulator
