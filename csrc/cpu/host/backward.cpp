// Schedule of the backward pass: runs of query rows, their accumulators, and the order in which those are added.
#include <algorithm>
#include <cstring>
#include <vector>

#include "attention.h"
#include "isa.h"
#include "sequences.h"
#include "tasks.h"

namespace tf {
namespace {

constexpr int64_t kRunsPerThread = 4;

// What one thread does without pause. Usually one run; runs that add into the same rows of dbias share a task.
struct BackwardTask {
    std::vector<BackwardRun> runs;
    int64_t pairs = 0;
};

struct AccumulatorWidths {
    int64_t key, value;
    int64_t floats(const BackwardRun& run) const { return (run.key_end - run.key_begin) * (key + value); }
};

// Query rows of each (sequence, KV head), whole if that makes tasks enough, else in equal parts. Parts have
// accumulators of their own, which are added in a fixed order, so results depend on the number of threads alone.
std::vector<BackwardTask> make_backward_tasks(const Problem& p, const Kernels& kernels,
                                              const std::vector<Sequence>& sequences) {
    const bool bias = p.dbias != nullptr;
    const bool batch_shares = bias && p.dbias_batch == 0, heads_share = bias && p.dbias_head == 0;
    const int64_t chains = std::max<int64_t>(1, (batch_shares ? 1 : p.batch) * (heads_share ? 1 : p.num_kv_heads));
    const bool rows_share = bias && p.dbias_row == 0;
    const int64_t parts =
        rows_share || chains >= kRunsPerThread * p.num_threads ? 1 : ceil_div(kRunsPerThread * p.num_threads, chains);
    std::vector<BackwardTask> tasks(static_cast<size_t>(chains * parts));
    for (const Sequence& s : sequences) {
        const int64_t rows = s.len_q * p.group_size;
        const int64_t length = std::max(kernels.tile_rows, round_up(ceil_div(rows, parts), kernels.tile_rows));
        for (int64_t h = 0; h < p.num_kv_heads; ++h) {
            const int64_t chain =
                (batch_shares ? 0 : s.index) * (heads_share ? 1 : p.num_kv_heads) + (heads_share ? 0 : h);
            for (int64_t r = 0; r < rows; r += length) {
                const int64_t count = std::min(length, rows - r);
                const TileRange seen = tile_range(s.mask, r / p.group_size, (r + count - 1) / p.group_size);
                BackwardTask& task = tasks[static_cast<size_t>(chain * parts + r / length)];
                task.runs.push_back({static_cast<int32_t>(s.index), static_cast<int32_t>(h), r, count, seen.begin,
                                     seen.end, nullptr, nullptr});
                task.pairs += count * (seen.end - seen.begin);
            }
        }
    }
    tasks.erase(std::remove_if(tasks.begin(), tasks.end(), [](const BackwardTask& t) { return t.runs.empty(); }),
                tasks.end());
    std::stable_sort(tasks.begin(), tasks.end(),
                     [](const BackwardTask& a, const BackwardTask& b) { return a.pairs > b.pairs; });
    return tasks;
}

// Writes dK and dV of keys [first, last) of one KV head from the runs that saw them; zeros where none did.
void store_key_gradients(const Problem& p, const Kernels& kernels, const Sequence& s, int64_t kv_head,
                         const std::vector<const BackwardRun*>& runs, const AccumulatorWidths& widths, int64_t first,
                         int64_t last) {
    std::vector<const float*> key_parts, value_parts;
    std::vector<float> sum(static_cast<size_t>(std::max(p.head_dim, p.head_dim_v)));
    const int64_t size = size_of(p.dtype), batch = p.packed ? 0 : s.index;
    const auto target = [&](const Operand& operand, int64_t j) {
        return operand.data + (batch * operand.batch + kv_head * operand.head + (s.first_key + j) * operand.row) * size;
    };
    for (int64_t j = first; j < last; ++j) {
        key_parts.clear();
        value_parts.clear();
        for (const BackwardRun* run : runs) {
            if (j < run->key_begin || j >= run->key_end) continue;
            key_parts.push_back(run->dkey + (j - run->key_begin) * widths.key);
            value_parts.push_back(run->dvalue + (j - run->key_begin) * widths.value);
        }
        const int64_t parts = static_cast<int64_t>(key_parts.size());
        kernels.store_gradient_row(p.dtype, key_parts.data(), parts, p.head_dim, p.softmax_scale, sum.data(),
                                   target(p.dkey, j));
        kernels.store_gradient_row(p.dtype, value_parts.data(), parts, p.head_dim_v, 1.0f, sum.data(),
                                   target(p.dvalue, j));
    }
}

void backward_by_runs(const Problem& p, const Kernels& kernels, const std::vector<Sequence>& sequences) {
    const AccumulatorWidths widths{round_up(p.head_dim, kernels.lanes), round_up(p.head_dim_v, kernels.lanes)};
    std::vector<BackwardTask> tasks = make_backward_tasks(p, kernels, sequences);
    // All runs of one (sequence, KV head), in the order of their rows whatever the order of the tasks.
    std::vector<std::vector<const BackwardRun*>> runs_of(static_cast<size_t>(p.batch * p.num_kv_heads));
    int64_t pairs = 0, floats = 0, largest = 0;
    for (const BackwardTask& task : tasks) {
        pairs += task.pairs;
        for (const BackwardRun& run : task.runs) {
            runs_of[static_cast<size_t>(run.sequence * p.num_kv_heads + run.kv_head)].push_back(&run);
            floats += widths.floats(run);
            largest = std::max(largest, widths.floats(run));
        }
    }
    const bool whole = std::all_of(runs_of.begin(), runs_of.end(), [](const auto& runs) { return runs.size() <= 1; });
    const int threads = threads_for(p, pairs * 3);
    const int64_t workspace = round_up(kernels.backward_workspace(p), 64);
    const auto use_memory = [&](BackwardRun& run, float* memory) {
        run.dkey = memory;
        run.dvalue = memory + (run.key_end - run.key_begin) * widths.key;
    };
    const auto keys_of = [&](const Sequence& s) { return p.packed ? s.len_k : p.seqlen_k; };
    std::vector<float> shared;
    if (!whole) {  // parts of one head wait for each other in memory of their own
        shared.resize(static_cast<size_t>(floats));
        float* next = shared.data();
        for (BackwardTask& task : tasks) {
            for (BackwardRun& run : task.runs) {
                use_memory(run, next);
                next += widths.floats(run);
            }
        }
    }
    run_tasks(static_cast<int64_t>(tasks.size()), threads, workspace + (whole ? largest * 4 : 0),
              [&](int64_t number, char* memory) {
                  for (BackwardRun& run : tasks[static_cast<size_t>(number)].runs) {
                      const Sequence& s = sequences[static_cast<size_t>(run.sequence)];
                      if (whole) {
                          use_memory(run, reinterpret_cast<float*>(memory + workspace));
                          std::memset(run.dkey, 0, static_cast<size_t>(widths.floats(run)) * 4);
                      }
                      kernels.backward(p, s, run, memory);
                      if (whole) store_key_gradients(p, kernels, s, run.kv_head, {&run}, widths, 0, keys_of(s));
                  }
              });
    for (auto& runs : runs_of) {
        std::sort(runs.begin(), runs.end(),
                  [](const BackwardRun* a, const BackwardRun* b) { return a->first_row < b->first_row; });
    }
    run_tasks(p.batch * p.num_kv_heads, threads, 64, [&](int64_t unit, char*) {
        const Sequence& s = sequences[static_cast<size_t>(unit / p.num_kv_heads)];
        const auto& runs = runs_of[static_cast<size_t>(unit)];
        if (whole && !runs.empty()) return;
        store_key_gradients(p, kernels, s, unit % p.num_kv_heads, runs, widths, 0, keys_of(s));
    });
}

}  // namespace

void attention_backward(const Problem& problem) {
    Problem p = problem;
    const MaskSummary summary(p);
    const std::vector<Sequence> sequences = make_sequences(p);
    backward_by_runs(p, current_kernels(), sequences);
}

}  // namespace tf
