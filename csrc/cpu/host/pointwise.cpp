// Rows shared out to threads.
#include <algorithm>

#include "attention.h"
#include "isa.h"

namespace tf {
namespace {

constexpr int64_t kSerialElements = 32'768;  // fewer are done sooner than another thread has woken

}  // namespace

void pointwise(const Pointwise& p, int num_threads) {
    const Kernels& kernels = current_kernels();
    const int64_t parts = std::clamp<int64_t>(p.rows * p.columns / kSerialElements, 1, num_threads);
    if (parts <= 1) return kernels.pointwise(p, 0, p.rows);
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part) {
        kernels.pointwise(p, p.rows * part / parts, p.rows * (part + 1) / parts);
    }
}

}  // namespace tf
