// The backward pass for Hopper: the four warps that compute nothing. One copies operands, one brings the numbers of
// rows, and each consumer has one that adds its dQ to the sums in memory.
#pragma once

#include "cuda/backward_shape_sm90.cuh"
#include "cuda/tensor_maps.cuh"

namespace tf {
namespace cuda {

template <class Shape>
struct BackwardProducerSm90 {
    using E = typename Shape::Element;
    using Tiles = typename Shape::Tiles;
    using Rows = typename Shape::Rows;
    using Barriers = typename Shape::Barriers;
    using Shared = typename Shape::Shared;
    using Work = typename Shape::Work;
    static constexpr int kHeadDim = Shape::kHeadDim, kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN;

    // Rows that are not boxes are copied one by one.
    static TF_INLINE bool keys_are_boxes(const Operand& operand) { return operand.row != 0; }

    // Rows one by one, by a warp; `at(row)` gives a row's address, or nullptr where it is 0.
    template <int kRows, class RowAddress>
    static TF_DEVICE void copy_rows(char* tile, int columns, const void* valid, RowAddress&& at) {
        constexpr int kChunks = kHeadDim / 8;
        const uint32_t target = ptx::shared_address(tile);
        TF_NO_UNROLL
        for (int i = ptx::lane(); i < kRows * kChunks; i += 32) {
            const int row = i / kChunks, chunk = i % kChunks;
            const E* const source = at(row);
            const int count = source == nullptr ? 0 : max_of(0, min_of(8, columns - chunk * 8));
            const void* const from = count > 0 ? static_cast<const void*>(source + chunk * 8) : valid;
            ptx::cp_async_16(target + chunk_offset<kRows>(row, chunk), from, count * 2);
        }
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
        ptx::fence_async_proxy();
        ptx::sync_warp();
    }

    static TF_DEVICE void copy_keys(const Arguments& a, const Work& w, const Operand& operand, const TensorMap* map,
                                    int64_t columns, char* tile, uint64_t* full) {
        if (!keys_are_boxes(operand)) {
            copy_rows<kBlockN>(tile, static_cast<int>(columns), operand.data, [&](int row) -> const E* {
                const int key = w.first_key + row;
                if (key >= w.s.len_k) return nullptr;
                return row_at<E>(operand, w.s.batch, w.job.kv_head, w.s.first_key + key);
            });
            if (ptx::lane() == 0) ptx::mbarrier_arrive(full);
        } else if (ptx::lane() == 0) {
            ptx::mbarrier_arrive_expect(full, Shape::kKeyBytes);
            load_keys<kBlockN, kHeadDim>(a.problem, operand, map, kBlockN, w.s, w.job.kv_head, w.first_key,
                                         w.first_key + kBlockN, tile, full);
        }
    }

    // Into the next buffer of a ring, when it is free.
    template <int kStages>
    static TF_DEVICE void copy_tile(const Arguments& a, const Work& w, const Operand& operand, const TensorMap* map,
                                    int64_t columns, int number, char* tile, RingBarriers<kStages>& ring,
                                    const RingPosition<kStages>& at) {
        const PackedRows rows = Shape::rows_of_tile(a, w, number);
        uint64_t* const full = &ring.full[at.stage];
        ring.wait_empty(at);
        ptx::sync_warp();  // or else a lane that comes late may find the buffer filled, used, and the parity gone by
        if (!packed_rows_are_boxes(a.problem, operand, kBlockM)) {
            copy_rows<kBlockM>(tile, static_cast<int>(columns), operand.data, [&](int row) -> const E* {
                if (!rows.has(row)) return nullptr;
                return row_at<E>(operand, w.s.batch, rows.head(row), w.s.first_query + rows.position(row));
            });
            if (ptx::lane() == 0) ptx::mbarrier_arrive(full);
        } else if (ptx::lane() == 0) {
            ptx::mbarrier_arrive_expect(full, Shape::kTileBytes);
            load_packed_rows<kBlockM, kHeadDim>(operand, map, w.s, rows, w.job.kv_head, 0, tile, full);
        }
    }

    static TF_DEVICE void produce_tiles(const Arguments& a, const Shared& shared) {
        const Work w = Shape::work_of(a, ptx::block_x());
        const Problem& p = a.problem;
        Barriers& barriers = shared.barriers();
        if (w.tiles.first >= w.tiles.stop) return;
        copy_keys(a, w, p.key, &a.key_map, p.head_dim, shared.key(), &barriers.key_full);
        RingPosition<2> query_at;
        RingPosition<Shape::kDoutStages> dout_at;
        for (int i = w.tiles.first; i < w.tiles.stop; ++i) {
            copy_tile(a, w, p.query, &a.query_map, p.head_dim, i, shared.query(query_at.stage), barriers.query,
                      query_at);
            if (i == w.tiles.first) {
                copy_keys(a, w, p.value, &a.value_map, p.head_dim_v, shared.value(), &barriers.value_full);
            }
            copy_tile(a, w, p.dout, &a.dout_map, p.head_dim_v, i, shared.dout(dout_at.stage), barriers.dout, dout_at);
            query_at.advance();
            dout_at.advance();
        }
    }

