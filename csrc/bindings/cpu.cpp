// Python bindings of the CPU back end. Tensors arrive as integers (data_ptr), so nothing here knows torch.
#include "bindings/problem.h"
#include "cpu/host/attention.h"
#include "cpu/host/isa.h"

namespace py = pybind11;

namespace {

using tf::bindings::Address;
using tf::bindings::Strides;

// Everything about a problem but the pointers, filled once for each AttentionSpec.
class Plan {
  public:
    explicit Plan(const py::dict& fields) : p_(tf::bindings::problem_of(fields)) {}

    void forward(Address query, Address key, Address value, Address cu_seqlens_q, Address cu_seqlens_k,
                 Address seqlens_k, Address key_mask, Address bias, Address alibi_slopes, Address sinks, uint64_t seed,
                 Address block_table, Address out, Address lse, Address stats, int num_threads) const {
        tf::Problem p = with_operands({query, key, value, cu_seqlens_q, cu_seqlens_k, seqlens_k, key_mask, bias,
                                       alibi_slopes, sinks, seed, block_table},
                                      num_threads);
        tf::bindings::set_results(p, out, lse, stats);
        py::gil_scoped_release release;
        tf::attention_forward(p);
    }

    void backward(Address query, Address key, Address value, Address cu_seqlens_q, Address cu_seqlens_k,
                  Address seqlens_k, Address key_mask, Address bias, Address alibi_slopes, Address sinks, uint64_t seed,
                  Address block_table, Address out, Address lse, Address stats, int num_threads, Address dout,
                  Address dquery, Address dkey, Address dvalue, Address dlse, Address delta, Address dbias,
                  Strides dout_strides, Strides dquery_strides, Strides dkey_strides, Strides dvalue_strides) const {
        tf::Problem p = with_operands({query, key, value, cu_seqlens_q, cu_seqlens_k, seqlens_k, key_mask, bias,
                                       alibi_slopes, sinks, seed, block_table},
                                      num_threads);
        tf::bindings::set_results(p, out, lse, stats);
        tf::bindings::set_gradients(p, dout, dquery, dkey, dvalue, dlse, delta, dbias, dout_strides, dquery_strides,
                                    dkey_strides, dvalue_strides);
        py::gil_scoped_release release;
        tf::attention_backward(p);
    }

    bool takes_decode_path() const { return tf::takes_decode_path(p_); }

  private:
    tf::Problem with_operands(const tf::bindings::Addresses& addresses, int num_threads) const {
        tf::Problem p = p_;
        tf::bindings::set_operands(p, addresses);
        p.seed = addresses[tf::bindings::Place::seed];
        p.num_threads = num_threads;
        return p;
    }

    tf::Problem p_;
};

// Everything but the pointers is Python's to check (transformer_fast/pointwise.py).
void pointwise(tf::Pointwise::What what, int64_t dtype, int64_t rows, int64_t columns, Address x, int64_t x_row,
               Address y, int64_t y_row, Address weight, Address out, int num_threads, float eps, float gain_offset,
               int64_t heads, int64_t x_head) {
    const tf::Pointwise p{what,
                          static_cast<tf::DType>(dtype),
                          rows,
                          columns,
                          heads,
                          tf::bindings::bytes(x),
                          x_row,
                          x_head,
                          tf::bindings::bytes(y),
                          y_row,
                          tf::bindings::bytes(weight),
                          tf::bindings::bytes(out),
                          eps,
                          gain_offset,
                          {}};
    py::gil_scoped_release release;
    tf::pointwise(p, num_threads);
}

// A row of logits each; `rows_of` is (loss, top, inverse), float32 (3, rows).
void cross_entropy(tf::Pointwise::What what, int64_t dtype, int64_t rows, int64_t columns, Address logits,
                   int64_t logits_row, Address labels, int64_t ignored, Address rows_of, float scale, Address out,
                   int num_threads) {
    tf::Pointwise p{};
    p.what = what;
    p.dtype = static_cast<tf::DType>(dtype);
    p.rows = rows, p.columns = columns;
    p.x = tf::bindings::bytes(logits), p.x_row = logits_row;
    p.out = tf::bindings::bytes(out);
    float* found = reinterpret_cast<float*>(tf::bindings::bytes(rows_of));
    p.loss = {reinterpret_cast<const int64_t*>(tf::bindings::bytes(labels)),
              ignored,
              found,
              found + rows,
              found + 2 * rows,
              scale};
    py::gil_scoped_release release;
    tf::pointwise(p, num_threads);
}

tf::LinearWeight weight_of(int64_t dtype, int64_t in_features, int64_t out_features, Address weight,
                           Address value_weight, int64_t out_stride, int64_t in_stride, Address laid_out) {
    return {static_cast<tf::DType>(dtype),     in_features, out_features, tf::bindings::bytes(weight),
            tf::bindings::bytes(value_weight), out_stride,  in_stride,    tf::bindings::bytes(laid_out)};
}

// Everything but the pointers is Python's to check (transformer_fast/dropin/linears.py).
tf::Linear linear_of(int64_t activation, bool gated, int64_t dtype, int64_t rows, int64_t in_features,
                     int64_t out_features, Address x, int64_t x_row, Address laid_out, Address bias, Address value_bias,
                     Address residual, int64_t residual_row, Address out) {
    return {static_cast<tf::Linear::Activation>(activation),
            gated,
            static_cast<tf::DType>(dtype),
            rows,
            in_features,
            out_features,
            tf::bindings::bytes(x),
            x_row,
            1,
            tf::bindings::bytes(laid_out),
            tf::bindings::bytes(bias),
            tf::bindings::bytes(value_bias),
            tf::bindings::bytes(residual),
            residual_row,
            tf::bindings::bytes(out),
            out_features};
}

}  // namespace

