// Every PTX instruction of the project as one function: the only inline assembly there is.
//
// emulator/ptx.h declares the same functions in plain C++. A kernel may rely on what the comments here say and on
// nothing else; they follow the PTX ISA 9.0, whose section is named where the wording matters.
#pragma once

#include "cuda/device.cuh"

namespace tf {
namespace ptx {

// ------------------------------------------------------------------------------------------ who and where

TF_DEVICE int thread() { return static_cast<int>(threadIdx.x); }  // in the block
TF_DEVICE int lane() { return static_cast<int>(threadIdx.x & 31); }
// The warp's number, told by a shuffle so that the compiler knows all lanes agree on it (branches become uniform).
TF_DEVICE int warp() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x >> 5), 0); }
TF_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
TF_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
TF_DEVICE int blocks_x() { return static_cast<int>(gridDim.x); }
TF_DEVICE int blocks_y() { return static_cast<int>(gridDim.y); }

// The 32-bit address of shared memory, which ldmatrix, cp.async, mbarrier and TMA take.
TF_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// The same number, but the compiler does not know that: what follows from it is computed again where it is used, and
// need not stay in registers until then.
TF_DEVICE int forget(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// ------------------------------------------------------------------------------------------ a warp together

template <class T>
TF_DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
TF_DEVICE T shuffle(T value, int from_lane) {
    return __shfl_sync(0xffffffffu, value, from_lane);
}
TF_DEVICE bool any(bool value) { return __any_sync(0xffffffffu, value); }
TF_DEVICE bool all(bool value) { return __all_sync(0xffffffffu, value); }
TF_DEVICE void sync_warp() { __syncwarp(); }
// No synchronisation: keeps the compiler from moving reads across, for which it would want more registers.
TF_DEVICE void hold_back() { __syncwarp(); }
// True in one lane of a converged warp, always the same one.
TF_DEVICE bool elect_one() {
    uint32_t chosen;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(chosen));
    return chosen != 0;
}

// ------------------------------------------------------------------------------------------ a block together

TF_DEVICE void sync_threads() { __syncthreads(); }
// Barriers 1 to 15; `threads` is a multiple of 32 and counts those that sync and those that only arrive.
TF_DEVICE void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
TF_DEVICE void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ------------------------------------------------------------------------------------------ numbers

TF_DEVICE float exp2(float x) {  // relative error 2^-22; subnormal results become 0; exp2(-inf) = 0
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
TF_DEVICE float log2(float x) {  // log2(0) = -inf
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
TF_DEVICE float reciprocal(float x) {  // relative error 2^-23; 1 / infinity = 0
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Two floats rounded to nearest, `low` in the lower half: fragments of matrix products hold pairs like this.
template <class E>
TF_DEVICE uint32_t pack(float low, float high);
template <>
TF_DEVICE uint32_t pack<Bfloat16>(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
template <>
TF_DEVICE uint32_t pack<Float16>(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
TF_DEVICE float to_float(Bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
TF_DEVICE float to_float(Float16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
template <class E>
TF_DEVICE E from_float(float x) {
    return E{static_cast<uint16_t>(pack<E>(x, 0.0f) & 0xffffu)};
}
TF_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

// ------------------------------------------------------------------------------------------ global memory

TF_DEVICE float atomic_add(float* address, float value) { return atomicAdd(address, value); }
TF_DEVICE int atomic_add(int* address, int value) { return atomicAdd(address, value); }
TF_DEVICE void fence_device() { __threadfence(); }
// Before asynchronous accesses of global memory that come after another block's, as load_acquire has told.
TF_DEVICE void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
TF_DEVICE int load_acquire(const int* address) {
    int value;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}
// Adds to an int after everything this thread wrote before is visible to whoever acquires it.
TF_DEVICE void add_release(int* address, int value) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// ------------------------------------------------------------------------------------------ sm_80: cp.async

// Copies 16 bytes to shared memory: `bytes` (0 to 16) from `source`, zeros for the rest. Nothing is read for 0, but
// the address must be valid all the same. Both addresses are multiples of 16. The data may be read by this thread
// after cp_async_wait, by others after a barrier on top of it.
TF_DEVICE void cp_async_16(uint32_t target, const void* source, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes)
                 : "memory");
}
TF_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>  // until no more than the N youngest groups of this thread are on their way
TF_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ------------------------------------------------------------------------------------------ sm_80: ldmatrix, mma

// Four 8x8 matrices of two-byte elements; lanes 8i..8i+7 give the addresses (multiples of 16) of the rows of matrix i.
// Lane l gets elements 2(l%4), 2(l%4)+1 of row l/4 of matrix i in r[i].
TF_DEVICE void ldmatrix(uint32_t (&r)[4], uint32_t row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row_address)
                 : "memory");
}
// The same of the transposed matrices: lane l gets rows 2(l%4), 2(l%4)+1 of column l/4.
TF_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], uint32_t row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row_address)
                 : "memory");
}

