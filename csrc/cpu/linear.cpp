// Linear layers for inference: gemm.h's product with weights that were laid out for it, and what follows the product
// done before its sums leave the cache.
//
// A weight is cut into panels of two or three vectors of outputs, and a panel is rows of its inputs: 32-bit elements,
// floats or pairs, as gemm.h wants them; types that have no product of their own keep their 16 bits and are widened in
// use.
#include "activations.h"
#include "gemm.h"
#include "kernels.h"

namespace tf {
namespace TF_ISA {
namespace {

constexpr int64_t kGroup = 8;  // panels whose sums wait for each other, so that rows are written in longer runs

// Rows of x that a task has, and rows of a panel that stay near while they pass. Vectors want the panel in the level-1
// cache; tiles come from the level-2 cache as quickly as they are multiplied, and every block of depth costs the sums'
// way there and back. Then a panel's vectors, the cache that its next rows are fetched into (3: level 1, 2: level 2),
// and how far ahead if rows of x are few.
struct VectorBlocks {
    static constexpr int64_t kDepthBlock = 192;
#if defined(__AVX512F__) && (defined(__AMX_BF16__) || !defined(__AVX512BF16__))
    // Intel's processors begin two products a cycle, and slow down where each needs more than half a load: of an Ice
    // Lake's peak, panels of two vectors come to 87% and of three to 100%. For few rows its own fetching reaches 60% to
    // 90% of the memory's speed. A Zen 4 is at its peak with two vectors, and loses by fetching for few rows. (Other
    // Intel processors than that Ice Lake were not measured.)
    static constexpr int kVectors = 3, kLocality = 2;
    static constexpr int64_t kStreamedAhead = 4096;
#else
    static constexpr int kVectors = 2, kLocality = 3;
    static constexpr int64_t kStreamedAhead = 0;
#endif
    static constexpr int64_t kRowTile = tile_rows_for(kVectors), kRowBlock = 64 / kRowTile * kRowTile;
};
struct TileBlocks {
    static constexpr int64_t kRowTile = 32, kRowBlock = 128, kDepthBlock = 1024;
    static constexpr int kVectors = 2, kLocality = 3;
    static constexpr int64_t kStreamedAhead = 0;
};

template <DType kType>
struct LinearProduct : VectorBlocks {
    using Product = Float32Product;
    static constexpr int64_t kPanel = kVectors * kLanes;
    static constexpr bool kWiden = kType != DType::f32;
    static constexpr int64_t kStep = 1;  // inputs of a 32-bit element
    static constexpr int64_t kPad = 1;   // inputs are padded with zeros to a multiple
    static constexpr int64_t kElement = kWiden ? 2 : 4;
};
#if defined(__AVX512BF16__)
template <>
#if defined(__AMX_BF16__)
struct LinearProduct<DType::bf16> : TileBlocks {
#else
struct LinearProduct<DType::bf16> : VectorBlocks {
#endif
    using Product = Bf16PairProduct;
    static constexpr int64_t kPanel = kVectors * kLanes;
    static constexpr bool kWiden = false;
    static constexpr int64_t kStep = 2, kPad = 32, kElement = 4;
};
#endif

template <DType kType>
constexpr int64_t panel_rows(int64_t in_features) {
    using P = LinearProduct<kType>;
    return round_up(in_features, P::kPad) / P::kStep;
}

template <DType kType>
constexpr int64_t panel_bytes(int64_t in_features) {
    using P = LinearProduct<kType>;
    return round_up(panel_rows<kType>(in_features) * P::kPanel * P::kElement, 64);
}

// Must rows of x be copied for the product?
template <DType kType>
bool copies_rows(const Linear& p) {
    return LinearProduct<kType>::kWiden || p.in_features % LinearProduct<kType>::kPad != 0 || p.x_column != 1;
}

// A whole panel of floats: rows as they are, or turned.
void lay_out_floats(const LinearWeight& w, const char* weight, int64_t first, float* to) {
    constexpr int kVectors = VectorBlocks::kVectors;
    constexpr int64_t kPanel = kVectors * kLanes;
    const float* from = reinterpret_cast<const float*>(weight) + first * w.out_stride;
    if (w.in_stride == 1) return transpose(from, w.out_stride, to, kPanel, kPanel, w.in_features);
    for (int64_t k = 0; k < w.in_features; ++k, from += w.in_stride, to += kPanel) {
        unroll<kVectors>([&](auto v) TF_INLINE_LAMBDA { store(to + v * kLanes, load(from + v * kLanes)); });
    }
}

template <DType kType>
void lay_out_panel(const LinearWeight& w, const char* weight, int64_t first, char* to) {
    using P = LinearProduct<kType>;
    constexpr int64_t kSize = size_of(kType), kPanel = P::kPanel;
    if constexpr (kType == DType::f32) {
        if (first + kPanel <= w.out_features && (w.in_stride == 1 || w.out_stride == 1)) {
            return lay_out_floats(w, weight, first, reinterpret_cast<float*>(to));
        }
    }
    for (int64_t k = 0; k < panel_rows<kType>(w.in_features) * P::kStep; k += P::kStep) {
        for (int64_t n = first; n < first + kPanel; ++n) {
            for (int64_t i = k; i < k + P::kStep; ++i, to += kSize) {
                const bool is_there = n < w.out_features && i < w.in_features;
                if (is_there) {
                    std::memcpy(to, weight + (n * w.out_stride + i * w.in_stride) * kSize, kSize);
                } else {
                    std::memset(to, 0, kSize);
                }
            }
        }
    }
}

// From so many rows of x on a product takes longer than the fetching of its panel, and can hide it.
constexpr int64_t kManyRows = 32;

// Fetches what the next product needs, a little at each step of this one, where the processor's own fetching does not:
// it stops at the end of a page, which is a panel's next 32 rows.
template <class P>
struct FetchAhead {
    const char* rows;  // of the panel, that come next: all of them while this product has a whole block of rows of x
    bool results;      // is this the first to write sums in their place? The next panel's results are beside them
    template <int R, int V>
    TF_INLINE void tile(const float* c, int64_t c_stride) {
        if (!results) return;
        unroll<R * V>([&](auto i)
                          TF_INLINE_LAMBDA { __builtin_prefetch(c + (i / V) * c_stride + (V + i % V) * kLanes); });
    }
    TF_INLINE void step() {
        __builtin_prefetch(rows, 0, P::kLocality);
        rows += P::kPanel * P::kElement * tile_rows_for(P::kVectors) / P::kRowBlock;
    }
};

// The same for few rows, which wait for the panel alone: what comes so many bytes later.
template <class P>
struct StreamAhead : Nothing {
    const char* rows;
    TF_INLINE void step() {
        if constexpr (P::kStreamedAhead == 0) return;
        constexpr int64_t kRow = P::kPanel * P::kElement;
        for (int64_t i = 0; i < kRow; i += 64) __builtin_prefetch(rows + P::kStreamedAhead + i);
        rows += kRow;
    }
};

template <class P, class Product, bool kAdd, class Meanwhile>
__attribute__((noinline)) void multiply(const char* a, int64_t a_stride, const void* panel, float* c, int64_t c_stride,
                                        int64_t rows, int64_t depth, Meanwhile meanwhile) {
    const auto* b = static_cast<const typename Product::Lane*>(panel);
#if defined(__AMX_BF16__)
    if constexpr (std::is_same_v<Product, Bf16PairProduct>) {
        const int64_t whole = rows / (2 * kSide) * (2 * kSide);
        if (whole > 0) tile_squares<kAdd>(a, a_stride, b, P::kPanel, c, c_stride, whole, depth);
        a += whole * a_stride, c += whole * c_stride;
        return tile_rows<kAdd, P::kVectors>(a, a_stride, b, P::kPanel, c, c_stride, rows - whole, depth);
    }
#endif
    row_loop<Product, Along::depth, kAdd, tile_rows_for(P::kVectors), P::kVectors>(a, a_stride, b, P::kPanel, c,
                                                                                   c_stride, rows, depth, meanwhile);
}

// Sums of one panel, of rows that are so far apart.
struct Sums {
    float* first;
    int64_t row;
};

// sums[r] = row r of `a` times one panel.
template <DType kType>
void multiply_panel(const char* a, int64_t a_stride, const char* panel, Sums sums, int64_t rows, int64_t depth,
                    float* wide) {
    using P = LinearProduct<kType>;
    using InPassing = std::conditional_t<P::kWiden, WideningProduct<kType>, typename P::Product>;
    for (int64_t k = 0; k < depth; k += P::kDepthBlock) {
        const int64_t some = min_of(P::kDepthBlock, depth - k);
        const char* block = panel + k * P::kPanel * P::kElement;
        const auto multiply_block = [&](auto product, const void* b, auto meanwhile) {
            using Product = decltype(product);
            if (k == 0) {
                multiply<P, Product, false>(a, a_stride, b, sums.first, sums.row, rows, some, meanwhile);
            } else {
                multiply<P, Product, true>(a + k * 4, a_stride, b, sums.first, sums.row, rows, some, meanwhile);
            }
        };
        if (rows <= tile_rows_for(P::kVectors)) {  // of which the panel is read once
            multiply_block(InPassing{}, block, StreamAhead<P>{{}, block});
            continue;
        }
        if constexpr (P::kWiden) load_row<kType>(block, some * P::kPanel, wide, some * P::kPanel);
        const void* b = P::kWiden ? static_cast<const void*>(wide) : block;
        if (rows < kManyRows) {
            multiply_block(typename P::Product{}, b, Nothing{});
        } else {
            const bool in_place = sums.row != P::kPanel;
            const char* next = block + some * P::kPanel * P::kElement;
            multiply_block(typename P::Product{}, b, FetchAhead<P>{next, k == 0 && in_place});
        }
    }
}

template <Linear::Activation kActivation, bool kCoarse>
TF_INLINE F activate(F x) {
    if constexpr (kActivation == Linear::relu) return select(x < 0.0f, zero(), x);
    if constexpr (kActivation == Linear::gelu) return gelu<kCoarse>(x);
    if constexpr (kActivation == Linear::gelu_tanh) return gelu_tanh<kCoarse>(x);
    if constexpr (kActivation == Linear::silu) return silu<kCoarse>(x);
    return x;
}

// What follows the product, for columns [first, first + columns) of rows whose sums are at hand: a panel's, a gated
// one's value's, the next panel's, and so on.
template <DType kType, Linear::Activation kActivation, bool kGated>
void finish(const Linear& p, int64_t first_row, int64_t rows, int64_t first, int64_t columns, Sums sums) {
    constexpr int64_t kSize = size_of(kType);
    constexpr bool kCoarse = kType == DType::bf16;
    constexpr int64_t kPanel = LinearProduct<kType>::kPanel;
    const int64_t panel = rows * kPanel;
    const auto bias_at = [&](const char* bias, int64_t i, auto count) TF_INLINE_LAMBDA {
        return bias == nullptr ? zero() : load_some<kType>(bias + (first + i) * kSize, count);
    };
    for (int64_t r = 0; r < rows; ++r, sums.first += sums.row) {
        const char* residual = p.residual + ((first_row + r) * p.residual_row + first) * kSize;
        char* out = p.out + ((first_row + r) * p.out_row + first) * kSize;
        for_each_vector(columns, [&](int64_t i, auto count) TF_INLINE_LAMBDA {
            const float* sum = sums.first + i / kPanel * panel * (kGated ? 2 : 1) + i % kPanel;
            F x = activate<kActivation, kCoarse>(load(sum) + bias_at(p.bias, i, count));
            if constexpr (kGated) x *= load(sum + panel) + bias_at(p.value_bias, i, count);
            if (p.residual) x += load_some<kType>(residual + i * kSize, count);
            store_some<kType>(out + i * kSize, x, count);
        });
    }
}

template <DType kType, bool kGated>
void finish(const Linear& p, int64_t first_row, int64_t rows, int64_t first, int64_t columns, Sums sums) {
    switch (p.activation) {
        case Linear::none:
            return finish<kType, Linear::none, kGated>(p, first_row, rows, first, columns, sums);
        case Linear::relu:
            return finish<kType, Linear::relu, kGated>(p, first_row, rows, first, columns, sums);
        case Linear::gelu:
            return finish<kType, Linear::gelu, kGated>(p, first_row, rows, first, columns, sums);
        case Linear::gelu_tanh:
            return finish<kType, Linear::gelu_tanh, kGated>(p, first_row, rows, first, columns, sums);
        case Linear::silu:
            return finish<kType, Linear::silu, kGated>(p, first_row, rows, first, columns, sums);
    }
}

struct Workspace {
    float *sums, *wide;
    char* rows;
    int64_t bytes;
};

template <DType kType>
Workspace workspace_of(const Linear& p, char* memory) {
    using P = LinearProduct<kType>;
    const int64_t rows = min_of(P::kRowBlock, p.rows);
    const int64_t sums = rows * P::kPanel * kGroup * 4, wide = P::kWiden ? P::kDepthBlock * P::kPanel * 4 : 0;
    const int64_t copied = copies_rows<kType>(p) ? rows * panel_rows<kType>(p.in_features) * 4 : 0;
    return {reinterpret_cast<float*>(memory), reinterpret_cast<float*>(memory + sums), memory + sums + wide,
            sums + wide + copied};
}

// Rows of x as the product reads them: widened, filled up with zeros, or turned.
template <DType kType>
void copy_rows(const Linear& p, int64_t first_row, int64_t rows, char* to) {
    constexpr int64_t kSize = size_of(kType);
    const int64_t stride = panel_rows<kType>(p.in_features) * 4;
    if (p.x_column != 1) {
        const float* columns = reinterpret_cast<const float*>(p.x) + first_row;
        return transpose(columns, p.x_column, reinterpret_cast<float*>(to), p.in_features, p.in_features, rows);
    }
    for (int64_t r = 0; r < rows; ++r, to += stride) {
        const char* from = p.x + (first_row + r) * p.x_row * kSize;
        if constexpr (LinearProduct<kType>::kWiden) {
            load_row<kType>(from, p.in_features, reinterpret_cast<float*>(to), p.in_features);
        } else if constexpr (kSize == 2) {  // floats are only ever turned
            copy_row(from, p.in_features, reinterpret_cast<float*>(to), stride / 4);
        }
    }
}

template <DType kType>
void linear_of(const Linear& p, int64_t first_row, int64_t last_row, int64_t first_panel, int64_t last_panel,
               char* memory) {
    using P = LinearProduct<kType>;
    constexpr int64_t kPanel = P::kPanel;
    [[maybe_unused]] const typename P::Product::InUse in_use;
    const Workspace workspace = workspace_of<kType>(p, memory);
    const int64_t rows = last_row - first_row, depth = panel_rows<kType>(p.in_features);
    const int64_t bytes = panel_bytes<kType>(p.in_features), parts = p.gated ? 2 : 1;
    const char* a = p.x + first_row * p.x_row * size_of(kType);
    int64_t a_stride = p.x_row * size_of(kType);
    if (copies_rows<kType>(p)) {
        copy_rows<kType>(p, first_row, rows, workspace.rows);
        a = workspace.rows, a_stride = depth * 4;
    }
    if constexpr (kType == DType::f32) {
        // Whole panels are summed where they go, if nothing lies there that is still wanted.
        const bool in_place = rows >= kManyRows && !p.gated && p.residual != p.out;
        for (; in_place && first_panel < min_of(last_panel, p.out_features / kPanel); ++first_panel) {
            const int64_t first = first_panel * kPanel;
            const Sums sums{reinterpret_cast<float*>(p.out) + first_row * p.out_row + first, p.out_row};
            multiply_panel<kType>(a, a_stride, p.laid_out + first_panel * bytes, sums, rows, depth, workspace.wide);
            if (p.bias || p.residual || p.activation != Linear::none) {
                finish<kType, false>(p, first_row, rows, first, kPanel, sums);
            }
        }
    }
    for (int64_t n = first_panel; n < last_panel; n += kGroup / parts) {
        const int64_t end = min_of(n + kGroup / parts, last_panel);
        for (int64_t i = n * parts; i < end * parts; ++i) {
            const Sums sums{workspace.sums + (i - n * parts) * rows * kPanel, kPanel};
            multiply_panel<kType>(a, a_stride, p.laid_out + i * bytes, sums, rows, depth, workspace.wide);
        }
        const int64_t first = n * kPanel, columns = min_of(end * kPanel, p.out_features) - first;
        const Sums sums{workspace.sums, kPanel};
        if (p.gated) {
            finish<kType, true>(p, first_row, rows, first, columns, sums);
        } else {
            finish<kType, false>(p, first_row, rows, first, columns, sums);
        }
    }
}

}  // namespace

LinearLayout linear_layout(DType dtype, int64_t in_features) {
    LinearLayout layout{};
    with_number_type(dtype, [&](auto type) {
        using P = LinearProduct<type()>;
        layout = {P::kPanel, panel_bytes<type()>(in_features), P::kRowBlock, P::kRowTile};
    });
    return layout;
}

void lay_out_linear(const LinearWeight& w, int64_t first_panel, int64_t last_panel) {
    with_number_type(w.dtype, [&](auto type) {
        constexpr int64_t kPanel = LinearProduct<type()>::kPanel;
        const int64_t bytes = panel_bytes<type()>(w.in_features), parts = w.value_weight ? 2 : 1;
        for (int64_t n = first_panel; n < last_panel; ++n) {
            char* to = w.laid_out + n * parts * bytes;
            lay_out_panel<type()>(w, w.weight, n * kPanel, to);
            if (w.value_weight) lay_out_panel<type()>(w, w.value_weight, n * kPanel, to + bytes);
        }
    });
}

int64_t linear_workspace(const Linear& p) {
    int64_t bytes = 0;
    with_number_type(p.dtype, [&](auto type) { bytes = workspace_of<type()>(p, nullptr).bytes; });
    return bytes;
}

void linear(const Linear& p, int64_t first_row, int64_t last_row, int64_t first_panel, int64_t last_panel,
            char* workspace) {
    with_number_type(p.dtype,
                     [&](auto type) { linear_of<type()>(p, first_row, last_row, first_panel, last_panel, workspace); });
}

}  // namespace TF_ISA
}  // namespace tf
