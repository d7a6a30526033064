// Where a block's work lies: jobs, sequences, packed rows, and rows of memory brought into swizzled shared memory.
#pragma once

#include "cuda/arguments.h"

namespace tf {
namespace cuda {

constexpr float kInfinity = __builtin_inff();

// ------------------------------------------------------------------------------------------ jobs

struct Job {
    int tile, kv_head, batch;
};

// Within a section of heads the tiles go from the heaviest to the lightest, since what starts last decides when all is
// done. Under a causal mask the last rows see the most keys (`last_first`), and the first keys are seen by most rows.
TF_DEVICE Job job_of(const Arguments& a, int number, bool last_first) {
    const int in_section = a.section * a.tiles;
    const int first_head = number / in_section * a.section;
    const int width = min_of(a.section, a.heads - first_head);
    const int rest = number % in_section;
    const int tile = rest / width, head = first_head + rest % width;
    const int kv_heads = static_cast<int>(a.problem.num_kv_heads);
    return {last_first ? a.tiles - 1 - tile : tile, head % kv_heads, head / kv_heads};
}

TF_DEVICE int job_count(const Arguments& a) { return a.tiles * a.heads; }

// ------------------------------------------------------------------------------------------ sequences

// One batch entry: where its rows and keys begin, how many there are, and its mask. `batch` is what operands are
// indexed with (0 where sequences are packed). `holes`: its key padding mask has to be read key by key.
struct DeviceSequence {
    int index, batch, first_query, first_key, len_q, len_k;
    SequenceMask mask;
    bool holes;

    TF_DEVICE int offset() const { return static_cast<int>(mask.offset); }
};

TF_DEVICE DeviceSequence sequence_of(const Arguments& a, int index) {
    const Problem& p = a.problem;
    DeviceSequence s{};
    s.index = index;
    s.batch = p.packed ? 0 : index;
    s.len_q = static_cast<int>(p.seqlen_q);
    s.len_k = static_cast<int>(p.seqlen_k);
    if (p.cu_seqlens_q != nullptr) {
        s.first_query = p.cu_seqlens_q[index];
        s.len_q = p.cu_seqlens_q[index + 1] - s.first_query;
        s.first_key = p.cu_seqlens_k[index];
        s.len_k = p.cu_seqlens_k[index + 1] - s.first_key;
    }
    if (p.seqlens_k != nullptr) s.len_k = p.seqlens_k[index * p.seqlens_k_stride];
    s.mask = {0, s.len_k, s.len_k - s.len_q, p.left, p.right};
    if (a.key_ranges != nullptr) {
        const KeyRange range = a.key_ranges[index];
        s.mask.start = range.start;
        s.mask.end = min_of<int64_t>(range.end, s.len_k);
        s.holes = range.holes != 0;
    }
    return s;
}

// ------------------------------------------------------------------------------------------ packed rows

// The query heads of a KV head are packed into the rows of a tile: row r is position r / group_size of query head
// kv_head * group_size + r % group_size. Rows from `count` on are not there.
struct PackedRows {
    int first, count, group_size, first_head;

