// One attention problem as plain data: pointers, strides, sizes. Bindings fill it, kernels read it.
#pragma once

#include "mask.h"

namespace tf {

// A (batch, heads, rows, columns) operand with contiguous columns; strides in elements. Packed operands have a
// batch stride of 0 and begin at their sequence's first row.
struct Operand {
    char* data = nullptr;
    int64_t batch = 0, head = 0, row = 0;
};

struct Bias {
    char* data = nullptr;  // also the gradient's layout: dbias is float32 of the same strides / shape
    DType dtype = DType::f32;
    int64_t batch = 0, head = 0, row = 0, key = 0;  // strides in elements, 0 where it broadcasts
};

// For each row of a dense boolean mask, the interval from its first to its last visible key, and whether every key
// between is visible. Where all rows of a tile are solid, the mask itself is never read again.
struct RowSummary {
    const int32_t* lo = nullptr;
    const int32_t* hi = nullptr;
    const uint8_t* solid = nullptr;
    int64_t batch = 0, head = 0, row = 0;  // strides, 0 where it broadcasts
};

struct Problem {
    int64_t batch = 0, num_heads = 0, num_kv_heads = 0, group_size = 1;
    int64_t seqlen_q = 0, seqlen_k = 0, total_q = 0, total_k = 0, head_dim = 0, head_dim_v = 0;
    DType dtype = DType::f32;
    float softmax_scale = 1.0f, softcap = 0.0f;  // softcap 0: none
    double dropout_p = 0.0;
    int64_t left = 0, right = 0;
    bool packed = false;

    Operand query, key, value, out, dout, dquery, dkey, dvalue;
    float* lse = nullptr;    // natural logarithm; (batch, heads, rows) or packed (heads, total_q)
    float* stats = nullptr;  // two planes of lse's shape: row maximum in score units, and 1 / row sum
    const float* dlse = nullptr;
    float* delta = nullptr;  // lse's shape: rowsum(dout * out) - dlse, written by backward
    float* dbias = nullptr;  // float32, contiguous in the bias's broadcast shape, zeroed by the caller
    int64_t dbias_batch = 0, dbias_head = 0, dbias_row = 0, dbias_key = 0;

    const int32_t* cu_seqlens_q = nullptr;
    const int32_t* cu_seqlens_k = nullptr;
    const int32_t* seqlens_k = nullptr;
    int64_t seqlens_k_stride = 1;
    // Of a paged cache: K and V have a page in place of a batch entry, and the table says which ones are a sequence's.
    const int32_t* block_table = nullptr;
    int64_t page_size = 0, num_pages = 0;  // page_size 0: no pages
    int64_t block_table_batch = 0, block_table_page = 0;
    const uint8_t* key_mask = nullptr;  // True = keep
    int64_t key_mask_batch = 0, key_mask_key = 0;
    Bias bias;
    RowSummary summary;  // of a boolean bias
    const float* alibi_slopes = nullptr;
    int64_t alibi_batch = 0, alibi_head = 0;
    const char* sinks = nullptr;
    DType sinks_dtype = DType::f32;
    int64_t sinks_stride = 1;
    uint64_t seed = 0;
    int num_threads = 1;

