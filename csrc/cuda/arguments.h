// What every CUDA kernel is given, by value: the problem, and what only a GPU has besides.
#pragma once

#include "core/params.h"
#include "cuda/device.cuh"

namespace tf {
namespace cuda {

// Keys [start, end) of a batch entry outside of which its key padding mask hides everything; `holes` if it also hides
// some inside. Written by KeyRanges, a small kernel of its own, before any other.
struct KeyRange {
    int32_t start, end, holes, unused;
};

struct Arguments {
    // Lengths, page numbers and seeds lie in device memory; `problem.seed`, `stats`' meaning and `summary` are the
    // CPU's.
    Problem problem;

    const int64_t* seed = nullptr;         // of dropout
    uint32_t dropout_threshold = 0;        // words below it drop
    float dropout_keep = 1.0f;             // 1 / (1 - dropout_p)
    const KeyRange* key_ranges = nullptr;  // (batch,), where there is a key padding mask

    // Schedule: jobs are numbered as `job_of` (cuda/tile.cuh) says.
    int32_t tiles = 0;         // of the longest sequence
    int32_t heads = 0;         // num_kv_heads * batch
    int32_t section = 1;       // heads that go through their tiles together, so that their K and V stay in the L2 cache
    int32_t* queue = nullptr;  // a counter at 0 where blocks stay and take job after job

    // Decoding: block_y is the split. Partial results as float32: sums (splits, rows, head_dim_v), then the maximum and
    // the total of each row (splits, rows) each, with rows = num_heads * total_q, in the order of lse.
    int32_t splits = 1;
    float* partial_sums = nullptr;
    float* partial_top = nullptr;
    float* partial_total = nullptr;
    int32_t* arrived = nullptr;  // a counter at 0 for each job: the last split to come joins them all

    // Backward. stats has two planes of lse's shape: the row's maximum in the units of its scores, and log2 of its sum.
    float* dquery_sum = nullptr;  // float32 sums of dquery, zeroed, where blocks of keys add to it (sm_90)
    int32_t* turn = nullptr;      // counters at 0, one for each tile of rows, by which blocks of keys take turns
    bool deterministic = false;

    // All rows of query, key, value, out (and dout, dquery, dkey, dvalue) begin at multiples of 16 bytes.
    bool aligned = false;
    TensorMap query_map, key_map, value_map, out_map, dout_map;  // sm_90; see each kernel for what it takes
};

// What a kernel wants TMA descriptors of; filled by its `describe(const Arguments&, MapRequests&)`, encoded by the host
// before the launch. A geometry without data is not encoded.
struct MapRequests {
    TensorGeometry query, key, value, out, dout;
};

}  // namespace cuda
}  // namespace tf
