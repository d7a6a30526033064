// The functions of cuda/ptx.cuh and cuda/ptx_wgmma.cuh in plain C++, whose comments say what each of them does.
//
// What an emulated kernel has to keep beyond them, since registers are plain memory here: `d` and the `a` in registers
// of a wgmma must be variables that live until the wgmma_wait that covers it. They are read and written there, and not
// when the wgmma is issued, and a change of them in between is an Error. All other faults are Errors, too, or turn into
// NaN in the results.
//
// Each function takes the line of the kernel that calls it as a last argument of its own, for reports.
#pragma once

#include <cmath>
#include <cstring>

#include "emulator/device.h"
#include "emulator/identity.h"
#include "emulator/numbers.h"
#include "emulator/operations.h"
#include "emulator/sites.h"

namespace tf {
namespace ptx {

using emulator::Operation;
using emulator::Where;

// ------------------------------------------------------------------------------------------ who and where

inline int thread() { return emulator::identity->thread; }
inline int lane() { return emulator::identity->lane; }
// A collective, as the shuffle of the real one is.
inline int warp(Where where = Where::here()) {
    emulator::converge(Operation::warp, where);
    return emulator::identity->thread >> 5;
}
inline int block_x() { return emulator::identity->block_x; }
inline int block_y() { return emulator::identity->block_y; }
inline int blocks_x() { return emulator::identity->blocks_x; }
inline int blocks_y() { return emulator::identity->blocks_y; }

inline uint32_t shared_address(const void* p, Where where = Where::here()) {
    return emulator::shared_address(p, where);
}

inline int forget(int value) { return value; }

// ------------------------------------------------------------------------------------------ a warp together

template <class T>
T shuffle_with(Operation operation, T value, int argument, Where where) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "what a shuffle can move");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = emulator::shuffle(operation, bits, argument, where);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class T>
T shuffle_xor(T value, int mask, Where where = Where::here()) {
    return shuffle_with(Operation::shuffle_xor, value, mask, where);
}
template <class T>
T shuffle(T value, int from_lane, Where where = Where::here()) {
    return shuffle_with(Operation::shuffle, value, from_lane, where);
}
inline bool any(bool value, Where where = Where::here()) { return emulator::vote(Operation::any, value, where); }
inline bool all(bool value, Where where = Where::here()) { return emulator::vote(Operation::all, value, where); }
inline void sync_warp(Where where = Where::here()) { emulator::converge(Operation::sync_warp, where); }
inline void hold_back() {}
inline bool elect_one(Where where = Where::here()) { return emulator::elect_one(where); }

// ------------------------------------------------------------------------------------------ a block together

inline void sync_threads(Where where = Where::here()) { emulator::sync_threads(where); }
inline void barrier_sync(int id, int threads, Where where = Where::here()) {
    emulator::named_barrier(Operation::barrier_sync, id, threads, where);
}
inline void barrier_arrive(int id, int threads, Where where = Where::here()) {
    emulator::named_barrier(Operation::barrier_arrive, id, threads, where);
}

// ------------------------------------------------------------------------------------------ numbers

inline float exp2(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
}
inline float log2(float x) { return std::log2(x); }
inline float reciprocal(float x) {
    const float y = 1.0f / (std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x);
    return std::fabs(y) < 0x1p-126f ? std::copysign(0.0f, y) : y;
}
template <class E>
uint32_t pack(float low, float high) {
    if constexpr (E::kType == DType::bf16) {
        return emulator::float_to_bfloat16(low) | static_cast<uint32_t>(emulator::float_to_bfloat16(high)) << 16;
    } else {
        return emulator::float_to_float16(low) | static_cast<uint32_t>(emulator::float_to_float16(high)) << 16;
    }
}
inline float to_float(Bfloat16 x) { return emulator::bfloat16_to_float(x.bits); }
inline float to_float(Float16 x) { return emulator::float16_to_float(x.bits); }
template <class E>
E from_float(float x) {
    return E{static_cast<uint16_t>(pack<E>(x, 0.0f) & 0xffffu)};
}
inline uint32_t multiply_high(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

// ------------------------------------------------------------------------------------------ global memory

// One thread runs at a time: plain additions are atomic.
inline float atomic_add(float* address, float value) {
    const float before = *address;
    *address = before + value;
    return before;
}
inline int atomic_add(int* address, int value) { return emulator::atomic_add(address, value); }
inline void fence_device() {}
inline void fence_async_proxy_global() {}
inline int load_acquire(const int* address, Where where = Where::here()) {
    return emulator::load_acquire(address, where);
}
inline void add_release(int* address, int value) { emulator::atomic_add(address, value); }

// ------------------------------------------------------------------------------------------ sm_80: cp.async

inline void cp_async_16(uint32_t target, const void* source, int bytes, Where where = Where::here()) {
    emulator::cp_async_16(target, source, bytes, where);
}
inline void cp_async_commit(Where where = Where::here()) { emulator::cp_async_commit(where); }
template <int N>
void cp_async_wait(Where where = Where::here()) {
    emulator::cp_async_wait(N, where);
}

// ------------------------------------------------------------------------------------------ sm_80: ldmatrix, mma

inline void ldmatrix(uint32_t (&r)[4], uint32_t row_address, Where where = Where::here()) {
    emulator::ldmatrix(Operation::ldmatrix, r, row_address, where);
}
inline void ldmatrix_transposed(uint32_t (&r)[4], uint32_t row_address, Where where = Where::here()) {
    emulator::ldmatrix(Operation::ldmatrix_transposed, r, row_address, where);
}
template <class E>
void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Where where = Where::here()) {
    emulator::mma(E::kType == DType::bf16, d, a, b0, b1, where);
}

// ------------------------------------------------------------------------------------------ sm_90: mbarrier

inline void mbarrier_init(uint64_t* barrier, int count, Where where = Where::here()) {
    emulator::mbarrier_init(barrier, count, where);
}
inline void fence_mbarrier_init(Where where = Where::here()) { emulator::fence_mbarrier_init(where); }
inline void mbarrier_arrive(uint64_t* barrier, Where where = Where::here()) {
    emulator::mbarrier_arrive(Operation::mbarrier_arrive, barrier, 0, where);
}
inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes, Where where = Where::here()) {
    emulator::mbarrier_arrive(Operation::mbarrier_arrive_expect, barrier, bytes, where);
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity, Where where = Where::here()) {
    emulator::mbarrier_wait(barrier, parity, where);
}

