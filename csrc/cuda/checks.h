// Checks of single instructions: small kernels that do one thing of tf::ptx and store what came of it, bit by bit.
// What must come is computed in Python (transformer_fast/testing/instructions), from the PTX ISA alone.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tf {

struct TensorMap;

namespace cuda {

// Names of the checks that a GPU of this compute capability (80 or 90) can run.
std::vector<std::string> check_names(int capability);

// Runs one, on `stream`, without waiting for it. `in` (up to 4) and `out` (up to 2) are addresses in device memory,
// `numbers` (up to 16) what the check's kernel says; `map` may be null where it takes none.
void run_check(const std::string& name, const std::vector<uintptr_t>& in, const std::vector<uintptr_t>& out,
               const std::vector<int64_t>& numbers, const TensorMap* map, void* stream);

}  // namespace cuda
}  // namespace tf
