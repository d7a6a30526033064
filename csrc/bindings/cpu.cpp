// Python bindings of the CPU back end. Tensors arrive as integers (data_ptr), so nothing here knows torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/host/attention.h"
#include "cpu/host/isa.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

char* bytes(Address address) { return reinterpret_cast<char*>(address); }

template <class T>
T* as(Address address) {
    return reinterpret_cast<T*>(address);
}

using Strides = std::array<int64_t, 3>;  // batch, head, row

tf::Operand operand(Address data, const Strides& s) { return {bytes(data), s[0], s[1], s[2]}; }

// Everything about a problem but the pointers, filled once for each AttentionSpec.
class Plan {
  public:
    explicit Plan(const py::dict& fields) {
        const auto number = [&](const char* name) { return fields[name].cast<int64_t>(); };
        const auto real = [&](const char* name) { return fields[name].cast<float>(); };
        const auto strides = [&](const char* name, tf::Operand& target) {
            target = operand(0, fields[name].cast<Strides>());
        };
        p_.batch = number("batch");
        p_.num_heads = number("num_heads");
        p_.num_kv_heads = number("num_kv_heads");
        p_.group_size = p_.num_heads / p_.num_kv_heads;
        p_.seqlen_q = number("seqlen_q");
        p_.seqlen_k = number("seqlen_k");
        p_.total_q = number("total_q");
        p_.total_k = number("total_k");
        p_.head_dim = number("head_dim");
        p_.head_dim_v = number("head_dim_v");
        p_.packed = fields["packed"].cast<bool>();
        p_.dtype = static_cast<tf::DType>(number("dtype"));
        p_.softmax_scale = real("softmax_scale");
        p_.softcap = real("softcap");
        p_.dropout_p = fields["dropout_p"].cast<double>();
        p_.left = number("left");
        p_.right = number("right");
        strides("query", p_.query);
        strides("key", p_.key);
        strides("value", p_.value);
        strides("out", p_.out);
        p_.seqlens_k_stride = number("seqlens_k_stride");
        p_.page_size = number("page_size");
        p_.num_pages = number("num_pages");
        const auto table = fields["block_table"].cast<std::array<int64_t, 2>>();
        p_.block_table_batch = table[0], p_.block_table_page = table[1];
        const auto mask = fields["key_mask"].cast<std::array<int64_t, 2>>();
        p_.key_mask_batch = mask[0], p_.key_mask_key = mask[1];
        p_.bias.dtype = static_cast<tf::DType>(number("bias_dtype"));
        const auto bias = fields["bias"].cast<std::array<int64_t, 4>>();
        p_.bias.batch = bias[0], p_.bias.head = bias[1], p_.bias.row = bias[2], p_.bias.key = bias[3];
        const auto dbias = fields["dbias"].cast<std::array<int64_t, 4>>();
        p_.dbias_batch = dbias[0], p_.dbias_head = dbias[1], p_.dbias_row = dbias[2], p_.dbias_key = dbias[3];
        const auto alibi = fields["alibi"].cast<std::array<int64_t, 2>>();
        p_.alibi_batch = alibi[0], p_.alibi_head = alibi[1];
        p_.sinks_dtype = static_cast<tf::DType>(number("sinks_dtype"));
        p_.sinks_stride = number("sinks_stride");
    }

    // The operands in the order of transformer_fast.spec.Operands, 0 where absent.
    void forward(Address query, Address key, Address value, Address cu_seqlens_q, Address cu_seqlens_k,
                 Address seqlens_k, Address key_mask, Address bias, Address alibi_slopes, Address sinks, uint64_t seed,
                 Address block_table, Address out, Address lse, Address stats, int num_threads) const {
        tf::Problem p = with_operands(query, key, value, cu_seqlens_q, cu_seqlens_k, seqlens_k, key_mask, bias,
                                      alibi_slopes, sinks, seed, block_table, out, lse, stats, num_threads);
        py::gil_scoped_release release;
        tf::attention_forward(p);
    }

