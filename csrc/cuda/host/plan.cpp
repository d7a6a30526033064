#include "cuda/host/plan.h"

#include <climits>
#include <cstring>

#include "cuda/host/schedule.h"

namespace tf {
namespace cuda {

namespace {

constexpr int64_t kDecodeRows = 64;  // up to so many packed rows are decoded: their keys are divided
constexpr int64_t kAlignment = 256;  // of each array in a workspace

bool is(const KernelInfo& kernel, const char* phase) { return std::strcmp(kernel.phase, phase) == 0; }

// Whether a kernel's tiles are of keys.
bool walks_keys(const KernelInfo& kernel) { return is(kernel, "dkdv") || is(kernel, "backward"); }

// Every row begins at a multiple of 16 bytes. Strides of dimensions without a second entry do not matter.
bool is_aligned(const Problem& p, const Operand& operand, int64_t batch, int64_t heads, int64_t rows) {
    const auto whole = [&](int64_t count, int64_t stride) { return count <= 1 || stride * size_of(p.dtype) % 16 == 0; };
    return reinterpret_cast<uintptr_t>(operand.data) % 16 == 0 && whole(batch, operand.batch) &&
           whole(heads, operand.head) && whole(rows, operand.row);
}

bool all_aligned(const Problem& p) {
    const int64_t batch = p.packed ? 1 : p.batch, rows = p.packed ? p.total_q : p.seqlen_q;
    const int64_t entries = p.page_size != 0 ? p.num_pages : batch;
    const int64_t keys = p.page_size != 0 ? p.page_size : p.packed ? p.total_k : p.seqlen_k;
    const auto of_rows = [&](const Operand& o) { return is_aligned(p, o, batch, p.num_heads, rows); };
    const auto of_keys = [&](const Operand& o) { return is_aligned(p, o, entries, p.num_kv_heads, keys); };
    return of_rows(p.query) && of_rows(p.out) && of_rows(p.dout) && of_rows(p.dquery) && of_keys(p.key) &&
           of_keys(p.value) && of_keys(p.dkey) && of_keys(p.dvalue);
}

const char* word_of(DType dtype) {
    return dtype == DType::bf16 ? "bfloat16" : dtype == DType::f16 ? "float16" : "float32";
}

std::string sizes_of(const Problem& p) {
    const auto n = [](int64_t x) { return std::to_string(x); };
    std::string text = "batch " + n(p.batch) + ", num_heads " + n(p.num_heads) + ", num_kv_heads " + n(p.num_kv_heads) +
                       ", seqlen_q " + n(p.seqlen_q) + ", seqlen_k " + n(p.seqlen_k) + ", head_dim " + n(p.head_dim);
    if (p.head_dim_v != p.head_dim) text += ", head_dim_v " + n(p.head_dim_v);
    if (p.packed) text += ", packed";
    if (p.page_size != 0) text += ", page_size " + n(p.page_size);
    return text + ", " + word_of(p.dtype);
}

// Takes arrays from a workspace, one after the other.
struct Allocator {
    char* next;
    template <class T>
    T* take(int64_t count) {
        T* array = reinterpret_cast<T*>(next);
        next += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
        return array;
    }
};

}  // namespace

// ------------------------------------------------------------------------------------------ the choice

Plan::Plan(const Problem& problem, const Machine& machine) : p_(problem), machine_(machine) {
    modified_ = p_.modifies_scores() || p_.bias.data != nullptr || p_.dropout_p > 0.0 || p_.key_mask != nullptr;
    plan();
    if (forward_.empty() && !modified_) {  // a modified kernel can do a plain problem, not the other way round
        modified_ = true;
        plan();
    }
}

void Plan::plan() {
    forward_.clear(), backward_.clear(), refusals_.clear();
    key_ranges_ = find("key_ranges", 80);
    if (p_.key_mask != nullptr && key_ranges_ == nullptr) return;
    if (p_.seqlen_q * p_.group_size <= kDecodeRows) add_decode();
    for (const int family : {90, 80}) {
        if (family == 90 && machine_.capability != 90) continue;
        if (family == 90) add_forward("forward_full", family);
        if (family == 80 && machine_.capability == 90) add_forward("forward_fallback", family);
        add_forward("forward", family);
        if (p_.page_size == 0) add_backward(family);
    }
}

// The one with the smallest head_dim that holds the problem's. Plain and modified kernels keep the rows' maxima in
// different units, so a problem's kernels are all of one kind.
const KernelInfo* Plan::find(const char* phase, int family) const {
    const int64_t head_dim = max_of(p_.head_dim, p_.head_dim_v);
    const KernelInfo* best = nullptr;
    for (const KernelInfo* kernel : kernels()) {
        const bool fits = kernel->head_dim == 0 || (kernel->head_dim >= head_dim && kernel->dtype == p_.dtype);
        const bool of_kind = kernel->modified < 0 || (kernel->modified == 1) == modified_;
        if (!is(*kernel, phase) || kernel->family != family || !fits || !of_kind) continue;
        if (kernel->shared_bytes > machine_.shared_bytes) continue;
        if (kernel->suits != nullptr && !kernel->suits(p_)) continue;
        if (best == nullptr || kernel->head_dim < best->head_dim) best = kernel;
    }
    return best;
}

// Why a pass cannot be taken even if all that comes with a call is well aligned, nullptr where it can.
const char* Plan::always_refuses(const Pass& pass) const {
    Problem p = p_;
    p.query.data = p.key.data = p.value.data = p.out.data = nullptr;
    return refusal(pass, arguments_of(p, {}));
}

Step Plan::step_of(const KernelInfo& kernel) const {
    Step step;
    step.kernel = &kernel;
    if (is(kernel, "key_ranges")) {
        step.grid_x = p_.batch;
    } else if (is(kernel, "preprocess")) {
        step.grid_x = ceil_div(p_.num_heads * p_.total_q, kernel.block_m);
    } else {
        step.tiles = walks_keys(kernel) ? ceil_div(p_.seqlen_k, kernel.block_n)
                                        : ceil_div(p_.seqlen_q * p_.group_size, kernel.block_m);
        step.grid_x = step.tiles * p_.num_kv_heads * p_.batch;
        if (kernel.persistent) {
            step.grid_x = min_of<int64_t>(step.grid_x, int64_t{machine_.num_sms} * kernel.blocks_per_sm);
        }
    }
    return step;
}

void Plan::add_decode() {
    const KernelInfo* kernel = find("decode", 80);
    if (kernel == nullptr) return;
    Step step = step_of(*kernel);
    const int64_t seen = min_of(p_.seqlen_k, p_.left + p_.right + p_.seqlen_q);
    const int64_t slots = int64_t{machine_.num_sms} * kernel->blocks_per_sm;
    step.splits = num_splits(step.grid_x, slots, ceil_div(seen, kernel->block_n));
    Pass pass;
    if (step.splits > 1) {
        pass.counters = step.grid_x;
        pass.partials = step.splits * p_.num_heads * p_.total_q;
    }
    pass.steps = {step};
    forward_.push_back(pass);
}

void Plan::add_forward(const char* phase, int family) {
    const KernelInfo* kernel = find(phase, family);
    const KernelInfo* usual = find("forward", family);
    if (kernel == nullptr || (usual != nullptr && usual->head_dim < kernel->head_dim)) return;
    Pass pass;
    pass.steps = {step_of(*kernel)};
    pass.counters = kernel->persistent ? 1 : 0;
    if (const char* reason = always_refuses(pass)) {
        refusals_ += std::string(" (not ") + kernel->name + ": " + reason + ")";
    } else {
        forward_.push_back(pass);
    }
}

void Plan::add_backward(int family) {
    const KernelInfo* preprocess = find("preprocess", 80);
    const KernelInfo* keys = find(family == 90 ? "backward" : "dkdv", family);
    const KernelInfo* rows = find(family == 90 ? "postprocess" : "dq", family);
    if (preprocess == nullptr || keys == nullptr || rows == nullptr) return;
    Pass pass;
    pass.steps = {step_of(*preprocess), step_of(*keys), step_of(*rows)};
    if (keys->dquery_sum_floats != nullptr) {
        pass.dquery_sum = keys->dquery_sum_floats(p_);
        pass.counters = keys->turn_count(p_);
    }
    if (always_refuses(pass) == nullptr) backward_.push_back(pass);
}

std::string Plan::missing(const char* pass) const {
    return "no kernel of the " + std::string(pass) + " pass is built for compute capability " +
           std::to_string(machine_.capability / 10) + "." + std::to_string(machine_.capability % 10) + ", " +
           sizes_of(p_);
}

const char* Plan::refusal(const Pass& pass, const Arguments& a) const {
    for (const Step& step : pass.steps) {
        const char* reason = step.kernel->refuses == nullptr ? nullptr : step.kernel->refuses(a);
        if (reason != nullptr) return reason;
    }
    return nullptr;
}

std::string Plan::path() const {
    if (forward_.empty()) return forward_refuses();
    const Step& step = forward_[0].steps[0];
    std::string way = is(*step.kernel, "decode") ? "decode" : "tiled forward";
    if (step.splits > 1) way = "split-KV decode, " + std::to_string(step.splits) + " splits";
    if (p_.page_size != 0) way += " through a block table";
    const char* by = step.kernel->family == 90 ? "wgmma and TMA" : "mma.sync";
    return way + ", " + by + " (" + step.kernel->name + ")" + refusals_;
}

// ------------------------------------------------------------------------------------------ the memory

Workspace Plan::workspace_of(const std::vector<Pass>& passes) const {
    Workspace most;
    for (const Pass& pass : passes) {
        Allocator zeroed{nullptr}, scratch{nullptr};
        zeroed.take<int32_t>(pass.counters);
        zeroed.take<float>(pass.dquery_sum);
        if (p_.key_mask != nullptr) scratch.take<KeyRange>(p_.batch);
        scratch.take<float>(pass.partials * p_.head_dim_v);
        scratch.take<float>(pass.partials);
        scratch.take<float>(pass.partials);
        most.zeroed = max_of(most.zeroed, static_cast<int64_t>(zeroed.next - static_cast<char*>(nullptr)));
        most.scratch = max_of(most.scratch, static_cast<int64_t>(scratch.next - static_cast<char*>(nullptr)));
    }
    return most;
}

Arguments Plan::arguments_of(const Problem& p, const Call& call) const {
    Arguments a;
    a.problem = p;
    a.seed = call.seed;
    a.dropout_threshold = static_cast<uint32_t>(min_of(p.dropout_p * 4294967296.0, 4294967295.0));
    a.dropout_keep = static_cast<float>(1.0 / (1.0 - p.dropout_p));
    a.heads = static_cast<int32_t>(p.num_kv_heads * p.batch);
    a.deterministic = call.deterministic;
    a.aligned = all_aligned(p);
    return a;
}

// ------------------------------------------------------------------------------------------ the launches

void Plan::forward(const Problem& p, const Call& call) const {
    Arguments a = arguments_of(p, call);
    run(forward_, a, call);
}

void Plan::backward(const Problem& p, const Call& call) const {
    Arguments a = arguments_of(p, call);
    run(backward_, a, call);
}

void Plan::run(const std::vector<Pass>& passes, Arguments& a, const Call& call) const {
    const char* reason = "no kernel is built";
    size_t chosen = 0;
    while (chosen < passes.size() && (reason = refusal(passes[chosen], a)) != nullptr) ++chosen;
    if (chosen == passes.size()) throw Error(reason + (": " + sizes_of(p_)));
    const Pass& pass = passes[chosen];

    Allocator zeroed{call.zeroed}, scratch{call.scratch};
    a.queue = a.arrived = a.turn = zeroed.take<int32_t>(pass.counters);  // no pass has two of them
    a.dquery_sum = zeroed.take<float>(pass.dquery_sum);
    if (p_.key_mask != nullptr) {
        a.key_ranges = scratch.take<KeyRange>(p_.batch);
        launch(step_of(*key_ranges_), a, call.stream);
    }
    a.partial_sums = scratch.take<float>(pass.partials * p_.head_dim_v);
    a.partial_top = scratch.take<float>(pass.partials);
    a.partial_total = scratch.take<float>(pass.partials);
    for (const Step& step : pass.steps) launch(step, a, call.stream);
}

void Plan::launch(const Step& step, Arguments& a, Stream stream) const {
    if (step.grid_x == 0 || step.splits == 0) return;
    const KernelInfo& kernel = *step.kernel;
    try {
        if (step.grid_x > INT_MAX) throw Error("a grid of " + std::to_string(step.grid_x) + " blocks");
        const int64_t bytes_a_head = p_.seqlen_k * (p_.head_dim + p_.head_dim_v) * size_of(p_.dtype);
        a.tiles = static_cast<int32_t>(step.tiles);
        a.section = static_cast<int32_t>(section_of(machine_.l2_bytes, a.heads, bytes_a_head));
        a.splits = static_cast<int32_t>(step.splits);
        if (kernel.describe != nullptr) {
            MapRequests maps;
            kernel.describe(a, maps);
            const auto make = [](TensorMap& map, const TensorGeometry& geometry, const char* what) {
                if (geometry.data != nullptr) encode(map, geometry, what);
            };
            make(a.query_map, maps.query, "query");
            make(a.key_map, maps.key, "key");
            make(a.value_map, maps.value, "value");
            make(a.out_map, maps.out, "out");
            make(a.dout_map, maps.dout, "dout");
        }
        kernel.launch(kernel, a, static_cast<int>(step.grid_x), static_cast<int>(step.splits), stream);
    } catch (const std::exception& error) {
        throw Error(std::string(kernel.name) + ": " + error.what() + "; " + sizes_of(p_));
    }
}

}  // namespace cuda
}  // namespace tf