// d += a b for a 16x16 (row major) and b 16x8 (column major), float32 sums. With g = lane/4 and t = lane%4:
//   a[0] (g, 2t..)  a[1] (g+8, 2t..)  a[2] (g, 2t+8..)  a[3] (g+8, 2t+8..)     pairs of neighbours in k
//   b0 (k 2t.., n g)  b1 (k 2t+8.., n g)
//   d[0], d[1] (g, 2t), (g, 2t+1)   d[2], d[3] (g+8, 2t), (g+8, 2t+1)
// `d` points at four consecutive floats of an array in registers.
template <class E>
TF_DEVICE void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
TF_DEVICE void mma<Bfloat16>(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
TF_DEVICE void mma<Float16>(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ------------------------------------------------------------------------------------------ sm_90: mbarrier

// A barrier in shared memory, 8 bytes. A phase ends when `count` arrivals and all announced bytes have come; phases
// are numbered 0, 1, 0, ... by their parity. mbarrier_wait(b, parity) returns once the phase of that parity has ended:
// on a fresh barrier waiting for parity 1 returns at once.
TF_DEVICE void mbarrier_init(uint64_t* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// Makes the barriers that this thread has initialised visible to the asynchronous proxy; a sync_threads follows.
TF_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
TF_DEVICE void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// One arrival, and `bytes` more for the current phase to wait for.
TF_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}
TF_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred p;\nagain:\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%0], %1, 0x989680;\n"
        "@p bra done;\nbra again;\ndone:\n}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// ------------------------------------------------------------------------------------------ sm_90: TMA

// Copies of boxes between global memory and dense tiles of shared memory. By one thread. The tile is dense in the
// order of the box; with 128-byte swizzle it is 1024-byte aligned, and the 16-byte chunk c of its row r (of 128 bytes)
// lies at chunk c ^ (r % 8).
TF_DEVICE void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Elements outside of the tensor arrive as 0, and count as bytes.
TF_DEVICE void tma_load(void* target, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(shared_address(target)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
TF_DEVICE void tma_load(void* target, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3, int c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(target)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}
// What was written to shared memory by plain stores must be fenced first (fence_async_proxy, then a barrier).
TF_DEVICE void tma_store(const TensorMap* map, const void* source, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                 "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}
TF_DEVICE void tma_store(const TensorMap* map, const void* source, int c0, int c1, int c2, int c3, int c4) {
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
                 "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
                 : "memory");
}
// global[i] += shared[i] for `bytes` / 4 floats, element by element atomic. Multiples of 16 bytes.
TF_DEVICE void bulk_reduce_add(float* target, const float* source, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(target),
                 "r"(shared_address(source)), "r"(bytes)
                 : "memory");
}
TF_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N>  // until no more than the N youngest groups of this thread still read shared memory
TF_DEVICE void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
template <int N>  // until no more than the N youngest groups are unfinished
TF_DEVICE void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
// Orders this thread's plain accesses of shared memory before those of the asynchronous proxy (TMA, wgmma) that
// another thread, or this one, starts after a barrier.
TF_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ------------------------------------------------------------------------------------------ sm_90: registers

template <int N>  // by all warps of a warpgroup
TF_DEVICE void increase_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
TF_DEVICE void decrease_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

}  // namespace ptx
}  // namespace tf

#include "cuda/ptx_wgmma.cuh"
