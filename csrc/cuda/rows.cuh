// Rows of memory that are found one by one: query rows of several heads, keys of a paged cache, keys with holes.
//
// What a row's address takes (divisions, 64-bit products, a look at a block table) is done once, by one lane of each
// warp; lanes that move a part of the row get the address by a shuffle.
#pragma once

#include "cuda/tile.cuh"

namespace tf {
namespace cuda {

// Addresses of kRows rows: row r's is held by lane r % 32 in at[r / 32]; 0 where there is no row.
template <int kRows>
struct RowAddresses {
    static constexpr int kEach = (kRows + 31) / 32;
    uint64_t at[kEach];
};

// Addresses of the rows first..first+kRows-1 of a tile in `query`, `out`, ... (kRows up to 32).
template <class E, int kRows>
TF_DEVICE RowAddresses<kRows> packed_addresses(const Operand& operand, const DeviceSequence& s, const PackedRows& rows,
                                               int first) {
    static_assert(kRows <= 32, "one row a lane");
    const int row = first + ptx::lane() % kRows;
    const E* address = nullptr;
    if (rows.has(row)) {
        address = row_at<E>(operand, s.batch, rows.head(row), s.first_query + rows.position(row));
    }
    return {{reinterpret_cast<uint64_t>(address)}};
}

// Eight elements of a row, of which those before `columns` are there. For rows that are not aligned.
template <class E>
TF_DEVICE Vector16 gather_chunk(const E* row, int chunk, int columns) {
    Vector16 vector{};
    TF_UNROLL
    for (int e = 0; e < 8; ++e) {
        if (row != nullptr && chunk * 8 + e < columns) {
            vector.word[e / 2] |= static_cast<uint32_t>(row[chunk * 8 + e].bits) << (e % 2 * 16);
        }
    }
    return vector;
}
template <class E>
TF_DEVICE void scatter_chunk(E* row, int chunk, int columns, const Vector16& vector) {
    TF_UNROLL
    for (int e = 0; e < 8; ++e) {
        if (chunk * 8 + e < columns) {
            row[chunk * 8 + e].bits = static_cast<uint16_t>(vector.word[e / 2] >> (e % 2 * 16));
        }
    }
}

// Can rows of `columns` elements be moved by 16 bytes?
TF_DEVICE bool in_chunks(const Arguments& a, int columns) { return a.aligned && columns % 8 == 0; }

// Brings rows into the rows first.. of a tile of kTileRows x kColumns, by `thread` of kThreads, whole warps. Zeros
// where there is no row, and beyond `columns`. Asynchronous if `chunks`; cp_async_commit, cp_async_wait and a barrier
// follow always.
template <class E, int kTileRows, int kColumns, int kThreads, int kRows>
TF_DEVICE void load_rows_at(char* tile, int first, int thread, const RowAddresses<kRows>& addresses, int columns,
                            bool chunks, const void* valid) {
    constexpr int kChunks = kColumns / 8, kStep = kThreads / kChunks > 0 ? kThreads / kChunks : 1;
    static_assert(kThreads % kChunks == 0 && kRows % kStep == 0 && kStep <= 32, "whole rows in each pass");
    const unsigned own = static_cast<unsigned>(thread) % kThreads;  // so that the compiler knows its range
    const int chunk = own % kChunks, lane_row = own / kChunks;
    const bool inside = chunk * 8 < columns;
    const uint32_t target = ptx::shared_address(tile);
    if (!chunks) {  // slow anyway: small code
        constexpr int kOfEach = min_of(32, kRows);
        TF_UNROLL
        for (int e = 0; e < kRows / kOfEach; ++e) {
            TF_NO_UNROLL
            for (int i = 0; i < kOfEach; i += kStep) {
                const int row = i + lane_row;
                const uint64_t address = ptx::shuffle(addresses.at[e], row);
                *reinterpret_cast<Vector16*>(tile + chunk_offset<kTileRows>(first + e * 32 + row, chunk)) =
                    gather_chunk(reinterpret_cast<const E*>(address), chunk, columns);
            }
        }
        return;
    }
    TF_UNROLL
    for (int i = 0; i < kRows / kStep; ++i) {
        const int row = i * kStep + lane_row;
        const uint64_t address = ptx::shuffle(addresses.at[i * kStep / 32], row % 32);
        const bool there = inside && address != 0;
        const void* source = there ? reinterpret_cast<const E*>(address) + chunk * 8 : valid;
        ptx::cp_async_16(target + chunk_offset<kTileRows>(first + row, chunk), source, there ? 16 : 0);
    }
}

// The same for a whole tile of rows that are all there, in chunks: rows first, first + 1, ... from `rows` on.
template <class E, int kTileRows, int kColumns, int kThreads>
TF_DEVICE void load_rows_strided(char* tile, int thread, const E* rows, int first, int64_t stride, int columns) {
    constexpr int kChunks = kColumns / 8, kStep = kThreads / kChunks;
    static_assert(kThreads % kChunks == 0 && kTileRows % kStep == 0, "whole rows in each pass");
    const unsigned own = static_cast<unsigned>(thread) % kThreads;
    const int chunk = own % kChunks, row = own / kChunks;
    const bool inside = chunk * 8 < columns;
    const E* source = rows + (first + row) * stride + (inside ? chunk * 8 : 0);  // an address that is valid
    const uint32_t target = ptx::shared_address(tile);
    TF_UNROLL
    for (int i = 0; i < kTileRows / kStep; ++i) {
        ptx::cp_async_16(target + chunk_offset<kTileRows>(i * kStep + row, chunk), source, inside ? 16 : 0);
        source += kStep * stride;
    }
}

// Writes the rows first.. of a tile, which lanes of the same warp have written, to memory; the first `columns` of each.
template <class E, int kTileRows, int kColumns, int kRows>
TF_DEVICE void store_rows_at(const char* tile, int first, const RowAddresses<kRows>& addresses, int columns,
                             bool chunks) {
    constexpr int kChunks = kColumns / 8, kStep = 32 / kChunks;
    static_assert(kRows <= 32, "one row a lane");
    const int chunk = ptx::lane() % kChunks, lane_row = ptx::lane() / kChunks;
    ptx::sync_warp();
    TF_UNROLL
    for (int i = 0; i < kRows / kStep; ++i) {
        const int row = i * kStep + lane_row;
        const uint64_t address = ptx::shuffle(addresses.at[0], row);
        if (address == 0 || chunk * 8 >= columns) continue;
        const Vector16 vector = *reinterpret_cast<const Vector16*>(tile + chunk_offset<kTileRows>(first + row, chunk));
        E* target = reinterpret_cast<E*>(address);
        if (chunks) {
            *reinterpret_cast<Vector16*>(target + chunk * 8) = vector;
        } else {
            scatter_chunk(target, chunk, columns, vector);
        }
    }
}

}  // namespace cuda
}  // namespace tf
