#include "sequences.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "tasks.h"

namespace tf {
namespace {

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

void check_cumulative(const char* name, const int32_t* cu, int64_t batch, int64_t total, int64_t longest) {
    const std::string text(name);
    require(cu[0] == 0, text + "[0] is " + std::to_string(cu[0]) + "; allowed: 0");
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t length = static_cast<int64_t>(cu[b + 1]) - cu[b];
        require(0 <= length && length <= longest, text + "[" + std::to_string(b + 1) + "] - " + text + "[" +
                                                      std::to_string(b) + "] is " + std::to_string(length) +
                                                      "; allowed: 0 to " + std::to_string(longest) + " (max_seqlen_" +
                                                      text.back() + ")");
    }
    require(cu[batch] == total, text + "[-1] is " + std::to_string(cu[batch]) + "; allowed: " + std::to_string(total) +
                                    ", the packed length");
}

void check_pages(const Problem& p, const Sequence& s) {
    for (int64_t i = 0; i < ceil_div(s.len_k, p.page_size); ++i) {
        const int64_t page = p.page_of(s.index, i);
        if (0 <= page && page < p.num_pages) continue;  // no message is formed for what is right: there are many
        require(false, "block_table[" + std::to_string(s.index) + ", " + std::to_string(i) + "] is " +
                           std::to_string(page) + "; allowed: 0 to " + std::to_string(p.num_pages - 1) +
                           " (num_pages)");
    }
}

// Narrow [start, end) to the first and last kept key, and say whether keys between them are hidden.
void apply_key_mask(const Problem& p, Sequence& s) {
    const uint8_t* row = p.key_mask + s.index * p.key_mask_batch;
    int64_t first = s.mask.start, last = s.mask.end;
    while (first < last && !row[first * p.key_mask_key]) ++first;
    while (last > first && !row[(last - 1) * p.key_mask_key]) --last;
    s.mask.start = first;
    s.mask.end = last;
    for (int64_t j = first; j < last && !s.holes; ++j) s.holes = !row[j * p.key_mask_key];
}

}  // namespace

std::vector<Sequence> make_sequences(const Problem& p) {
    if (p.packed) {
        check_cumulative("cu_seqlens_q", p.cu_seqlens_q, p.batch, p.total_q, p.seqlen_q);
        check_cumulative("cu_seqlens_k", p.cu_seqlens_k, p.batch, p.total_k, p.seqlen_k);
    }
    std::vector<Sequence> sequences(static_cast<size_t>(p.batch));
    for (int64_t b = 0; b < p.batch; ++b) {
        Sequence& s = sequences[static_cast<size_t>(b)];
        s.index = b;
        s.first_query = p.packed ? p.cu_seqlens_q[b] : 0;
        s.first_key = p.packed ? p.cu_seqlens_k[b] : 0;
        s.len_q = p.packed ? p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b] : p.seqlen_q;
        s.len_k = p.packed ? p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b] : p.seqlen_k;
        if (p.seqlens_k != nullptr) {
            s.len_k = p.seqlens_k[b * p.seqlens_k_stride];
            require(0 <= s.len_k && s.len_k <= p.seqlen_k, "seqlens_k[" + std::to_string(b) + "] is " +
                                                               std::to_string(s.len_k) + "; allowed: 0 to " +
                                                               std::to_string(p.seqlen_k) + " (seqlen_k)");
        }
        if (p.page_size > 0) check_pages(p, s);
        s.mask = {0, s.len_k, s.len_k - s.len_q, p.left, p.right};
        s.holes = false;
        if (p.key_mask != nullptr) apply_key_mask(p, s);
    }
    return sequences;
}

MaskSummary::MaskSummary(Problem& p) {
    if (p.bias.data == nullptr || p.bias.dtype != DType::boolean) return;
    const int64_t batches = p.bias.batch ? p.batch : 1, heads = p.bias.head ? p.num_heads : 1;
    const int64_t rows = p.bias.row ? p.seqlen_q : 1, count = batches * heads * rows;
    lo_.resize(static_cast<size_t>(count));
    hi_.resize(static_cast<size_t>(count));
    solid_.resize(static_cast<size_t>(count));
    run_tasks(ceil_div(count, 64), count * p.seqlen_k > 65536 ? p.num_threads : 1, 64, [&](int64_t task, char*) {
        for (int64_t i = task * 64; i < std::min(count, task * 64 + 64); ++i) {
            const int64_t b = i / (heads * rows), h = i / rows % heads, r = i % rows;
            summarise(p, p.bias.data + b * p.bias.batch + h * p.bias.head + r * p.bias.row, static_cast<size_t>(i));
        }
    });
    p.summary = {lo_.data(),        hi_.data(), solid_.data(), p.bias.batch ? heads * rows : 0, p.bias.head ? rows : 0,
                 p.bias.row ? 1 : 0};
}

void MaskSummary::summarise(const Problem& p, const char* row, size_t i) {
    const int64_t keys = p.seqlen_k;
    if (p.bias.key != 1) {  // broadcast (or strided) over the keys
        int64_t first = 0, last = keys;
        while (first < last && !row[first * p.bias.key]) ++first;
        while (last > first && !row[(last - 1) * p.bias.key]) --last;
        bool solid = true;
        for (int64_t j = first; j < last && solid; ++j) solid = row[j * p.bias.key] != 0;
        set(i, first, last, solid);
        return;
    }
    const int64_t first = first_visible(row, 0, keys);
    if (first == keys) return set(i, 0, 0, true);
    const void* gap = std::memchr(row + first, 0, static_cast<size_t>(keys - first));
    if (gap == nullptr) return set(i, first, keys, true);
    const int64_t stop = static_cast<const char*>(gap) - row;
    if (first_visible(row, stop, keys) == keys) return set(i, first, stop, true);
    int64_t last = keys;
    while (!row[last - 1]) --last;
    set(i, first, last, false);
}

void MaskSummary::set(size_t i, int64_t lo, int64_t hi, bool solid) {
    lo_[i] = static_cast<int32_t>(lo);
    hi_[i] = static_cast<int32_t>(hi);
    solid_[i] = solid;
}

// Multiply-adds under which a problem stays on one thread: waking another costs some microseconds.
constexpr int64_t kSerialWork = 400'000;

int threads_for(const Problem& p, int64_t pairs) {
    return pairs * (p.head_dim + p.head_dim_v) < kSerialWork ? 1 : p.num_threads;
}

}  // namespace tf
