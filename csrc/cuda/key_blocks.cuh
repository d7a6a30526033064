// Blocks of keys and values on their way into shared memory, by cp.async.
#pragma once

#include "cuda/rows.cuh"

namespace tf {
namespace cuda {

// Brings blocks of kBlock rows of K and V into tiles of kColumns. Rows that no row of the query tile sees (outside of
// `range`, or holes of a key padding mask) are zeros: their values must reach nothing, and 0 * NaN is NaN.
//
// Blocks that are seen whole, in a cache without pages, take one addition and one cp.async for each chunk ("plain").
// For the others each lane finds one row in 32: `find` reads the block table and the key mask, early enough to hide
// what that takes.
//
// kAhead: what was found stays in registers until V is loaded too. Otherwise it is found again, with a wait each time,
// which a kernel can afford that has other warps to run.
template <class E, bool kHoles, bool kAhead, int kBlock, int kColumns, int kThreads>
struct KeyBlocks {
    static constexpr int kPart = min_of(32, kBlock), kParts = kBlock / kPart;  // rows that lanes find at once
    static_assert(kBlock % kPart == 0, "whole parts");

    // Of a part of a block, this lane's row: its page (0 without pages) and the row in it, -1 if it is not there.
    struct Found {
        int page = 0, row = -1;
    };

    // Numbers on which all lanes agree, and which are rarely asked for: lane i keeps the i-th, in one register for all.
    // (Not what branches depend on: the compiler would no longer know that all lanes take the same.)
    enum Kept { kSequence, kBegin, kEnd, kHasHoles, kKey, kValue = kKey + 2 };

    const Arguments& a;
    int kept = 0;
    BlockRange blocks;
    bool chunks, never_plain;  // rows of K and V can be moved by 16 bytes; no block is plain
    Found found[kAhead ? kParts : 1];

    TF_DEVICE KeyBlocks(const Arguments& a, const DeviceSequence& s, int kv_head, const TileRange& range,
                        const BlockRange& blocks)
        : a(a), blocks(blocks) {
        const Problem& p = a.problem;
        const bool paged = p.page_size != 0;
        const bool holes = kHoles && s.holes;
        chunks = in_chunks(a, static_cast<int>(p.head_dim | p.head_dim_v));
        never_plain = paged || !chunks || holes;
        keep(kSequence, s.index);
        keep(kBegin, static_cast<int>(range.begin));
        keep(kEnd, static_cast<int>(range.end));
        keep(kHasHoles, holes);
        keep_address(kKey, row_at<E>(p.key, paged ? 0 : s.batch, kv_head, s.first_key));
        keep_address(kValue, row_at<E>(p.value, paged ? 0 : s.batch, kv_head, s.first_key));
    }

    TF_DEVICE bool is_edge(int block) const { return block < blocks.full || block >= blocks.partial; }
    TF_DEVICE bool is_plain(int block) const { return !never_plain && !is_edge(block); }

    // Looks up where the rows of a block lie, before its K is loaded; V is loaded next.
    TF_DEVICE void find(int block) {
        if constexpr (kAhead) {
            if (block >= blocks.stop || is_plain(block)) return;
            TF_UNROLL
            for (int i = 0; i < kParts; ++i) found[i] = find_row(block * kBlock + i * 32);
        }
    }

    TF_DEVICE void load_key(int block, char* tile) const {
        load(a.problem.key, kKey, block, tile, static_cast<int>(a.problem.head_dim));
    }
    TF_DEVICE void load_value(int block, char* tile) const {
        load(a.problem.value, kValue, block, tile, static_cast<int>(a.problem.head_dim_v));
    }

  private:
    TF_DEVICE void keep(int index, int number) { kept = ptx::lane() == index ? number : kept; }
    TF_DEVICE int recall(int index) const { return ptx::shuffle(kept, index); }
    TF_DEVICE void keep_address(int index, const E* row) {
        keep(index, static_cast<int>(reinterpret_cast<uint64_t>(row)));
        keep(index + 1, static_cast<int>(reinterpret_cast<uint64_t>(row) >> 32));
    }
    // Row 0 of K or V; of page 0 in a paged cache.
    TF_DEVICE const E* recall_address(int index) const {
        const uint64_t low = static_cast<uint32_t>(recall(index)), high = static_cast<uint32_t>(recall(index + 1));
        return reinterpret_cast<const E*>(high << 32 | low);
    }

    // This lane's row of the part that begins with key `first`.
    TF_DEVICE Found find_row(int first) const {
        const Problem& p = a.problem;
        const int n = first + ptx::lane() % kPart;
        const int index = recall(kSequence), begin = recall(kBegin), end = recall(kEnd);
        const bool holes = kHoles && recall(kHasHoles) != 0;
        if (n < begin || n >= end) return {};
        if (holes && p.key_mask[index * p.key_mask_batch + n * p.key_mask_key] == 0) return {};
        const int page_size = static_cast<int>(p.page_size);
        if (page_size == 0) return {0, n};
        return {static_cast<int>(p.page_of(index, n / page_size)), n % page_size};
    }

    TF_DEVICE void load(const Operand& operand, Kept which, int block, char* tile, int columns) const {
        if (block >= blocks.stop) return;
        const E* rows = recall_address(which);
        const int thread = ptx::forget(ptx::thread());  // what follows from it is cheaper to find again than to keep
        const auto load_part = [&](int first, const Found& at) {
            const E* row = rows + at.page * operand.batch + at.row * operand.row;
            const RowAddresses<kPart> addresses = {{at.row < 0 ? 0 : reinterpret_cast<uint64_t>(row)}};
            load_rows_at<E, kBlock, kColumns, kThreads>(tile, first, thread, addresses, columns, chunks, rows);
        };
        if (is_plain(block)) {
            load_rows_strided<E, kBlock, kColumns, kThreads>(tile, thread, rows, block * kBlock, operand.row, columns);
        } else if constexpr (kAhead) {
            TF_UNROLL
            for (int i = 0; i < kParts; ++i) load_part(i * kPart, found[i]);
        } else {
            TF_NO_UNROLL
            for (int i = 0; i < kParts; ++i) load_part(i * kPart, find_row(block * kBlock + i * kPart));
        }
    }
};

}  // namespace cuda
}  // namespace tf
