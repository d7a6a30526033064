// The functions of one instruction set, one source file each; kernels.cpp puts them into the table that is exported.
#pragma once

#include "core/params.h"

namespace tf {
namespace TF_ISA {

int64_t forward_workspace(const Problem&);
void forward(const Problem&, const Sequence&, const Tile&, char* workspace);
int64_t decode_workspace(const Problem&);
int64_t decode_state(const Problem&);
void decode(const Problem&, const Sequence&, const KeyChunk&, char* workspace);
void combine(const Problem&, const Sequence&, int64_t kv_head, const KeyChunk*, int64_t count, char* workspace);
int64_t backward_workspace(const Problem&);
void backward(const Problem&, const Sequence&, const BackwardRun&, char* workspace);
void pointwise(const Pointwise&, int64_t first, int64_t last);
LinearLayout linear_layout(DType, int64_t in_features);
void lay_out_linear(const LinearWeight&, int64_t first_panel, int64_t last_panel);
int64_t linear_workspace(const Linear&);
void linear(const Linear&, int64_t first_row, int64_t last_row, int64_t first_panel, int64_t last_panel,
            char* workspace);
void store_gradient_row(DType, const float* const* parts, int64_t part_count, int64_t count, float scale, float* sum,
                        char* target);

}  // namespace TF_ISA
}  // namespace tf
