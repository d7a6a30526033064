// The table of all checks, by name.
#include "cuda/checks.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/checks_launch.cuh"

namespace tf {
namespace cuda {
namespace {

const std::vector<Check>& all_checks() {
    static const std::vector<Check> all = [] {
        std::vector<Check> checks = checks_sm80();
        const auto add = [&](const std::vector<Check>& more) { checks.insert(checks.end(), more.begin(), more.end()); };
        add(checks_sm90());
        add(checks_wgmma());
#if defined(TF_EMULATED)
        add(checks_faults());
#endif
        return checks;
    }();
    return all;
}

}  // namespace

std::vector<std::string> check_names(int capability) {
    std::vector<std::string> names;
    for (const Check& check : all_checks()) {
        if (check.capability <= capability) names.emplace_back(check.name);
    }
    return names;
}

void run_check(const std::string& name, const std::vector<uintptr_t>& in, const std::vector<uintptr_t>& out,
               const std::vector<int64_t>& numbers, const TensorMap* map, void* stream) {
    CheckArguments a{};
    if (in.size() > std::size(a.in) || out.size() > std::size(a.out) || numbers.size() > std::size(a.number)) {
        throw std::invalid_argument("run_check takes at most 4 inputs, 2 outputs and 16 numbers");
    }
    for (size_t i = 0; i < in.size(); ++i) a.in[i] = reinterpret_cast<const void*>(in[i]);
    for (size_t i = 0; i < out.size(); ++i) a.out[i] = reinterpret_cast<void*>(out[i]);
    std::copy(numbers.begin(), numbers.end(), a.number);
    if (map != nullptr) a.map = *map;
    for (const Check& check : all_checks()) {
        if (name == check.name) return check.launch(a, stream);
    }
    throw std::invalid_argument("no check is called '" + name + "'");
}

}  // namespace cuda
}  // namespace tf
