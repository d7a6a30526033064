// From a problem to threads running tiles: the choice of instruction set, the schedule, the parallel regions.
#pragma once

#include <string>
#include <vector>

#include "core/params.h"

namespace tf {

// The instruction sets this machine can run, best first.
std::vector<std::string> available_isas();
const std::string& current_isa();
// Throws std::invalid_argument for a name that is not available.
void force_isa(const std::string& name);

// Each of these throws std::invalid_argument for lengths out of range.
void attention_forward(const Problem&);
void attention_backward(const Problem&);

bool takes_decode_path(const Problem&);
// Attained floating-point operations a second of the kernels' own inner instruction.
double measure_peak(DType, int num_threads);

}  // namespace tf
