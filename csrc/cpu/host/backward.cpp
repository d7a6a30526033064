// Schedule of the backward pass: runs of query rows, their accumulators, and the order in which those are added.
#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "attention.h"
#include "isa.h"
#include "sequences.h"
#include "tasks.h"

namespace tf {
namespace {

// One (sequence, KV head): what has a dK and a dV of its own.
struct BackwardUnit {
    const Sequence* sequence;
    int64_t kv_head;
};

// Units that add into the same rows of dbias, to be done one after the other; usually a chain is one unit.
using Chain = std::vector<BackwardUnit>;

// What one thread does without pause.
struct BackwardTask {
    std::vector<BackwardRun> runs;
    int64_t pairs = 0;
};

struct AccumulatorWidths {
    int64_t key, value;
    int64_t floats(const BackwardRun& run) const { return (run.key_end - run.key_begin) * (key + value); }
};

std::vector<Chain> make_chains(const Problem& p, const std::vector<Sequence>& sequences) {
    const bool batch_shares = p.dbias != nullptr && p.dbias_batch == 0;
    const bool heads_share = p.dbias != nullptr && p.dbias_head == 0;
    const int64_t heads = heads_share ? 1 : p.num_kv_heads;
    std::vector<Chain> chains(static_cast<size_t>((batch_shares ? 1 : p.batch) * heads));
    for (const Sequence& s : sequences) {
        for (int64_t h = 0; h < p.num_kv_heads; ++h) {
            const int64_t chain = (batch_shares ? 0 : s.index) * heads + (heads_share ? 0 : h);
            chains[static_cast<size_t>(chain)].push_back({&s, h});
        }
    }
    return chains;
}

// In how many parts the rows of a unit are done: one if there are chains enough to keep all threads busy. Each part
// has accumulators for the keys it sees, so there are no more than two for each thread. Rows that share their row of
// dbias cannot be parted.
int64_t parts_of_unit(const Problem& p, int64_t chains) {
    const bool rows_share = p.dbias != nullptr && p.dbias_row == 0;
    if (rows_share || chains == 0 || chains >= 4 * p.num_threads) return 1;
    return std::min(ceil_div(4 * p.num_threads, chains), 2 * ceil_div(p.num_threads, chains));
}

// The query rows of a unit as runs of equal length. Runs of one unit are at work at the same time, so the heads of a
// group that share a row of dbias must not be divided between two of them.
std::vector<BackwardRun> make_runs(const Problem& p, const Kernels& kernels, const BackwardUnit& unit, int64_t parts) {
    const Sequence& s = *unit.sequence;
    const int64_t rows = s.len_q * p.group_size;
    const bool heads_share = p.dbias != nullptr && p.dbias_head == 0;
    const int64_t step = heads_share ? std::lcm(kernels.tile_rows, p.group_size) : kernels.tile_rows;
    const int64_t length = parts == 1 ? rows : std::max(step, round_up(ceil_div(rows, parts), step));
    std::vector<BackwardRun> runs;
    for (int64_t r = 0; r < rows; r += length) {
        const int64_t count = std::min(length, rows - r);
        const TileRange seen = tile_range(s.mask, r / p.group_size, (r + count - 1) / p.group_size);
        runs.push_back({static_cast<int32_t>(s.index), static_cast<int32_t>(unit.kv_head), r, count, seen.begin,
                        seen.end, nullptr, nullptr});
    }
    return runs;
}

int64_t pairs_of(const BackwardRun& run) { return run.rows * (run.key_end - run.key_begin); }

void heaviest_first(std::vector<BackwardTask>& tasks) {
    std::stable_sort(tasks.begin(), tasks.end(),
                     [](const BackwardTask& a, const BackwardTask& b) { return a.pairs > b.pairs; });
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

class BackwardPass {
  public:
    BackwardPass(const Problem& problem, const std::vector<Sequence>& all_sequences)
        : p(problem),
          sequences(all_sequences),
          kernels(current_kernels()),
          widths{round_up(p.head_dim, kernels.lanes), round_up(p.head_dim_v, kernels.lanes)},
          workspace(round_up(kernels.backward_workspace(p), 64)) {}

    void run() {
        const std::vector<Chain> chains = make_chains(p, sequences);
        const int64_t parts = parts_of_unit(p, static_cast<int64_t>(chains.size()));
        if (parts == 1) return by_chains(chains);
        size_t longest = 0;
        for (const Chain& chain : chains) longest = std::max(longest, chain.size());
        for (size_t place = 0; place < longest; ++place) {
            std::vector<BackwardUnit> units;  // one of each chain: no two of them share a row of dbias
            for (const Chain& chain : chains) {
                if (place < chain.size()) units.push_back(chain[place]);
            }
            by_parts(units, parts);
        }
    }

  private:
    const Problem& p;
    const std::vector<Sequence>& sequences;
    const Kernels& kernels;
    const AccumulatorWidths widths;
    const int64_t workspace;

    int64_t keys_of(const Sequence& s) const { return p.packed ? s.len_k : p.seqlen_k; }

    void give_memory(BackwardRun& run, float* memory) const {
        run.dkey = memory;
        run.dvalue = memory + (run.key_end - run.key_begin) * widths.key;
        std::memset(run.dkey, 0, static_cast<size_t>(widths.floats(run)) * 4);
    }

    void compute(const BackwardRun& run, char* memory) const {
        kernels.backward(p, sequences[static_cast<size_t>(run.sequence)], run, memory);
    }

    // A chain is a task, a unit one run, and the accumulators are the thread's.
    void by_chains(const std::vector<Chain>& chains) const {
        std::vector<BackwardTask> tasks;
        int64_t pairs = 0, largest = 0;
        for (const Chain& chain : chains) {
            BackwardTask task;
            for (const BackwardUnit& unit : chain) {
                const std::vector<BackwardRun> runs = make_runs(p, kernels, unit, 1);
                if (runs.empty()) {  // keys without a query
                    store_key_gradients(p, kernels, *unit.sequence, unit.kv_head, {}, widths, 0,
                                        keys_of(*unit.sequence));
                    continue;
                }
                task.runs.push_back(runs.front());
                task.pairs += pairs_of(runs.front());
                largest = std::max(largest, widths.floats(runs.front()));
            }
            pairs += task.pairs;
            if (!task.runs.empty()) tasks.push_back(std::move(task));
        }
        heaviest_first(tasks);
        run_tasks(static_cast<int64_t>(tasks.size()), threads_for(p, pairs * 3), workspace + largest * 4,
                  [&](int64_t number, char* memory) {
                      for (BackwardRun& run : tasks[static_cast<size_t>(number)].runs) {
                          give_memory(run, reinterpret_cast<float*>(memory + workspace));
                          compute(run, memory);
                          const Sequence& s = sequences[static_cast<size_t>(run.sequence)];
                          store_key_gradients(p, kernels, s, run.kv_head, {&run}, widths, 0, keys_of(s));
                      }
                  });
    }

    // A part of a unit is a task. Parts have accumulators of their own, which are added in a fixed order, so results
    // depend on the number of threads alone.
    void by_parts(const std::vector<BackwardUnit>& units, int64_t parts) const {
        std::vector<BackwardTask> tasks;
        int64_t pairs = 0, floats = 0;
        for (const BackwardUnit& unit : units) {
            for (const BackwardRun& run : make_runs(p, kernels, unit, parts)) {
                tasks.push_back({{run}, pairs_of(run)});
                pairs += pairs_of(run);
                floats += widths.floats(run);
            }
        }
        heaviest_first(tasks);
        std::unique_ptr<float[]> accumulators(new float[static_cast<size_t>(floats)]);  // cleared by who uses them
        float* next = accumulators.get();
        std::vector<float*> memory_of;
        std::vector<std::vector<const BackwardRun*>> runs_of(static_cast<size_t>(p.batch * p.num_kv_heads));
        for (const BackwardTask& task : tasks) {
            const BackwardRun& run = task.runs.front();
            memory_of.push_back(next);
            next += widths.floats(run);
            runs_of[static_cast<size_t>(run.sequence * p.num_kv_heads + run.kv_head)].push_back(&run);
        }
        const int threads = threads_for(p, pairs * 3);
        run_tasks(static_cast<int64_t>(tasks.size()), threads, workspace, [&](int64_t number, char* memory) {
            BackwardRun& run = tasks[static_cast<size_t>(number)].runs.front();
            give_memory(run, memory_of[static_cast<size_t>(number)]);
            compute(run, memory);
        });
        for (auto& runs : runs_of) {
            std::sort(runs.begin(), runs.end(),
                      [](const BackwardRun* a, const BackwardRun* b) { return a->first_row < b->first_row; });
        }
        run_tasks(static_cast<int64_t>(units.size()) * parts, threads, 64, [&](int64_t number, char*) {
            const BackwardUnit& unit = units[static_cast<size_t>(number / parts)];
            const Sequence& s = *unit.sequence;
            const auto& runs = runs_of[static_cast<size_t>(s.index * p.num_kv_heads + unit.kv_head)];
            const int64_t slice = number % parts, keys = keys_of(s);
            store_key_gradients(p, kernels, s, unit.kv_head, runs, widths, keys * slice / parts,
                                keys * (slice + 1) / parts);
        });
    }
};

}  // namespace

void attention_backward(const Problem& problem) {
    Problem p = problem;
    const MaskSummary summary(p);
    const std::vector<Sequence> sequences = make_sequences(p);
    BackwardPass(p, sequences).run();
}

}  // namespace tf
