// Linear layers shared out to threads: blocks of rows by runs of panels.
#include "attention.h"
#include "isa.h"
#include "tasks.h"

namespace tf {
namespace {

constexpr int64_t kSerialWork = 1 << 16;  // multiplications that are done sooner than another thread has woken
// A matrix product lays out so much of b at a time: it stays in a cache while all rows of a pass. Of more depth, sums
// go through `out`.
constexpr int64_t kLaidOutBytes = 4 << 20, kLaidOutDepth = 1024;

// Blocks of almost equal size whose rows are whole tiles, but for the last.
struct RowBlocks {
    int64_t rows, tile, count;
    int64_t begin(int64_t block) const { return std::min(ceil_div(rows, tile) * block / count * tile, rows); }
};

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
    // Enough runs of panels that threads end together. No bit depends on them, nor on the blocks.
    const RowBlocks blocks{p.rows, layout.row_tile, ceil_div(p.rows, layout.row_block)};
    const int64_t runs = num_threads == 1 ? 1 : std::min(panels, ceil_div(4 * num_threads, blocks.count));
    run_tasks(blocks.count * runs, num_threads, kernels.linear_workspace(p), [&](int64_t task, char* workspace) {
        const int64_t block = task / runs, run = task % runs;
        kernels.linear(p, blocks.begin(block), blocks.begin(block + 1), panels * run / runs, panels * (run + 1) / runs,
                       workspace);
    });
}

void linear_pair(const Linear& first, const Linear& second, int num_threads) {
    const Kernels& kernels = current_kernels();
    const LinearLayout layout = kernels.linear_layout(first.dtype, first.in_features);
    const int64_t rows = first.rows, size = size_of(first.dtype);
    // As many blocks for each thread, of at least 32 rows.
    const RowBlocks blocks{rows, layout.row_tile,
                           std::min(round_up(ceil_div(rows, layout.row_block), num_threads), ceil_div(rows, 32))};
    const int64_t hidden = round_up(layout.row_block * first.out_features * size, 64);
    const int64_t workspace = std::max(kernels.linear_workspace(first), kernels.linear_workspace(second));
    run_tasks(blocks.count, num_threads, hidden + workspace, [&](int64_t block, char* memory) {
        const int64_t begin = blocks.begin(block), count = blocks.begin(block + 1) - begin;
        Linear a = first, b = second;
        a.rows = b.rows = count;
        a.x += begin * a.x_row * size;
        a.out = memory;
        a.out_row = first.out_features;
        b.x = memory, b.x_row = first.out_features;
        if (b.residual) b.residual += begin * b.residual_row * size;
        b.out += begin * b.out_row * size;
        kernels.linear(a, 0, count, 0, ceil_div(a.out_features, layout.panel), memory + hidden);
        kernels.linear(b, 0, count, 0, ceil_div(b.out_features, layout.panel), memory + hidden);
    });
}

void matrix_product(const MatrixProduct& p, int num_threads) {
    thread_local Scratch laid_out;
    const int64_t chunks = ceil_div(p.depth, kLaidOutDepth);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t k = p.depth * chunk / chunks, depth = p.depth * (chunk + 1) / chunks - k;
        const LinearLayout layout = current_kernels().linear_layout(DType::f32, depth);
        const int64_t width = std::max<int64_t>(kLaidOutBytes / layout.panel_bytes, 1) * layout.panel;
        for (int64_t n = 0; n < p.columns; n += width) {
            LinearWeight w{};
            w.dtype = DType::f32;
            w.in_features = depth, w.out_features = std::min(width, p.columns - n);
            w.weight = p.b + (k * p.b_row + n * p.b_column) * 4;
            w.out_stride = p.b_column, w.in_stride = p.b_row;
            w.laid_out = laid_out.get(linear_bytes(w));
            lay_out_linear(w, num_threads);
            Linear l{};
            l.activation = Linear::none;
            l.dtype = DType::f32;
            l.rows = p.rows, l.in_features = depth, l.out_features = w.out_features;
            l.x = p.a + k * p.a_column * 4, l.x_row = p.a_row, l.x_column = p.a_column;
            l.laid_out = w.laid_out;
            l.out = p.out + n * 4, l.out_row = p.columns;
            if (k > 0) {
                l.residual = l.out, l.residual_row = l.out_row;
            } else if (p.bias) {
                l.bias = p.bias + n * 4;
            }
            linear(l, num_threads);
        }
    }
}

}  // namespace tf
