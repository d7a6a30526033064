#include "isa.h"

#include <chrono>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tf {

namespace portable {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}
namespace amx_bf16 {
extern const Kernels kKernels;
}

namespace {

#if defined(__x86_64__)
[[maybe_unused]] bool supports_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
[[maybe_unused]] bool supports_avx512() {
    return supports_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool supports_avx512_bf16() { return supports_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Tiles are 8 KB of state a thread, which Linux gives to a process that asks for it (Linux 5.16 and later).
[[maybe_unused]] bool supports_amx_bf16() {
#if defined(__linux__)
    unsigned a, b, c, d = 0;
    const unsigned bf16 = 1u << 22, tiles = 1u << 24;
    if (!supports_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (bf16 | tiles))) return false;
    const long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}
#endif

std::vector<const Kernels*> find_kernels() {
    std::vector<const Kernels*> found;
    // The build says which of these exist, the machine which of them it can run.
#if defined(TF_HAS_AMX_BF16)
    if (supports_amx_bf16()) found.push_back(&amx_bf16::kKernels);
#endif
#if defined(TF_HAS_AVX512_BF16)
    if (supports_avx512_bf16()) found.push_back(&avx512_bf16::kKernels);
#endif
#if defined(TF_HAS_AVX512)
    if (supports_avx512()) found.push_back(&avx512::kKernels);
#endif
#if defined(TF_HAS_AVX2)
    if (supports_avx2()) found.push_back(&avx2::kKernels);
#endif
    found.push_back(&portable::kKernels);
    return found;
}

const std::vector<const Kernels*>& all_kernels() {
    static const std::vector<const Kernels*> found = find_kernels();
    return found;
}

const Kernels* kernels_named(const std::string& name) {
    std::string names;
    for (const Kernels* kernels : all_kernels()) {
        if (name == kernels->name) return kernels;
        names += (names.empty() ? "" : ", ") + std::string(kernels->name);
    }
    throw std::invalid_argument("instruction set is '" + name + "'; allowed on this machine: " + names);
}

const Kernels*& chosen() {
    static const Kernels* current = [] {
        const char* forced = std::getenv("TRANSFORMER_FAST_CPU_ISA");
        if (!forced || !*forced) return all_kernels().front();
        try {
            return kernels_named(forced);
        } catch (const std::invalid_argument& error) {
            throw std::invalid_argument(std::string("TRANSFORMER_FAST_CPU_ISA: ") + error.what());
        }
    }();
    return current;
}

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels* kernels : all_kernels()) names.emplace_back(kernels->name);
    return names;
}

std::string current_isa() { return chosen()->name; }

const Kernels& current_kernels() { return *chosen(); }

void force_isa(const std::string& name) { chosen() = kernels_named(name); }

double measure_peak(DType dtype, int num_threads) {
    const Kernels& kernels = *chosen();
    const int64_t repeats = 20'000'000;
    double operations = 0.0;
    const auto begin = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(num_threads) reduction(+ : operations)
    operations += kernels.peak_flops(dtype, repeats);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    return operations / seconds.count();
}

}  // namespace tf
