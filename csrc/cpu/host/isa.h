// The choice of instruction set.
#pragma once

#include <string>
#include <vector>

#include "core/params.h"

namespace tf {

// The instruction sets this machine can run, best first.
std::vector<std::string> available_isas();
std::string current_isa();
// Throws std::invalid_argument for a name that is not available. TRANSFORMER_FAST_CPU_ISA does the same at start.
void force_isa(const std::string& name);
const Kernels& current_kernels();

// Attained floating-point operations a second of the kernels' own inner instruction, on registers.
double measure_peak(DType, int num_threads);

}  // namespace tf
