// Python bindings of the CUDA kernels, compiled twice: _C_cuda launches them on a GPU, _C_emulated runs them on the
// CPU.
#include "bindings/problem.h"
#include "cuda/host/plan.h"

#if defined(TF_EMULATED)
#include "emulator/launch.h"
#include "emulator/sites.h"
#endif
#if defined(TF_HAS_CHECKS)
#include "cuda/checks.h"
#endif

namespace py = pybind11;

namespace {

using tf::bindings::Address;
using tf::bindings::Addresses;
using tf::bindings::Strides;

// The problem's fields, the machine's, and what launches follow from them: once for each AttentionSpec.
class Plan {
  public:
    // `given`: which operands there are, in their order.
    Plan(const py::dict& fields, const std::array<bool, 12>& given, const std::array<int64_t, 4>& machine)
        : problem_(tf::bindings::problem_of(fields)), plan_(with_given(problem_, given), machine_of(machine)) {}

    std::string forward_refuses() const { return plan_.forward_refuses(); }
    std::string backward_refuses() const { return plan_.backward_refuses(); }
    std::string path() const { return plan_.path(); }
    std::pair<int64_t, int64_t> forward_workspace() const { return pair_of(plan_.forward_workspace()); }
    std::pair<int64_t, int64_t> backward_workspace() const { return pair_of(plan_.backward_workspace()); }

    void forward(const Addresses& operands, Address out, Address lse, Address stats, Address zeroed, Address scratch,
                 int device, Address stream) const {
        tf::Problem p = problem_;
        tf::bindings::set_operands(p, operands);
        tf::bindings::set_results(p, out, lse, stats);
        const tf::cuda::Call call = call_of(operands, zeroed, scratch, false, stream);
        py::gil_scoped_release release;
        tf::cuda::make_current(device);
        plan_.forward(p, call);
    }

    void backward(const Addresses& operands, Address out, Address lse, Address stats, Address dout, Address dquery,
                  Address dkey, Address dvalue, Address dlse, Address delta, Address dbias, const Strides& dout_strides,
                  const Strides& dquery_strides, const Strides& dkey_strides, const Strides& dvalue_strides,
                  bool deterministic, Address zeroed, Address scratch, int device, Address stream) const {
        tf::Problem p = problem_;
        tf::bindings::set_operands(p, operands);
        tf::bindings::set_results(p, out, lse, stats);
        tf::bindings::set_gradients(p, dout, dquery, dkey, dvalue, dlse, delta, dbias, dout_strides, dquery_strides,
                                    dkey_strides, dvalue_strides);
        const tf::cuda::Call call = call_of(operands, zeroed, scratch, deterministic, stream);
        py::gil_scoped_release release;
        tf::cuda::make_current(device);
        plan_.backward(p, call);
    }

  private:
    static tf::Problem with_given(tf::Problem p, const std::array<bool, 12>& given) {
        Addresses addresses{};
        for (size_t i = 0; i < given.size(); ++i) addresses[i] = given[i] ? 16 : 0;
        tf::bindings::set_operands(p, addresses);
        return p;
    }
    static tf::cuda::Machine machine_of(const std::array<int64_t, 4>& m) {
        return {static_cast<int>(m[0]), static_cast<int>(m[1]), m[2], m[3]};
    }
    static std::pair<int64_t, int64_t> pair_of(const tf::cuda::Workspace& w) { return {w.zeroed, w.scratch}; }
    static tf::cuda::Call call_of(const Addresses& operands, Address zeroed, Address scratch, bool deterministic,
                                  Address stream) {
        using tf::bindings::as;
        return {as<const int64_t>(operands[tf::bindings::Place::seed]), as<char>(zeroed), as<char>(scratch),
                deterministic, as<void>(stream)};
    }