    void backward(Address query, Address key, Address value, Address cu_seqlens_q, Address cu_seqlens_k,
                  Address seqlens_k, Address key_mask, Address bias, Address alibi_slopes, Address sinks, uint64_t seed,
                  Address block_table, Address out, Address lse, Address stats, int num_threads, Address dout,
                  Address dquery, Address dkey, Address dvalue, Address dlse, Address delta, Address dbias,
                  Strides dout_strides, Strides dquery_strides, Strides dkey_strides, Strides dvalue_strides) const {
        tf::Problem p = with_operands(query, key, value, cu_seqlens_q, cu_seqlens_k, seqlens_k, key_mask, bias,
                                      alibi_slopes, sinks, seed, block_table, out, lse, stats, num_threads);
        p.dout = operand(dout, dout_strides);
        p.dquery = operand(dquery, dquery_strides);
        p.dkey = operand(dkey, dkey_strides);
        p.dvalue = operand(dvalue, dvalue_strides);
        p.dlse = as<const float>(dlse);
        p.delta = as<float>(delta);
        p.dbias = as<float>(dbias);
        py::gil_scoped_release release;
        tf::attention_backward(p);
    }

    bool takes_decode_path() const { return tf::takes_decode_path(p_); }

  private:
    tf::Problem with_operands(Address query, Address key, Address value, Address cu_seqlens_q, Address cu_seqlens_k,
                              Address seqlens_k, Address key_mask, Address bias, Address alibi_slopes, Address sinks,
                              uint64_t seed, Address block_table, Address out, Address lse, Address stats,
                              int num_threads) const {
        tf::Problem p = p_;
        p.query.data = bytes(query);
        p.key.data = bytes(key);
        p.value.data = bytes(value);
        p.cu_seqlens_q = as<const int32_t>(cu_seqlens_q);
        p.cu_seqlens_k = as<const int32_t>(cu_seqlens_k);
        p.seqlens_k = as<const int32_t>(seqlens_k);
        p.block_table = as<const int32_t>(block_table);
        p.key_mask = as<const uint8_t>(key_mask);
        p.bias.data = bytes(bias);
        p.alibi_slopes = as<const float>(alibi_slopes);
        p.sinks = bytes(sinks);
        p.seed = seed;
        p.out.data = bytes(out);
        p.lse = as<float>(lse);
        p.stats = as<float>(stats);
        p.num_threads = num_threads;
        return p;
    }

    tf::Problem p_;
};

}  // namespace

PYBIND11_MODULE(_C_cpu, m) {
    m.doc() = "CPU kernels of transformer_fast";
    py::class_<Plan>(m, "Plan")
        .def(py::init<const py::dict&>())
        .def("forward", &Plan::forward)
        .def("backward", &Plan::backward)
        .def("takes_decode_path", &Plan::takes_decode_path);
    m.def("available_isas", &tf::available_isas, "Instruction sets this machine can run, best first.");
    m.def("current_isa", &tf::current_isa);
    m.def("force_isa", &tf::force_isa);
    m.def(
        "measure_peak",
        [](const std::string& dtype, int num_threads) {
            if (dtype != "float32" && dtype != "bfloat16") {
                throw py::value_error("dtype is '" + dtype + "'; allowed: float32, bfloat16");
            }
            py::gil_scoped_release release;
            return tf::measure_peak(dtype == "float32" ? tf::DType::f32 : tf::DType::bf16, num_threads);
        },
        "Floating-point operations a second of the kernels' inner instruction, on registers.");
    // For the tests that hold csrc/core/mask.h and transformer_fast/masks.py equal.
    m.def("row_interval", [](const std::array<int64_t, 5>& m_, int64_t row) {
        const tf::Interval r = tf::row_interval({m_[0], m_[1], m_[2], m_[3], m_[4]}, row);
        return std::array<int64_t, 2>{r.lo, r.hi};
    });
    m.def("tile_range", [](const std::array<int64_t, 5>& m_, int64_t first_row, int64_t last_row) {
        const tf::TileRange r = tf::tile_range({m_[0], m_[1], m_[2], m_[3], m_[4]}, first_row, last_row);
        return std::array<int64_t, 4>{r.begin, r.full_begin, r.full_end, r.end};
    });
}
