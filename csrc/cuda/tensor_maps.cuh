// TMA descriptors of attention operands, and the boxes that kernels copy by them.
//
// All have the columns first, boxes of 64 columns (128 bytes, swizzled), and a column group of a tile (chunk_offset) is
// one box. Columns beyond head_dim are beyond the tensor: TMA writes zeros there.
#pragma once

#include "cuda/tile.cuh"

namespace tf {
namespace cuda {

// A dimension that operands are broadcast along has one entry, and its coordinate is 0: a stride of 0 says so.
inline void set_dimension(TensorGeometry& geometry, int dimension, int64_t size, int64_t stride_bytes, int box) {
    const bool broadcast = size <= 1 || stride_bytes == 0;
    geometry.size[dimension] = static_cast<uint64_t>(broadcast ? 1 : size);
    geometry.stride[dimension - 1] = static_cast<uint64_t>(broadcast ? 16 : stride_bytes);
    geometry.box[dimension] = static_cast<uint32_t>(box);
}
TF_DEVICE int coordinate(int64_t stride, int index) { return stride == 0 ? 0 : index; }

inline TensorGeometry column_geometry(const Problem& p, const Operand& operand, int64_t columns, int rank) {
    TensorGeometry geometry;
    geometry.dtype = p.dtype;
    geometry.rank = rank;
    geometry.data = operand.data;
    geometry.size[0] = static_cast<uint64_t>(columns);
    geometry.box[0] = 64;
    return geometry;
}

// ------------------------------------------------------------------------------------------ rows of keys

// Keys are copied in boxes of so many rows, all of them within one page: the greatest common divisor.
TF_INLINE int key_box_rows(const Problem& p, int block_n) {
    int a = block_n, b = static_cast<int>(p.page_size);
    while (b != 0) {
        const int rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

// K or V as {columns, rows, KV heads, batch entries or pages}.
inline TensorGeometry key_geometry(const Problem& p, const Operand& operand, int64_t columns, int block_n) {
    TensorGeometry geometry = column_geometry(p, operand, columns, 4);
    const bool paged = p.page_size != 0;
    set_dimension(geometry, 1,
                  paged      ? p.page_size
                  : p.packed ? p.total_k
                             : p.seqlen_k,
                  operand.row * 2, key_box_rows(p, block_n));
    set_dimension(geometry, 2, p.num_kv_heads, operand.head * 2, 1);
    set_dimension(geometry, 3, paged ? p.num_pages : p.packed ? 1 : p.batch, operand.batch * 2, 1);
    return geometry;
}

// Why no such descriptor can be made; nullptr where it can.
inline const char* key_map_refuses(const Arguments& a, int block_n) {
    const Problem& p = a.problem;
    if (!a.aligned) return "TMA needs rows that begin at multiples of 16 bytes";
    if (p.page_size != 0 && key_box_rows(p, block_n) % 8 != 0) {
        return "TMA needs a page_size whose greatest common divisor with the block of keys is a multiple of 8";
    }
    if (p.key.row == 0 || p.value.row == 0) return "TMA needs keys that are not one row seen again and again";
    return nullptr;
}

// Bytes that `load_keys` copies for the keys [n, n + kBlockN) of a sequence of which only those below `stop` are seen.
// Boxes that begin beyond are left out: their page may not exist.
template <int kBlockN, int kColumns>
TF_DEVICE int key_bytes(int box_rows, int n, int stop) {
    const int rows = min_of(kBlockN, (stop - n + box_rows - 1) / box_rows * box_rows);
    return rows * kColumns * 2;
}

template <int kBlockN, int kColumns>
TF_DEVICE void load_keys(const Problem& p, const Operand& operand, const TensorMap* map, int box_rows,
                         const DeviceSequence& s, int kv_head, int n, int stop, char* tile, uint64_t* barrier) {
    const int head = coordinate(operand.head, kv_head), end = min_of(n + kBlockN, stop);
    for (int key = n; key < end; key += box_rows, tile += box_rows * 128) {
        int row = s.first_key + key, entry = coordinate(operand.batch, s.batch);
        if (p.page_size != 0) {
            const int page_size = static_cast<int>(p.page_size);
            row = key % page_size;
            entry = coordinate(operand.batch, static_cast<int>(p.page_of(s.index, key / page_size)));
        }
        for (int group = 0; group < kColumns / 64; ++group) {
            ptx::tma_load(tile + group * kBlockN * 128, map, barrier, group * 64, row, head, entry);
        }
    }
}

// ------------------------------------------------------------------------------------------ packed rows

// Packed rows (PackedRows) are a box of {columns, heads of the group, positions, KV heads, batch entries} where whole
// groups fill the box.
TF_INLINE bool packed_rows_are_boxes(const Problem& p, const Operand& operand, int box_rows) {
    return box_rows % static_cast<int>(p.group_size) == 0 && operand.row != 0 &&
           (p.group_size == 1 || operand.head != 0);
}

inline TensorGeometry packed_rows_geometry(const Problem& p, const Operand& operand, int64_t columns, int box_rows) {
    TensorGeometry geometry = column_geometry(p, operand, columns, 5);
    const int group = static_cast<int>(p.group_size);
    set_dimension(geometry, 1, group, operand.head * 2, group);
    set_dimension(geometry, 2, p.packed ? p.total_q : p.seqlen_q, operand.row * 2, box_rows / group);
    set_dimension(geometry, 3, p.num_kv_heads, operand.head * group * 2, 1);
    set_dimension(geometry, 4, p.packed ? 1 : p.batch, operand.batch * 2, 1);
    return geometry;
}

// Rows [row, row + kRows) of a tile of packed rows, kRows a multiple of the group.
template <int kRows, int kColumns>
TF_DEVICE void load_packed_rows(const Operand& operand, const TensorMap* map, const DeviceSequence& s,
                                const PackedRows& rows, int kv_head, int row, char* tile, uint64_t* barrier) {
    const int position = s.first_query + rows.position(row);
    for (int group = 0; group < kColumns / 64; ++group) {
        ptx::tma_load(tile + group * kRows * 128, map, barrier, group * 64, 0, position,
                      coordinate(operand.head, kv_head), coordinate(operand.batch, s.batch));
    }
}

}  // namespace cuda
}  // namespace tf
