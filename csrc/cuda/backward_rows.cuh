// delta = rowsum(dout * out) - dlse, float32, laid out as lse. Reads two operands once: bound by memory alone.
#pragma once

#include "cuda/gradients.cuh"

namespace tf {
namespace cuda {

// A lane for every 16 bytes of a row, several rows a thread in flight. Grid: ceil(num_heads * total_q / kBlockM).
template <class E, int kHeadDim>
struct BackwardPreprocess {
    static constexpr int kThreads = 256, kMinBlocks = 4, kBlockN = 0, kSharedBytes = 0;
    static constexpr int kLanes = kHeadDim / 8, kAtOnce = kThreads / kLanes, kRepeats = 2;
    static constexpr int kBlockM = kAtOnce * kRepeats;

    static TF_DEVICE Vector16 load(const E* source, int count, bool aligned) {
        if (aligned && count == 8) return *reinterpret_cast<const Vector16*>(source);
        Vector16 vector{};
        TF_UNROLL
        for (int e = 0; e < 8; ++e) {
            if (e < count) vector.word[e / 2] |= static_cast<uint32_t>(source[e].bits) << (e % 2 * 16);
        }
        return vector;
    }

    static TF_DEVICE void run(const Arguments& a, char*) {
        const Problem& p = a.problem;
        const int64_t rows = p.num_heads * p.total_q, rows_a_head = p.packed ? p.total_q : p.seqlen_q;
        const int lane = ptx::thread() % kLanes, column = lane * 8;
        const int count = max_of(0, min_of(8, static_cast<int>(p.head_dim_v) - column));
        const int64_t first = static_cast<int64_t>(ptx::block_x()) * kBlockM + ptx::thread() / kLanes;

        Vector16 out[kRepeats]{}, dout[kRepeats]{};
        TF_UNROLL
        for (int i = 0; i < kRepeats; ++i) {
            const int64_t at = first + i * kAtOnce;
            if (at >= rows || count == 0) continue;
            const int64_t heads = at / rows_a_head;
            const int row = static_cast<int>(at - heads * rows_a_head);
            const int batch = static_cast<int>(heads / p.num_heads), head = static_cast<int>(heads % p.num_heads);
            out[i] = load(row_at<E>(p.out, batch, head, row) + column, count, a.aligned);
            dout[i] = load(row_at<E>(p.dout, batch, head, row) + column, count, a.aligned);
        }
        TF_UNROLL
        for (int i = 0; i < kRepeats; ++i) {
            float total = 0.0f;
            TF_UNROLL
            for (int w = 0; w < 4; ++w) {
                total += low_of<E>(out[i].word[w]) * low_of<E>(dout[i].word[w]);
                total += high_of<E>(out[i].word[w]) * high_of<E>(dout[i].word[w]);
            }
            TF_UNROLL
            for (int step = kLanes / 2; step > 0; step /= 2) total += ptx::shuffle_xor(total, step);
            const int64_t at = first + i * kAtOnce;
            if (lane == 0 && at < rows) p.delta[at] = p.dlse == nullptr ? total : total - p.dlse[at];
        }
    }
};

}  // namespace cuda
}  // namespace tf
