// Linear layers shared out to threads: blocks of rows by runs of panels.
#include "attention.h"
#include "isa.h"
#include "tasks.h"

namespace tf {
namespace {

constexpr int64_t kSerialWork = 1 << 16;  // multiplications that are done sooner than another thread has woken

}  // namespace

int64_t linear_bytes(const LinearWeight& w) {
    const LinearLayout layout = current_kernels().linear_layout(w.dtype, w.in_features);
    return ceil_div(w.out_features, layout.panel) * layout.panel_bytes * (w.value_weight ? 2 : 1);
}

void lay_out_linear(const LinearWeight& w, int num_threads) {
    const Kernels& kernels = current_kernels();
    const int64_t panels = ceil_div(w.out_features, kernels.linear_layout(w.dtype, w.in_features).panel);
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t n = 0; n < panels; ++n) kernels.lay_out_linear(w, n, n + 1);
}

void linear(const Linear& p, int num_threads) {
    const Kernels& kernels = current_kernels();
    const LinearLayout layout = kernels.linear_layout(p.dtype, p.in_features);
    const int64_t panels = ceil_div(p.out_features, layout.panel);
    if (p.rows * p.in_features * p.out_features < kSerialWork) num_threads = 1;
    // Blocks of equal size, and enough runs of panels that threads end together. No bit depends on either.
    const int64_t blocks = ceil_div(p.rows, layout.row_block);
    const int64_t runs = num_threads == 1 ? 1 : std::min(panels, ceil_div(4 * num_threads, blocks));
    run_tasks(blocks * runs, num_threads, kernels.linear_workspace(p), [&](int64_t task, char* workspace) {
        const int64_t block = task / runs, run = task % runs;
        kernels.linear(p, p.rows * block / blocks, p.rows * (block + 1) / blocks, panels * run / runs,
                       panels * (run + 1) / runs, workspace);
    });
}

}  // namespace tf