    TF_DEVICE int position(int row) const { return (first + row) / group_size; }
    TF_DEVICE int head(int row) const { return first_head + (first + row) % group_size; }
    TF_DEVICE bool has(int row) const { return row < count; }
};

TF_DEVICE PackedRows packed_rows(const Arguments& a, const DeviceSequence& s, const Job& job, int block_m) {
    const int group = static_cast<int>(a.problem.group_size), first = job.tile * block_m;
    return {first, max_of(0, min_of(block_m, s.len_q * group - first)), group, job.kv_head * group};
}

// The keys that the rows of a tile see: cf. core/mask.h. None where it has no rows.
TF_DEVICE TileRange keys_of(const DeviceSequence& s, const PackedRows& rows) {
    if (rows.count == 0) return {0, 0, 0, 0};
    return tile_range(s.mask, rows.position(0), rows.position(rows.count - 1));
}

// Blocks of a tile's range: [first, full) and [partial, stop) need the mask, [full, partial) does not. They are counted
// from a multiple of kBlock (so that no block crosses a page, dropout's groups of four keys, or a TMA box).
struct BlockRange {
    int first, full, partial, stop;
};

template <int kBlock>
TF_DEVICE BlockRange blocks_of(const TileRange& range, bool never_full) {
    const int begin = static_cast<int>(range.begin), stop = static_cast<int>(range.end);
    const int first = begin / kBlock, end = static_cast<int>(ceil_div(stop, kBlock));
    if (begin >= stop) return {0, 0, 0, 0};
    const int full = static_cast<int>(ceil_div(range.full_begin, kBlock));
    const int partial = static_cast<int>(range.full_end / kBlock);
    if (never_full || full >= partial) return {first, end, end, end};
    return {first, full, partial, end};
}

// ------------------------------------------------------------------------------------------ operands in memory

template <class E>
TF_DEVICE const E* row_at(const Operand& operand, int batch, int head, int row) {
    return reinterpret_cast<const E*>(operand.data) + batch * operand.batch + head * operand.head + row * operand.row;
}
template <class E>
TF_DEVICE E* mutable_row_at(const Operand& operand, int batch, int head, int row) {
    return reinterpret_cast<E*>(operand.data) + batch * operand.batch + head * operand.head + row * operand.row;
}

// Key `key` of a sequence in K or V, through the block table where the cache is paged.
template <class E>
TF_DEVICE const E* key_row_at(const Problem& p, const Operand& operand, const DeviceSequence& s, int kv_head, int key) {
    if (p.page_size == 0) return row_at<E>(operand, s.batch, kv_head, s.first_key + key);
    const int page_size = static_cast<int>(p.page_size);
    const int page = static_cast<int>(p.page_of(s.index, key / page_size));
    return row_at<E>(operand, page, kv_head, key % page_size);
}

// ------------------------------------------------------------------------------------------ shared memory

// A tile of rows in shared memory: columns in groups of 64 (128 bytes), one group after the other, each a dense matrix
// of rows of 128 bytes with their eight 16-byte chunks swizzled. That is what TMA writes and wgmma reads with 128-byte
// swizzle, and ldmatrix reads it without bank conflicts. `chunk` counts 16 bytes along the whole row.
template <int kRows>
TF_DEVICE constexpr int chunk_offset(int row, int chunk) {
    return (chunk / 8) * kRows * 128 + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
}

// Brings kRows rows of `columns` elements into such a tile of kColumns, zeros beyond, by the threads `thread` of
// kThreads. `at(row)` gives a row's address, or nullptr where the row is 0; `valid` is an address in global memory that
// stands for those. Asynchronous where rows are aligned: cp_async_commit, cp_async_wait and a barrier follow always.
template <class E, int kRows, int kColumns, int kThreads, class RowAddress>
TF_DEVICE void load_rows(char* tile, int thread, int columns, bool aligned, const void* valid, RowAddress&& at) {
    constexpr int kChunks = kColumns / 8;
    static_assert(kRows * kChunks % kThreads == 0, "each thread moves as many chunks");
    const uint32_t target = ptx::shared_address(tile);
    TF_UNROLL
    for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
        const int index = i * kThreads + thread, row = index / kChunks, chunk = index % kChunks;
        const E* source = at(row);
        const int count = source == nullptr ? 0 : max_of(0, min_of(8, columns - chunk * 8));
        if (aligned) {
            const void* from = count > 0 ? static_cast<const void*>(source + chunk * 8) : valid;
            ptx::cp_async_16(target + chunk_offset<kRows>(row, chunk), from, count * 2);
        } else {
            Vector16 vector{};
            for (int e = 0; e < count; ++e) {
                vector.word[e / 2] |= static_cast<uint32_t>(source[chunk * 8 + e].bits) << (e % 2 * 16);
            }
            *reinterpret_cast<Vector16*>(tile + chunk_offset<kRows>(row, chunk)) = vector;
        }
    }
}

}  // namespace cuda
}  // namespace tf
