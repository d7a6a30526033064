// What every pass does first: lengths checked, each batch entry's mask written down, dense masks summarised.
#pragma once

#include <vector>

#include "core/params.h"

namespace tf {

// Throws std::invalid_argument for lengths and pages out of range.
std::vector<Sequence> make_sequences(const Problem&);

// Reads a dense boolean mask once and keeps what the kernels need of it: an interval a row.
class MaskSummary {
  public:
    // Points p.summary at this object if p.bias is boolean.
    explicit MaskSummary(Problem& p);

  private:
    void summarise(const Problem& p, const char* row, size_t i);
    void set(size_t i, int64_t lo, int64_t hi, bool solid);

    std::vector<int32_t> lo_, hi_;
    std::vector<uint8_t> solid_;
};

// The threads that a problem of so many (row, key) pairs is worth.
int threads_for(const Problem&, int64_t pairs);

}  // namespace tf
