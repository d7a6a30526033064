// From a problem and a machine to launches: which kernels, their grids, and the memory they need besides.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "cuda/host/runtime.h"

namespace tf {
namespace cuda {

// Bytes; the first part has to be zero when a pass begins.
struct Workspace {
    int64_t zeroed = 0, scratch = 0;
};

// What a call brings besides the pointers in its Problem.
struct Call {
    const int64_t* seed = nullptr;
    char* zeroed = nullptr;   // 256-byte aligned
    char* scratch = nullptr;  // likewise
    bool deterministic = false;
    Stream stream = nullptr;
};

// One kernel of a pass. Its jobs are tiles of rows or of keys, by its phase.
struct Step {
    const KernelInfo* kernel = nullptr;
    int64_t tiles = 0, grid_x = 0, splits = 1;
};

// The steps of one family, in their order, and what they need.
struct Pass {
    std::vector<Step> steps;
    int64_t dquery_sum = 0, counters = 0, partials = 0;  // floats, ints, floats
};

class Plan {
  public:
    // The problem's pointers do not matter here, only which of its optional operands there are: any but null.
    Plan(const Problem&, const Machine&);

    // Why there is no kernel for the pass; "" where there is one.
    std::string forward_refuses() const { return forward_.empty() ? missing("forward") : ""; }
    std::string backward_refuses() const { return backward_.empty() ? missing("backward") : ""; }
    // In words, the kernel that would run if all pointers are aligned.
    std::string path() const;

    Workspace forward_workspace() const { return workspace_of(forward_); }
    Workspace backward_workspace() const { return workspace_of(backward_); }
    // Launch everything, and wait for nothing. Throw Error.
    void forward(const Problem&, const Call&) const;
    void backward(const Problem&, const Call&) const;

  private:
    void plan();
    const KernelInfo* find(const char* phase, int family) const;
    Step step_of(const KernelInfo&) const;
    void add_decode();
    void add_forward(const char* phase, int family);
    void add_backward(int family);
    std::string missing(const char* pass) const;
    const char* always_refuses(const Pass&) const;
    const char* refusal(const Pass&, const Arguments&) const;
    Arguments arguments_of(const Problem&, const Call&) const;
    Workspace workspace_of(const std::vector<Pass>&) const;
    void run(const std::vector<Pass>&, Arguments&, const Call&) const;
    void launch(const Step&, Arguments&, Stream) const;

    Problem p_;
    Machine machine_;
    bool modified_ = false;
    const KernelInfo* key_ranges_ = nullptr;
    std::vector<Pass> forward_, backward_;  // the one to be preferred first
    std::string refusals_;                  // of forward passes that are left out, in words
};

}  // namespace cuda
}  // namespace tf