    tf::Problem problem_;
    tf::cuda::Plan plan_;
};

py::list kernels() {
    py::list all;
    for (const tf::cuda::KernelInfo* kernel : tf::cuda::kernels()) {
        py::dict row;
        row["name"] = kernel->name;
        row["phase"] = kernel->phase;
        row["family"] = kernel->family;
        const bool any = kernel->head_dim == 0;
        row["dtype"] = any ? py::object(py::none())
                           : py::object(py::str(kernel->dtype == tf::DType::bf16 ? "bfloat16" : "float16"));
        row["head_dim"] = kernel->head_dim;
        row["modified"] = kernel->modified < 0 ? py::object(py::none()) : py::object(py::bool_(kernel->modified == 1));
        row["block_m"] = kernel->block_m;
        row["block_n"] = kernel->block_n;
        row["threads"] = kernel->threads;
        row["min_blocks"] = kernel->blocks_per_sm;
        row["shared_bytes"] = kernel->shared_bytes;
        row["maps"] = kernel->describe != nullptr;
        row["persistent"] = kernel->persistent;
        all.append(row);
    }
    return all;
}

#if defined(TF_HAS_CHECKS)
tf::TensorGeometry geometry_of(const py::dict& fields) {
    tf::TensorGeometry g;
    const auto size = fields["size"].cast<std::vector<uint64_t>>(),
               stride = fields["stride"].cast<std::vector<uint64_t>>();
    const auto box = fields["box"].cast<std::vector<uint32_t>>();
    if (size.empty() || size.size() > 5 || stride.size() + 1 != size.size() || box.size() != size.size()) {
        throw py::value_error("a geometry has 1 to 5 sizes, as many in the box, and one stride less");
    }
    g.dtype = static_cast<tf::DType>(fields["dtype"].cast<int>());
    g.rank = static_cast<int>(size.size());
    g.data = tf::bindings::as<const void>(fields["data"].cast<Address>());
    std::copy(size.begin(), size.end(), g.size);
    std::copy(stride.begin(), stride.end(), g.stride);
    std::copy(box.begin(), box.end(), g.box);
    g.swizzle_128 = fields["swizzle_128"].cast<bool>();
    return g;
}

void run_check(const std::string& name, const std::vector<uintptr_t>& in, const std::vector<uintptr_t>& out,
               const std::vector<int64_t>& numbers, const py::object& geometry, Address stream) {
    tf::TensorMap map{};
    if (!geometry.is_none()) tf::cuda::encode(map, geometry_of(geometry.cast<py::dict>()), "the check");
    tf::cuda::run_check(name, in, out, numbers, geometry.is_none() ? nullptr : &map, tf::bindings::as<void>(stream));
}
#endif

#if defined(TF_EMULATED)
// By name, as tests write it; the order of tf::emulator's enumerations.
template <class E>
E choice(const char* what, const std::string& name, std::initializer_list<const char*> names) {
    std::string allowed;
    int number = 0;
    for (const char* each : names) {
        if (name == each) return static_cast<E>(number);
        allowed += (number++ == 0 ? "" : ", ") + std::string(each);
    }
    throw py::value_error(std::string(what) + " is '" + name + "'; allowed: " + allowed);
}

void configure(uint64_t seed, bool shuffle_blocks, int blocks_at_once, bool check_proxy, const std::string& warps,
               const std::string& lanes, const std::string& landing) {
    namespace e = tf::emulator;
    if (blocks_at_once < 1 || blocks_at_once > e::kMostBlocksAtOnce) {
        throw std::invalid_argument("blocks_at_once is " + std::to_string(blocks_at_once) + "; allowed: 1 to " +
                                    std::to_string(e::kMostBlocksAtOnce));
    }
    e::Settings settings;
    settings.blocks_at_once = blocks_at_once;
    settings.seed = seed;
    settings.shuffle_blocks = shuffle_blocks;
    settings.check_proxy = check_proxy;
    settings.warps =
        choice<e::WarpOrder>("warps", warps, {"drawn", "lowest_first", "highest_first", "random", "starve_one"});
    settings.lanes =
        choice<e::LaneOrder>("lanes", lanes, {"drawn", "ascending", "descending", "random", "leader_first"});
    settings.landing = choice<e::Landing>("landing", landing, {"drawn", "late", "early"});
    e::set(settings);
}

py::list synchronisations() {
    py::list all;
    for (const auto& site : tf::emulator::synchronisations()) {
        all.append(py::make_tuple(site.operation, site.file, site.line, site.count));
    }
    return all;
}
#endif

}  // namespace

#if defined(TF_EMULATED)
PYBIND11_MODULE(_C_emulated, m) {
    m.doc() = "CUDA kernels of transformer_fast, run on the CPU for tests";
#else
PYBIND11_MODULE(_C_cuda, m) {
    m.doc() = "CUDA kernels of transformer_fast";
#endif
    py::class_<Plan>(m, "Plan")
        .def(py::init<const py::dict&, const std::array<bool, 12>&, const std::array<int64_t, 4>&>())
        .def("forward", &Plan::forward)
        .def("backward", &Plan::backward)
        .def("forward_refuses", &Plan::forward_refuses)
        .def("backward_refuses", &Plan::backward_refuses)
        .def("forward_workspace", &Plan::forward_workspace)
        .def("backward_workspace", &Plan::backward_workspace)
        .def("path", &Plan::path);
    m.def(
        "machine",
        [](int device) {
            const tf::cuda::Machine m = tf::cuda::machine_of(device);
            return std::array<int64_t, 4>{m.capability, m.num_sms, m.l2_bytes, m.shared_bytes};
        },
        "(capability, num_sms, l2_bytes, shared_bytes) of a device, or in the emulator of a compute capability.");
    m.def("device_count", &tf::cuda::device_count);
    m.def(
        "why_not",
        [] {
            const std::string reason = tf::cuda::why_not();
            return reason.empty() ? py::object(py::none()) : py::object(py::str(reason));
        },
        "Why there is no device, or None where there is one.");
    m.def("kernels", &kernels, "All kernels, with their tiles.");
    m.def("targets", [] { return std::string(TF_TARGETS); }, "The machines there is code for.");
#if defined(TF_HAS_CHECKS)
    m.def("check_names", &tf::cuda::check_names);
    m.def("run_check", &run_check);
#endif
#if defined(TF_EMULATED)
    m.def("configure", &configure, py::arg("seed") = 0, py::kw_only(), py::arg("shuffle_blocks") = false,
          py::arg("blocks_at_once") = 1, py::arg("check_proxy") = true, py::arg("warps") = "drawn",
          py::arg("lanes") = "drawn", py::arg("landing") = "drawn", "For all launches to come.");
    m.def("set_seed", [](uint64_t seed) {
        tf::emulator::Settings settings = tf::emulator::settings();
        settings.seed = seed;
        tf::emulator::set(settings);
    });
    m.def("synchronisations", &synchronisations, "(operation, file, line, calls) of every one that has run.");
    m.def("disable", &tf::emulator::disable, "Makes the synchronisations of a line do nothing.");
    m.def("enable_all", &tf::emulator::enable_all);
#endif
}
