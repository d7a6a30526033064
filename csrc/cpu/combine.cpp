// Joins the chunks of a split-KV decode: partial results relative to their own maxima become out, lse and statistics.
#include "kernels.h"
#include "tile.h"

namespace tf {
namespace TF_ISA {

void combine(const Problem& p, const Sequence& s, int64_t kv_head, const KeyChunk* chunks, int64_t count,
             char* workspace) {
    float* out = reinterpret_cast<float*>(workspace);
    const int64_t state = decode_state(p), width = state - 2, size = size_of(p.dtype);
    for (int64_t r = 0; r < s.len_q * p.group_size; ++r) {
        const int64_t head = kv_head * p.group_size + r % p.group_size, row = r / p.group_size;
        float top = -kInfinity, sum = 0.0f;
        for (int64_t c = 0; c < count; ++c) {
            top = max_of(top, chunks[c].partial[r * state]);
            sum += chunks[c].partial[r * state + 1];
        }
        const bool empty = top == -kInfinity && sum == 0.0f;  // scores that are all NaN leave no maximum, but a sum
        if (!empty) {
            const float sink = sink_of(p, head);
            top = max_of(top, sink);
            if (top == -kInfinity) top = 0.0f;
            sum = exp2<5>(set1((sink - top) * p.score_log2()))[0];
        }
        std::memset(out, 0, static_cast<size_t>(width) * 4);
        for (int64_t c = 0; c < count && !empty; ++c) {
            const float* partial = chunks[c].partial + r * state;
            const F weight = exp2<5>(set1((partial[0] - top) * p.score_log2()));
            sum += partial[1] * weight[0];
            for (int64_t d = 0; d < width; d += kLanes) store(out + d, load(out + d) + load(partial + 2 + d) * weight);
        }
        char* to = const_cast<char*>(row_of(p.out, size, p.packed ? 0 : s.index, head, s.first_query + row));
        store_row(p.dtype, out, p.head_dim_v, empty ? 0.0f : 1.0f / sum, to);
        store_statistics(p, s, head, row, top, sum);
    }
}

}  // namespace TF_ISA
}  // namespace tf