    // A bias of -inf hides a key as False does, wherever it stands: no block is surely full.
    TF_INLINE bool has_float_bias() const { return bias.data != nullptr && bias.dtype != DType::boolean; }
    TF_INLINE bool modifies_scores() const {
        // Raw products can stand for scores only if a greater one is a greater score, and a sink has no raw product.
        return softcap != 0.0f || has_float_bias() || alibi_slopes != nullptr || sinks != nullptr ||
               softmax_scale < 1e-30f;
    }
    // Scores that something changes are kept in natural units, where a bias of -FLT_MAX still fits, the others as the
    // raw products they are. Differences of them are taken first, since that is exact near the maximum, and a product
    // that is contracted with the subtraction is not: scores of 1e10 would not give their own maximum weight 1.
    // The factor from a difference of scores to natural units, and to base 2:
    TF_INLINE double score_natural() const { return modifies_scores() ? 1.0 : softmax_scale; }
    TF_INLINE float score_log2() const { return static_cast<float>(score_natural() * 1.4426950408889634); }
    // Page `index` of batch entry b.
    TF_INLINE int64_t page_of(int64_t b, int64_t index) const {
        return block_table[b * block_table_batch + index * block_table_page];
    }
    TF_INLINE int64_t lse_index(int64_t b, int64_t head, int64_t first_row, int64_t row) const {
        return packed ? head * total_q + first_row + row : (b * num_heads + head) * seqlen_q + row;
    }
};

// One batch entry: where its rows and keys begin, how many there are, and its mask.
struct Sequence {
    int64_t index, first_query, len_q, first_key, len_k;
    SequenceMask mask;
    bool holes;  // the key padding mask hides keys inside [mask.start, mask.end)
};

// A tile of query rows of one (batch entry, KV head). The group's query heads are packed into the rows:
// packed row r is position r / group_size of head kv_head * group_size + r % group_size.
struct Tile {
    int32_t sequence, kv_head;
    int64_t first_row, rows;
};

// A chunk of keys for a few query rows (decoding): keys [begin, end).
struct KeyChunk {
    int32_t sequence, kv_head;
    int64_t begin, end;
    float* partial;  // per packed row: maximum, sum, values
};

// A run of query tiles that one task takes through the backward pass, with float32 accumulators for the keys
// [key_begin, key_end) that the run can see.
struct BackwardRun {
    int32_t sequence, kv_head;
    int64_t first_row, rows;
    int64_t key_begin, key_end;
    float* dkey;
    float* dvalue;
};

// What the loss of a row of logits is made of, and its gradient: float32 losses and, for backward, each row's largest
// logit and the inverse of the sum of exp(x - top).
struct CrossEntropy {
    const int64_t* label;
    int64_t ignored;  // the label of rows that do not count
    float *loss, *top, *inverse;
    float scale;  // gradient: of the sum of the losses
};

// What stands around a model's products. Strides are in elements; `out` is contiguous.
struct Pointwise {
    enum What : int {
        rms_norm,
        gate_silu,
        gate_gelu_tanh,
        rotate,
        gelu_tanh,
        gelu_tanh_gradient,
        cross_entropy,
        cross_entropy_gradient
    } what;
    DType dtype;
    int64_t rows, columns, heads;  // rotate: `heads` of columns / heads each
    const char* x;                 // of gates: the gate
    int64_t x_row, x_head;
    const char* y;  // gates: the value; rotate: the cosines, a row for each row of x; gelu's gradient: that of gelu
    int64_t y_row;  // of the sines too
    const char* weight;  // rms_norm: the gain; rotate: the sines
    char* out;
    float eps, gain_offset;
    CrossEntropy loss;
};

// Rows times weights that were laid out for it: out = activation(x W^T + bias) + residual; a gated one has two weights,
// out = activation(x W^T + bias) * (x V^T + value_bias) + residual. Strides are in elements.
struct Linear {
    enum Activation : int { none, relu, gelu, gelu_tanh, silu } activation;
    bool gated;
    DType dtype;
    int64_t rows, in_features, out_features;
    const char* x;
    int64_t x_row, x_column;  // x_column is 1; or, of float32, x_row is
    const char* laid_out;
    const char *bias, *value_bias;  // null where there is none
    const char* residual;           // null where there is none; `out` itself, or apart from it
    int64_t residual_row;
    char* out;
    int64_t out_row;
};

// out = a b + bias in float32, with matrices as they lie. Strides are in elements: one of a's is 1; `out` is
// contiguous.
struct MatrixProduct {
    int64_t rows, depth, columns;
    const char* a;
    int64_t a_row, a_column;
    const char* b;
    int64_t b_row, b_column;
    const char* bias;  // of the columns; null where there is none
    char* out;
};

// The weight of a Linear as it lies, and where it is laid out.
struct LinearWeight {
    DType dtype;
    int64_t in_features, out_features;
    const char *weight, *value_weight;  // the second for gated ones, else null; the same strides
    int64_t out_stride, in_stride;
    char* laid_out;
};

// How an instruction set lays out weights: panels of so many outputs, each a run of memory.
struct LinearLayout {
    int64_t panel;        // outputs of a panel
    int64_t panel_bytes;  // of one weight
    int64_t row_block;    // rows that a task may have, some row tiles
    int64_t row_tile;     // rows that are multiplied at once; fewer take as long as half of them, or as all
};

// What one instruction set provides. Workspaces are in bytes, one for each thread, 64-byte aligned.
struct Kernels {
    const char* name;
    int64_t tile_rows;     // query rows of a tile
    int64_t forward_rows;  // and of all the tiles that a task of `forward` may have
    int64_t lanes;         // floats in a vector: rows of accumulators are padded to it
    int64_t decode_rows;   // up to so many packed rows are decoded with lanes along head_dim
    int64_t (*forward_workspace)(const Problem&);
    void (*forward)(const Problem&, const Sequence&, const Tile&, char* workspace);
    int64_t (*decode_workspace)(const Problem&);
    int64_t (*decode_state)(const Problem&);  // floats of a row's partial result
    void (*decode)(const Problem&, const Sequence&, const KeyChunk&, char* workspace);
    // Joins the partial results of one KV head's chunks: out, lse and statistics of its rows.
    void (*combine)(const Problem&, const Sequence&, int64_t kv_head, const KeyChunk*, int64_t count, char* workspace);
    int64_t (*backward_workspace)(const Problem&);
    void (*backward)(const Problem&, const Sequence&, const BackwardRun&, char* workspace);
    // target = scale * (sum of the parts), rounded to the dtype; `sum` is scratch of `count` floats.
    void (*store_gradient_row)(DType, const float* const* parts, int64_t part_count, int64_t count, float scale,
                               float* sum, char* target);
    void (*pointwise)(const Pointwise&, int64_t first, int64_t last);  // rows [first, last)
    LinearLayout (*linear_layout)(DType, int64_t in_features);
    void (*lay_out_linear)(const LinearWeight&, int64_t first_panel, int64_t last_panel);
    int64_t (*linear_workspace)(const Linear&);
    void (*linear)(const Linear&, int64_t first_row, int64_t last_row, int64_t first_panel, int64_t last_panel,
                   char* workspace);
    double (*peak_flops)(DType, int64_t repeats);  // floating-point operations done; the caller keeps time
};

}  // namespace tf
