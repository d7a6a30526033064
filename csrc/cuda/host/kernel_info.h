// What the host knows of each compiled kernel. The table itself is made by setup.py from csrc/cuda/instances.py.
#pragma once

#include <vector>

#include "cuda/arguments.h"

namespace tf {
namespace cuda {

using Stream = void*;  // cudaStream_t; nothing in the emulator

struct KernelInfo {
    const char* name;
    const char* phase;  // "forward", "decode", "key_ranges", "preprocess", "dkdv", "dq", "backward", "postprocess";
                        // "forward_full": a forward that is tried first
    int family;         // 80: mma.sync and cp.async, from compute capability 8.0 on; 90: wgmma and TMA, on 9.0 alone
    DType dtype;        // of the elements; any where head_dim is 0
    int head_dim;       // the largest it takes; 0: any
    int modified;       // 1: a modified kernel, 0: a plain one, -1: it makes no difference

    int block_m, block_n, threads, blocks_per_sm, shared_bytes;
    bool persistent;  // its blocks take job after job from Arguments::queue
    // Whether the kernel is made for a problem; null where it is for all.
    bool (*suits)(const Problem&);
    // Why the kernel cannot do a problem, nullptr where it can; Arguments::aligned says what there is to say of the
    // pointers. Null where it can do all.
    const char* (*refuses)(const Arguments&);
    // The TMA descriptors it takes; null where it takes none.
    void (*describe)(const Arguments&, MapRequests&);
    // Sizes of Arguments::dquery_sum and Arguments::turn; null where it takes none.
    int64_t (*dquery_sum_floats)(const Problem&);
    int64_t (*turn_count)(const Problem&);
    // Throws Error.
    void (*launch)(const KernelInfo&, const Arguments&, int grid_x, int grid_y, Stream);
};

const std::vector<const KernelInfo*>& kernels();

}  // namespace cuda
}  // namespace tf