PYBIND11_MODULE(_C_cpu, m) {
    m.doc() = "CPU kernels of transformer_fast";
    py::class_<Plan>(m, "Plan")
        .def(py::init<const py::dict&>())
        .def("forward", &Plan::forward)
        .def("backward", &Plan::backward)
        .def("takes_decode_path", &Plan::takes_decode_path);
    m.def("rms_norm", [](int64_t dtype, int64_t rows, int64_t columns, Address x, int64_t x_row, Address weight,
                         Address out, float eps, float gain_offset, int num_threads) {
        pointwise(tf::Pointwise::rms_norm, dtype, rows, columns, x, x_row, 0, 0, weight, out, num_threads, eps,
                  gain_offset, 1, 0);
    });
    m.def("gate", [](bool is_silu, int64_t dtype, int64_t rows, int64_t columns, Address gate, int64_t gate_row,
                     Address value, int64_t value_row, Address out, int num_threads) {
        pointwise(is_silu ? tf::Pointwise::gate_silu : tf::Pointwise::gate_gelu_tanh, dtype, rows, columns, gate,
                  gate_row, value, value_row, 0, out, num_threads, 0, 0, 1, 0);
    });
    m.def("gelu_tanh", [](int64_t dtype, int64_t rows, int64_t columns, Address x, Address out, int num_threads) {
        pointwise(tf::Pointwise::gelu_tanh, dtype, rows, columns, x, columns, 0, 0, 0, out, num_threads, 0, 0, 1, 0);
    });
    m.def("gelu_tanh_gradient",
          [](int64_t dtype, int64_t rows, int64_t columns, Address x, Address dy, Address out, int num_threads) {
              pointwise(tf::Pointwise::gelu_tanh_gradient, dtype, rows, columns, x, columns, dy, columns, 0, out,
                        num_threads, 0, 0, 1, 0);
          });
    m.def("cross_entropy", [](int64_t dtype, int64_t rows, int64_t columns, Address logits, int64_t logits_row,
                              Address labels, int64_t ignored, Address rows_of, int num_threads) {
        cross_entropy(tf::Pointwise::cross_entropy, dtype, rows, columns, logits, logits_row, labels, ignored, rows_of,
                      0, 0, num_threads);
    });
    m.def("cross_entropy_gradient",
          [](int64_t dtype, int64_t rows, int64_t columns, Address logits, int64_t logits_row, Address labels,
             int64_t ignored, Address rows_of, float scale, Address out, int num_threads) {
              cross_entropy(tf::Pointwise::cross_entropy_gradient, dtype, rows, columns, logits, logits_row, labels,
                            ignored, rows_of, scale, out, num_threads);
          });
    m.def("rotate", [](int64_t dtype, int64_t rows, int64_t heads, int64_t head_dim, Address x, int64_t x_row,
                       int64_t x_head, Address cos, Address sin, int64_t angle_row, Address out, int num_threads) {
        pointwise(tf::Pointwise::rotate, dtype, rows, heads * head_dim, x, x_row, cos, angle_row, sin, out, num_threads,
                  0, 0, heads, x_head);
    });
    m.def("linear_bytes", [](int64_t dtype, int64_t in_features, int64_t out_features, bool gated) {
        return tf::linear_bytes(weight_of(dtype, in_features, out_features, 0, gated ? 1 : 0, 0, 0, 0));
    });
    m.def("lay_out_linear",
          [](int64_t dtype, int64_t in_features, int64_t out_features, Address weight, Address value_weight,
             int64_t out_stride, int64_t in_stride, Address laid_out, int num_threads) {
              const auto w =
                  weight_of(dtype, in_features, out_features, weight, value_weight, out_stride, in_stride, laid_out);
              py::gil_scoped_release release;
              tf::lay_out_linear(w, num_threads);
          });
    py::class_<tf::Linear>(m, "Linear").def(py::init(&linear_of)).def("run", [](const tf::Linear& p, int num_threads) {
        py::gil_scoped_release release;
        tf::linear(p, num_threads);
    });
    m.def("linear_pair", [](const tf::Linear& first, const tf::Linear& second, int num_threads) {
        py::gil_scoped_release release;
        tf::linear_pair(first, second, num_threads);
    });
    m.def("matrix_product", [](int64_t rows, int64_t depth, int64_t columns, Address a, int64_t a_row, int64_t a_column,
                               Address b, int64_t b_row, int64_t b_column, Address bias, Address out, int num_threads) {
        const tf::MatrixProduct p{rows,
                                  depth,
                                  columns,
                                  tf::bindings::bytes(a),
                                  a_row,
                                  a_column,
                                  tf::bindings::bytes(b),
                                  b_row,
                                  b_column,
                                  tf::bindings::bytes(bias),
                                  tf::bindings::bytes(out)};
        py::gil_scoped_release release;
        tf::matrix_product(p, num_threads);
    });
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
