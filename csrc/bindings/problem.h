// From Python to tf::Problem: what the modules of all back ends share. Tensors arrive as integers (data_ptr).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/params.h"

namespace tf::bindings {

namespace py = pybind11;

using Address = uintptr_t;
using Strides = std::array<int64_t, 3>;  // batch, head, row

inline char* bytes(Address address) { return reinterpret_cast<char*>(address); }

template <class T>
T* as(Address address) {
    return reinterpret_cast<T*>(address);
}

inline Operand operand(Address data, const Strides& s) { return {bytes(data), s[0], s[1], s[2]}; }

// Everything about a problem but the pointers, as transformer_fast/backends/fields.py gives it.
inline Problem problem_of(const py::dict& fields) {
    Problem p;
    const auto number = [&](const char* name) { return fields[name].cast<int64_t>(); };
    const auto real = [&](const char* name) { return fields[name].cast<float>(); };
    const auto strides = [&](const char* name, Operand& target) { target = operand(0, fields[name].cast<Strides>()); };
    p.batch = number("batch");
    p.num_heads = number("num_heads");
    p.num_kv_heads = number("num_kv_heads");
    p.group_size = p.num_heads / p.num_kv_heads;
    p.seqlen_q = number("seqlen_q");
    p.seqlen_k = number("seqlen_k");
    p.total_q = number("total_q");
    p.total_k = number("total_k");
    p.head_dim = number("head_dim");
    p.head_dim_v = number("head_dim_v");
    p.packed = fields["packed"].cast<bool>();
    p.dtype = static_cast<DType>(number("dtype"));
    p.softmax_scale = real("softmax_scale");
    p.softcap = real("softcap");
    p.dropout_p = fields["dropout_p"].cast<double>();
    p.left = number("left");
    p.right = number("right");
    strides("query", p.query);
    strides("key", p.key);
    strides("value", p.value);
    strides("out", p.out);
    p.seqlens_k_stride = number("seqlens_k_stride");
    p.page_size = number("page_size");
    p.num_pages = number("num_pages");
    const auto table = fields["block_table"].cast<std::array<int64_t, 2>>();
    p.block_table_batch = table[0], p.block_table_page = table[1];
    const auto mask = fields["key_mask"].cast<std::array<int64_t, 2>>();
    p.key_mask_batch = mask[0], p.key_mask_key = mask[1];
    p.bias.dtype = static_cast<DType>(number("bias_dtype"));
    const auto bias = fields["bias"].cast<std::array<int64_t, 4>>();
    p.bias.batch = bias[0], p.bias.head = bias[1], p.bias.row = bias[2], p.bias.key = bias[3];
    const auto dbias = fields["dbias"].cast<std::array<int64_t, 4>>();
    p.dbias_batch = dbias[0], p.dbias_head = dbias[1], p.dbias_row = dbias[2], p.dbias_key = dbias[3];
    const auto alibi = fields["alibi"].cast<std::array<int64_t, 2>>();
    p.alibi_batch = alibi[0], p.alibi_head = alibi[1];
    p.sinks_dtype = static_cast<DType>(number("sinks_dtype"));
    p.sinks_stride = number("sinks_stride");
    return p;
}

// The operands in the order of transformer_fast.spec.Operands, 0 where absent; dropout's seed is the caller's affair.
enum Place {
    query,
    key,
    value,
    cu_seqlens_q,
    cu_seqlens_k,
    seqlens_k,
    key_mask,
    bias,
    alibi_slopes,
    sinks,
    seed,
    table
};
using Addresses = std::array<Address, 12>;

inline void set_operands(Problem& p, const Addresses& a) {
    p.query.data = bytes(a[Place::query]);
    p.key.data = bytes(a[Place::key]);
    p.value.data = bytes(a[Place::value]);
    p.cu_seqlens_q = as<const int32_t>(a[Place::cu_seqlens_q]);
    p.cu_seqlens_k = as<const int32_t>(a[Place::cu_seqlens_k]);
    p.seqlens_k = as<const int32_t>(a[Place::seqlens_k]);
    p.key_mask = as<const uint8_t>(a[Place::key_mask]);
    p.bias.data = bytes(a[Place::bias]);
    p.alibi_slopes = as<const float>(a[Place::alibi_slopes]);
    p.sinks = bytes(a[Place::sinks]);
    p.block_table = as<const int32_t>(a[Place::table]);
}

inline void set_results(Problem& p, Address out, Address lse, Address stats) {
    p.out.data = bytes(out);
    p.lse = as<float>(lse);
    p.stats = as<float>(stats);
}

// What the backward pass reads and writes besides; the strides come with the call, since autograd's gradients do.
inline void set_gradients(Problem& p, Address dout, Address dquery, Address dkey, Address dvalue, Address dlse,
                          Address delta, Address dbias, const Strides& dout_strides, const Strides& dquery_strides,
                          const Strides& dkey_strides, const Strides& dvalue_strides) {
    p.dout = operand(dout, dout_strides);
    p.dquery = operand(dquery, dquery_strides);
    p.dkey = operand(dkey, dkey_strides);
    p.dvalue = operand(dvalue, dvalue_strides);
    p.dlse = as<const float>(dlse);
    p.delta = as<float>(delta);
    p.dbias = as<float>(dbias);
}

}  // namespace tf::bindings
