// What the bindings call: from a problem to threads running tiles or rows.
#pragma once

#include "core/params.h"

namespace tf {

// Each of these throws std::invalid_argument for lengths out of range.
void attention_forward(const Problem&);
void attention_backward(const Problem&);

// Would forward split the keys (few query rows) instead of tiling the rows?
bool takes_decode_path(const Problem&);

void pointwise(const Pointwise&, int num_threads);

int64_t linear_bytes(const LinearWeight&);  // of the laid-out weight
void lay_out_linear(const LinearWeight&, int num_threads);
void linear(const Linear&, int num_threads);
// `second` of what `first` gives, block by block of rows, so that what is between stays in the cache: first.out and
// second.x are not read.
void linear_pair(const Linear& first, const Linear& second, int num_threads);
void matrix_product(const MatrixProduct&, int num_threads);

}  // namespace tf
