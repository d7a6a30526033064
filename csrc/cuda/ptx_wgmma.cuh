// wgmma: matrix products of a warpgroup (four warps in a row), from shared memory and asynchronous. Part of ptx.cuh.
//
// D (64 x N, float32) += A (64 x 16) B (16 x N). Warp w of the group holds rows 16w..16w+15 of D, spread over its lanes
// as by mma: with g = lane/4 and t = lane%4, d[4j + 0..3] are (g, 8j+2t), (g, 8j+2t+1), (g+8, 8j+2t), (g+8, 8j+2t+1).
// B comes from shared memory, A from there or from registers: a[0..3] of a warp as mma's a for its 16 rows.
//
// In flight, from the issue to the wait: d, and a in registers, must not be touched, shared operands not written.
// Order: wgmma_fence() by all warps before the first wgmma and whenever registers that it takes were written by other
// instructions; any number of wgmma; wgmma_commit(); wgmma_wait<N>() until no more than the N youngest are unfinished.
#pragma once

#include "cuda/ptx.cuh"

namespace tf {
namespace ptx {

// A matrix in shared memory with 128-byte swizzle, 1024-byte aligned but for steps along a row. Rows have 64 elements.
//
// Rows along M or N, 64 elements of K a row ("K-major"; kTransposed = false): `stride` is the bytes from one group of 8
//   rows to the next (1024 if dense), `leading` is not used. 16 elements further in K: 32 bytes further.
// Rows along K, 64 elements of M or N a row ("MN-major"; kTransposed = true): `stride` is the bytes from one group of 8
//   rows to the next (1024 if dense), `leading` the bytes to the tile of the next 64 elements of M or N.
//   16 elements further in K: 16 rows further.
TF_DEVICE uint64_t matrix_descriptor(const void* shared, int leading, int stride) {
    return static_cast<uint64_t>((shared_address(shared) & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
           static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 62;
}

TF_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
TF_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
TF_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Tells the compiler that an accumulator changes here, so that it moves no use of it across a wait.
template <int N>
TF_DEVICE void wgmma_pin(float (&d)[N]) {
    TF_UNROLL
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <class E, int N>
struct Wgmma;

// d = a b, or d += a b with `accumulate`; both from shared memory.
template <class E, int N, bool kTransposedA, bool kTransposedB>
TF_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    Wgmma<E, N>::template shared<kTransposedA, kTransposedB>(d, a, b, accumulate);
}
// The same with `a` in registers.
template <class E, int N, bool kTransposedB>
TF_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    Wgmma<E, N>::template registers<kTransposedB>(d, a, b, accumulate);
}

// One specialisation for each type and width that a kernel uses. REGS is the list of d's operands; AFTER numbers the
// operands behind them.
#define TF_WGMMA_OUT8(i)                                                                                        \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define TF_WGMMA(E, TYPE, N, REGS, P0, P1, P2, P3, P4, P5, P6, ...)                                                \
    template <>                                                                                                    \
    struct Wgmma<E, N> {                                                                                           \
        template <bool kTransposedA, bool kTransposedB>                                                            \
        static TF_DEVICE void shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {                 \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N       \
                         "k16.f32." TYPE "." TYPE " {" REGS "}, " P0 ", " P1 ", p, 1, 1, " P3 ", " P4 ";\n}"       \
                         : __VA_ARGS__                                                                             \
                         : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kTransposedA)), \
                           "n"(static_cast<int>(kTransposedB))                                                     \
                         : "memory");                                                                              \
        }                                                                                                          \
        template <bool kTransposedB>                                                                               \
        static TF_DEVICE void registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {  \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N       \
                         "k16.f32." TYPE "." TYPE " {" REGS "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4             \
                         ", p, 1, 1, " P6 ";\n}"                                                                   \
                         : __VA_ARGS__                                                                             \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),  \
                           "n"(static_cast<int>(kTransposedB))                                                     \
                         : "memory");                                                                              \
        }                                                                                                          \
    };
#define TF_WGMMA_BOTH(N, ...) TF_WGMMA(Bfloat16, "bf16", N, __VA_ARGS__) TF_WGMMA(Float16, "f16", N, __VA_ARGS__)

TF_WGMMA_BOTH(32, "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15", "%16", "%17", "%18", "%19",
              "%20", "%21", "%22", TF_WGMMA_OUT8(0), TF_WGMMA_OUT8(8))
TF_WGMMA_BOTH(64,
              "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
              "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31",
              "%32", "%33", "%34", "%35", "%36", "%37", "%38", TF_WGMMA_OUT8(0), TF_WGMMA_OUT8(8), TF_WGMMA_OUT8(16),
              TF_WGMMA_OUT8(24))
TF_WGMMA_BOTH(80,
              "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
              "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39",
              "%40", "%41", "%42", "%43", "%44", "%45", "%46", TF_WGMMA_OUT8(0), TF_WGMMA_OUT8(8), TF_WGMMA_OUT8(16),
              TF_WGMMA_OUT8(24), TF_WGMMA_OUT8(32))
TF_WGMMA_BOTH(96,
              "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
              "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
              "%42, %43, %44, %45, %46, %47",
              "%48", "%49", "%50", "%51", "%52", "%53", "%54", TF_WGMMA_OUT8(0), TF_WGMMA_OUT8(8), TF_WGMMA_OUT8(16),
              TF_WGMMA_OUT8(24), TF_WGMMA_OUT8(32), TF_WGMMA_OUT8(40))
TF_WGMMA_BOTH(128,
              "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
              "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
              "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
              "%62, %63",
              "%64", "%65", "%66", "%67", "%68", "%69", "%70", TF_WGMMA_OUT8(0), TF_WGMMA_OUT8(8), TF_WGMMA_OUT8(16),
              TF_WGMMA_OUT8(24), TF_WGMMA_OUT8(32), TF_WGMMA_OUT8(40), TF_WGMMA_OUT8(48), TF_WGMMA_OUT8(56))
TF_WGMMA_BOTH(160,
              "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
              "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
              "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
              "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79",
              "%80", "%81", "%82", "%83", "%84", "%85", "%86", TF_WGMMA_OUT8(0), TF_WGMMA_OUT8(8), TF_WGMMA_OUT8(16),
              TF_WGMMA_OUT8(24), TF_WGMMA_OUT8(32), TF_WGMMA_OUT8(40), TF_WGMMA_OUT8(48), TF_WGMMA_OUT8(56),
              TF_WGMMA_OUT8(64), TF_WGMMA_OUT8(72))
TF_WGMMA_BOTH(176,
              "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
              "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
              "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
              "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
              "%82, %83, %84, %85, %86, %87",
              "%88", "%89", "%90", "%91", "%92", "%93", "%94", TF_WGMMA_OUT8(0), TF_WGMMA_OUT8(8), TF_WGMMA_OUT8(16),
              TF_WGMMA_OUT8(24), TF_WGMMA_OUT8(32), TF_WGMMA_OUT8(40), TF_WGMMA_OUT8(48), TF_WGMMA_OUT8(56),
              TF_WGMMA_OUT8(64), TF_WGMMA_OUT8(72), TF_WGMMA_OUT8(80))
TF_WGMMA_BOTH(192,
              "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
              "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
              "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
              "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
              "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95",
              "%96", "%97", "%98", "%99", "%100", "%101", "%102", TF_WGMMA_OUT8(0), TF_WGMMA_OUT8(8), TF_WGMMA_OUT8(16),
              TF_WGMMA_OUT8(24), TF_WGMMA_OUT8(32), TF_WGMMA_OUT8(40), TF_WGMMA_OUT8(48), TF_WGMMA_OUT8(56),
              TF_WGMMA_OUT8(64), TF_WGMMA_OUT8(72), TF_WGMMA_OUT8(80), TF_WGMMA_OUT8(88))
TF_WGMMA_BOTH(256,
              "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
              "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
              "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
              "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
              "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, "
              "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "
              "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127",
              "%128", "%129", "%130", "%131", "%132", "%133", "%134", TF_WGMMA_OUT8(0), TF_WGMMA_OUT8(8),
              TF_WGMMA_OUT8(16), TF_WGMMA_OUT8(24), TF_WGMMA_OUT8(32), TF_WGMMA_OUT8(40), TF_WGMMA_OUT8(48),
              TF_WGMMA_OUT8(56), TF_WGMMA_OUT8(64), TF_WGMMA_OUT8(72), TF_WGMMA_OUT8(80), TF_WGMMA_OUT8(88),
              TF_WGMMA_OUT8(96), TF_WGMMA_OUT8(104), TF_WGMMA_OUT8(112), TF_WGMMA_OUT8(120))

#undef TF_WGMMA_BOTH
#undef TF_WGMMA
#undef TF_WGMMA_OUT8

}  // namespace ptx
}  // namespace tf