    static TF_DEVICE void produce_numbers(const Arguments& a, const Shared& shared) {
        const Work w = Shape::work_of(a, ptx::block_x());
        Barriers& barriers = shared.barriers();
        RingPosition<2> at;
        for (int i = w.tiles.first; i < w.tiles.stop; ++i) {
            const PackedRows rows = Shape::rows_of_tile(a, w, i);
            if constexpr (Shape::kModified) {
                barriers.query.wait_empty(at);
                write_modified_rows(a, w, rows, shared.rows(at.stage));
            } else {
                write_plain_rows(a, w, rows, [&]() -> Rows& {
                    barriers.query.wait_empty(at);
                    return shared.rows(at.stage);
                });
            }
            ptx::sync_warp();
            if (ptx::lane() == 0) ptx::mbarrier_arrive(&barriers.query.full[at.stage]);
            at.advance();
        }
    }
    static TF_DEVICE void write_modified_rows(const Arguments& a, const Work& w, const PackedRows& rows, Rows& table) {
        TF_NO_UNROLL
        for (int row = ptx::lane(); row < kBlockM; row += 32) {
            const int head = rows.head(row), position = rows.position(row);
            const RowNumbers numbers = read_row_numbers(a, w.s, head, position, rows.has(row));
            write_modified_row(a, w.s, table, row, head, position, rows.has(row), numbers);
        }
    }
    // Numbers are on their way while the consumers still have those of the tile before the last: `table()` waits.
    template <class Table>
    static TF_DEVICE void write_plain_rows(const Arguments& a, const Work& w, const PackedRows& rows, Table&& table) {
        RowNumbers numbers[kBlockM / 32];
        TF_UNROLL
        for (int k = 0; k < kBlockM / 32; ++k) {
            const int row = 32 * k + ptx::lane();
            numbers[k] = read_row_numbers(a, w.s, rows.head(row), rows.position(row), rows.has(row));
        }
        Rows& target = table();
        TF_UNROLL
        for (int k = 0; k < kBlockM / 32; ++k) target.write(32 * k + ptx::lane(), numbers[k]);
    }

    // Adds the pieces of one consumer's dQ. In turns, blocks of keys come one after the other: those that see a tile
    // are neighbours, so that a block's turn is its distance from the first of them.
    static TF_DEVICE void add_pieces(const Arguments& a, const Shared& shared, int consumer) {
        const Work w = Shape::work_of(a, ptx::block_x());
        const int64_t first = Tiles::first_tile(a.problem, w.s, w.job.kv_head);
        const float* const source = reinterpret_cast<const float*>(shared.piece(consumer));
        for (int i = w.tiles.first; i < w.tiles.stop; ++i) {
            int* const turn = a.turn + (first + i) * 2 + consumer;
            float* const target =
                a.dquery_sum + ((first + i) * Tiles::kPieces + consumer * Shape::kPieces) * Tiles::kPieceFloats;
            for (int piece = 0; piece < Shape::kPieces; ++piece) {
                ptx::barrier_arrive(Shape::kPieceEmpty + consumer, 160);
                ptx::barrier_sync(Shape::kPieceFull + consumer, 160);
                if (ptx::lane() == 0) {
                    if (a.deterministic && piece == 0) wait_for_turn(a, w, i, turn);
                    ptx::bulk_reduce_add(target + piece * Tiles::kPieceFloats, source, Shape::kPieceBytes);
                    ptx::bulk_commit();
                    ptx::bulk_wait_read<0>();
                    if (a.deterministic && piece == Shape::kPieces - 1) {
                        ptx::bulk_wait<0>();
                        ptx::fence_device();
                        ptx::add_release(turn, 1);
                    }
                }
                ptx::sync_warp();  // whole warps come to a named barrier
            }
        }
    }
    static TF_DEVICE void wait_for_turn(const Arguments& a, const Work& w, int tile, const int* turn) {
        const TileRange keys = keys_of(w.s, Shape::rows_of_tile(a, w, tile));
        const int before = w.job.tile - static_cast<int>(keys.begin) / kBlockN;
        while (ptx::load_acquire(turn) != before) {
        }
        ptx::fence_async_proxy_global();
    }
};

}  // namespace cuda
}  // namespace tf