// ------------------------------------------------------------------------------------------ sm_90: TMA

inline void prefetch_tensor_map(const TensorMap* map, Where where = Where::here()) {
    emulator::prefetch_tensor_map(map, where);
}
inline void tma_load(void* target, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3,
                     Where where = Where::here()) {
    const int coordinate[] = {c0, c1, c2, c3};
    emulator::tma_load(target, map, barrier, coordinate, 4, where);
}
inline void tma_load(void* target, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3, int c4,
                     Where where = Where::here()) {
    const int coordinate[] = {c0, c1, c2, c3, c4};
    emulator::tma_load(target, map, barrier, coordinate, 5, where);
}
inline void tma_store(const TensorMap* map, const void* source, int c0, int c1, int c2, int c3,
                      Where where = Where::here()) {
    const int coordinate[] = {c0, c1, c2, c3};
    emulator::tma_store(map, source, coordinate, 4, where);
}
inline void tma_store(const TensorMap* map, const void* source, int c0, int c1, int c2, int c3, int c4,
                      Where where = Where::here()) {
    const int coordinate[] = {c0, c1, c2, c3, c4};
    emulator::tma_store(map, source, coordinate, 5, where);
}
inline void bulk_reduce_add(float* target, const float* source, int bytes, Where where = Where::here()) {
    emulator::bulk_reduce_add(target, source, bytes, where);
}
inline void bulk_commit(Where where = Where::here()) { emulator::bulk_commit(where); }
template <int N>
void bulk_wait_read(Where where = Where::here()) {
    emulator::bulk_wait(Operation::bulk_wait_read, N, where);
}
template <int N>
void bulk_wait(Where where = Where::here()) {
    emulator::bulk_wait(Operation::bulk_wait, N, where);
}
inline void fence_async_proxy(Where where = Where::here()) { emulator::fence_async_proxy(where); }

// ------------------------------------------------------------------------------------------ sm_90: registers

template <int N>
void increase_registers(Where where = Where::here()) {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256);
    emulator::set_registers(Operation::increase_registers, N, where);
}
template <int N>
void decrease_registers(Where where = Where::here()) {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256);
    emulator::set_registers(Operation::decrease_registers, N, where);
}

// ------------------------------------------------------------------------------------------ sm_90: wgmma

inline uint64_t matrix_descriptor(const void* shared, int leading, int stride, Where where = Where::here()) {
    return emulator::matrix_descriptor(shared, leading, stride, where);
}
inline void wgmma_fence(Where where = Where::here()) { emulator::wgmma_fence(where); }
inline void wgmma_commit(Where where = Where::here()) { emulator::wgmma_commit(where); }
template <int N>
void wgmma_wait(Where where = Where::here()) {
    emulator::wgmma_wait(N, where);
}
template <int N>
void wgmma_pin(float (&)[N]) {}

// The widths that cuda/ptx_wgmma.cuh has.
constexpr bool is_wgmma_width(int n) {
    return n == 32 || n == 64 || n == 80 || n == 96 || n == 128 || n == 160 || n == 176 || n == 192 || n == 256;
}
template <class E, int N, bool kTransposedA, bool kTransposedB>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, Where where = Where::here()) {
    static_assert(is_wgmma_width(N));
    emulator::WgmmaArguments arguments{
        E::kType == DType::bf16, N, kTransposedA, kTransposedB, d, nullptr, a, b, accumulate};
    emulator::wgmma(arguments, where);
}
template <class E, int N, bool kTransposedB>
void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate, Where where = Where::here()) {
    static_assert(is_wgmma_width(N));
    emulator::WgmmaArguments arguments{E::kType == DType::bf16, N, false, kTransposedB, d, a, 0, b, accumulate};
    emulator::wgmma(arguments, where);
}

}  // namespace ptx
}  // namespace tf
