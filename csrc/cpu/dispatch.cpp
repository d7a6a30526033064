#include "dispatch.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

namespace tf {

namespace portable {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}

namespace {

// ------------------------------------------------------------------------------------------------ instruction sets

#if defined(__x86_64__)
[[maybe_unused]] bool supports_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
[[maybe_unused]] bool supports_avx512() {
    return supports_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

std::vector<const Kernels*> find_kernels() {
    std::vector<const Kernels*> found;
    // The build says which of these exist, the machine which of them it can run.
#if defined(TF_HAS_AVX512_BF16)
    if (supports_avx512() && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16::kKernels);
#endif
#if defined(TF_HAS_AVX512)
    if (supports_avx512()) found.push_back(&avx512::kKernels);
#endif
#if defined(TF_HAS_AVX2)
    if (supports_avx2()) found.push_back(&avx2::kKernels);
#endif
    found.push_back(&portable::kKernels);
    return found;
}

const std::vector<const Kernels*>& all_kernels() {
    static const std::vector<const Kernels*> found = find_kernels();
    return found;
}

const Kernels* kernels_named(const std::string& name) {
    std::string names;
    for (const Kernels* kernels : all_kernels()) {
        if (name == kernels->name) return kernels;
        names += (names.empty() ? "" : ", ") + std::string(kernels->name);
    }
    throw std::invalid_argument("instruction set is '" + name + "'; allowed on this machine: " + names);
}

const Kernels*& chosen() {
    static const Kernels* current = [] {
        const char* forced = std::getenv("TRANSFORMER_FAST_CPU_ISA");
        return forced && *forced ? kernels_named(forced) : all_kernels().front();
    }();
    return current;
}

// ------------------------------------------------------------------------------------------------------- scratch

// Memory that a thread keeps between calls, so that a small problem does not pay for the allocator.
class Scratch {
   public:
    char* get(int64_t bytes) {
        if (bytes > size_) {
            memory_.reset(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(round_up(bytes, 64)))));
            if (!memory_) throw std::bad_alloc();
            size_ = bytes;
        }
        return memory_.get();
    }
    // Large scratch is given back: it belongs to one unusual problem.
    void trim() {
        if (size_ > (int64_t{8} << 20)) {
            memory_.reset();
            size_ = 0;
        }
    }

   private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    std::unique_ptr<char, Free> memory_;
    int64_t size_ = 0;
};

thread_local Scratch thread_scratch;

// Runs fn(task, workspace) over the tasks, in order of their numbers, with up to num_threads threads. An exception
// (only memory can run out) is carried out of the parallel region.
template <class Fn>
void run_tasks(int64_t count, int num_threads, int64_t workspace, Fn&& fn) {
    const int threads = static_cast<int>(std::min<int64_t>(num_threads, count));
    if (threads <= 1) {
        char* memory = thread_scratch.get(workspace);
        for (int64_t task = 0; task < count; ++task) fn(task, memory);
        thread_scratch.trim();
        return;
    }
    bool failed = false;
#pragma omp parallel num_threads(threads)
    {
        char* memory = nullptr;
        try {
            memory = thread_scratch.get(workspace);
        } catch (const std::bad_alloc&) {
#pragma omp atomic write
            failed = true;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < count; ++task) {
            if (memory != nullptr) fn(task, memory);
        }
        thread_scratch.trim();
    }
    if (failed) throw std::bad_alloc();
}

// -------------------------------------------------------------------------------------------------- problem setup

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

void check_cumulative(const char* name, const int32_t* cu, int64_t batch, int64_t total, int64_t longest) {
    const std::string text(name);
    require(cu[0] == 0, text + "[0] is " + std::to_string(cu[0]) + "; allowed: 0");
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t length = static_cast<int64_t>(cu[b + 1]) - cu[b];
        require(0 <= length && length <= longest,
                text + "[" + std::to_string(b + 1) + "] - " + text + "[" + std::to_string(b) + "] is " +
                    std::to_string(length) + "; allowed: 0 to " + std::to_string(longest) + " (max_seqlen_" + text.back() +
                    ")");
    }
    require(cu[batch] == total, text + "[-1] is " + std::to_string(cu[batch]) + "; allowed: " + std::to_string(total) +
                                    ", the packed length");
}

// Narrow [start, end) to the first and last kept key, and say whether keys between them are hidden.
void apply_key_mask(const Problem& p, Sequence& s) {
    const uint8_t* row = p.key_mask + s.index * p.key_mask_batch;
    int64_t first = s.mask.start, last = s.mask.end;
    while (first < last && !row[first * p.key_mask_key]) ++first;
    while (last > first && !row[(last - 1) * p.key_mask_key]) --last;
    s.mask.start = first;
    s.mask.end = last;
    for (int64_t j = first; j < last && !s.holes; ++j) s.holes = !row[j * p.key_mask_key];
}

std::vector<Sequence> make_sequences(const Problem& p) {
    if (p.packed) {
        check_cumulative("cu_seqlens_q", p.cu_seqlens_q, p.batch, p.total_q, p.seqlen_q);
        check_cumulative("cu_seqlens_k", p.cu_seqlens_k, p.batch, p.total_k, p.seqlen_k);
    }
    std::vector<Sequence> sequences(static_cast<size_t>(p.batch));
    for (int64_t b = 0; b < p.batch; ++b) {
        Sequence& s = sequences[static_cast<size_t>(b)];
        s.index = b;
        s.first_query = p.packed ? p.cu_seqlens_q[b] : 0;
        s.first_key = p.packed ? p.cu_seqlens_k[b] : 0;
        s.len_q = p.packed ? p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b] : p.seqlen_q;
        s.len_k = p.packed ? p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b] : p.seqlen_k;
        if (p.seqlens_k != nullptr) {
            s.len_k = p.seqlens_k[b * p.seqlens_k_stride];
            require(0 <= s.len_k && s.len_k <= p.seqlen_k, "seqlens_k[" + std::to_string(b) + "] is " +
                                                               std::to_string(s.len_k) + "; allowed: 0 to " +
                                                               std::to_string(p.seqlen_k) + " (seqlen_k)");
        }
        s.mask = {0, s.len_k, s.len_k - s.len_q, p.left, p.right};
        s.holes = false;
        if (p.key_mask != nullptr) apply_key_mask(p, s);
    }
    return sequences;
}

// Reads a dense boolean mask once and keeps what the kernels need of it: an interval a row.
class MaskSummary {
   public:
    explicit MaskSummary(Problem& p) {
        if (p.bias.data == nullptr || p.bias.dtype != DType::boolean) return;
        const int64_t batches = p.bias.batch ? p.batch : 1, heads = p.bias.head ? p.num_heads : 1;
        const int64_t rows = p.bias.row ? p.seqlen_q : 1, count = batches * heads * rows;
        lo_.resize(static_cast<size_t>(count));
        hi_.resize(static_cast<size_t>(count));
        solid_.resize(static_cast<size_t>(count));
        run_tasks(ceil_div(count, 64), count * p.seqlen_k > 65536 ? p.num_threads : 1, 64, [&](int64_t task, char*) {
            for (int64_t i = task * 64; i < std::min(count, task * 64 + 64); ++i) {
                const int64_t b = i / (heads * rows), h = i / rows % heads, r = i % rows;
                summarise(p, p.bias.data + b * p.bias.batch + h * p.bias.head + r * p.bias.row, static_cast<size_t>(i));
            }
        });
        p.summary = {lo_.data(), hi_.data(), solid_.data(), p.bias.batch ? heads * rows : 0, p.bias.head ? rows : 0,
                     p.bias.row ? 1 : 0};
    }

   private:
    void summarise(const Problem& p, const char* row, size_t i) {
        const int64_t keys = p.seqlen_k;
        if (p.bias.key != 1) {  // broadcast (or strided) over the keys
            int64_t first = 0, last = keys;
            while (first < last && !row[first * p.bias.key]) ++first;
            while (last > first && !row[(last - 1) * p.bias.key]) --last;
            bool solid = true;
            for (int64_t j = first; j < last && solid; ++j) solid = row[j * p.bias.key] != 0;
            set(i, first, last, solid);
            return;
        }
        const void* found = std::memchr(row, 1, static_cast<size_t>(keys));
        if (found == nullptr) return set(i, 0, 0, true);
        const int64_t first = static_cast<const char*>(found) - row;
        const void* gap = std::memchr(row + first, 0, static_cast<size_t>(keys - first));
        if (gap == nullptr) return set(i, first, keys, true);
        const int64_t stop = static_cast<const char*>(gap) - row;
        const void* more = std::memchr(row + stop, 1, static_cast<size_t>(keys - stop));
        if (more == nullptr) return set(i, first, stop, true);
        int64_t last = keys;
        while (!row[last - 1]) --last;
        set(i, first, last, false);
    }

    void set(size_t i, int64_t lo, int64_t hi, bool solid) {
        lo_[i] = static_cast<int32_t>(lo);
        hi_[i] = static_cast<int32_t>(hi);
        solid_[i] = solid;
    }

    std::vector<int32_t> lo_, hi_;
    std::vector<uint8_t> solid_;
};

// ------------------------------------------------------------------------------------------------------- schedule

// Multiply-adds under which a problem stays on one thread: waking another costs some microseconds.
constexpr int64_t kSerialWork = 400'000;

int threads_for(const Problem& p, int64_t pairs) {
    return pairs * (p.head_dim + p.head_dim_v) < kSerialWork ? 1 : p.num_threads;
}

// Pairs of a row and a key that rows [first, last] of one head visit, before dense masks.
int64_t visited_pairs(const Sequence& s, int64_t first, int64_t last) {
    const TileRange range = tile_range(s.mask, first, last);
    return (last - first + 1) * (range.end - range.begin);
}

struct WeightedTile {
    Tile tile;
    int64_t pairs;
};

// Tiles of `rows` packed rows; heavy sequences first, and within a head its heavy tiles first, so that threads end
// together and a head's keys stay in cache.
std::vector<WeightedTile> make_tiles(const Problem& p, const std::vector<Sequence>& sequences, int64_t rows) {
    std::vector<const Sequence*> order;
    order.reserve(sequences.size());
    for (const Sequence& s : sequences) order.push_back(&s);
    if (p.packed || p.seqlens_k != nullptr || p.key_mask != nullptr) {
        std::stable_sort(order.begin(), order.end(), [](const Sequence* a, const Sequence* b) {
            return a->len_q * (a->mask.end - a->mask.start) > b->len_q * (b->mask.end - b->mask.start);
        });
    }
    std::vector<WeightedTile> tiles, head;
    for (const Sequence* s : order) {
        const int64_t packed_rows = s->len_q * p.group_size;
        head.clear();
        for (int64_t r = 0; r < packed_rows; r += rows) {
            const int64_t count = std::min(rows, packed_rows - r);
            const int64_t pairs =
                visited_pairs(*s, r / p.group_size, (r + count - 1) / p.group_size) * p.group_size;
            head.push_back({{static_cast<int32_t>(s->index), 0, r, count}, pairs});
        }
        std::stable_sort(head.begin(), head.end(),
                         [](const WeightedTile& a, const WeightedTile& b) { return a.pairs > b.pairs; });
        for (int64_t h = 0; h < p.num_kv_heads; ++h) {
            for (WeightedTile tile : head) {
                tile.tile.kv_head = static_cast<int32_t>(h);
                tiles.push_back(tile);
            }
        }
    }
    return tiles;
}

void forward_by_tiles(const Problem& p, const Kernels& kernels, const std::vector<Sequence>& sequences) {
    const std::vector<WeightedTile> tiles = make_tiles(p, sequences, kernels.tile_rows);
    int64_t pairs = 0;
    for (const WeightedTile& tile : tiles) pairs += tile.pairs;
    run_tasks(static_cast<int64_t>(tiles.size()), threads_for(p, pairs), kernels.forward_workspace(p),
              [&](int64_t task, char* workspace) {
                  const Tile& tile = tiles[static_cast<size_t>(task)].tile;
                  kernels.forward(p, sequences[static_cast<size_t>(tile.sequence)], tile, workspace);
              });
}

// --------------------------------------------------------------------------------------------------------- decode

constexpr int64_t kChunksPerThread = 8;  // small enough pieces for the last one not to be waited for
constexpr int64_t kMinChunk = 256;       // keys; a smaller chunk costs more to combine than it gains

// Few rows have few tiles, and most lanes of a tile would idle: those problems split the keys instead.
bool few_rows(const Problem& p, const Kernels& kernels) {
    const int64_t rows = p.seqlen_q * p.group_size, units = p.batch * p.num_kv_heads;
    if (rows <= kernels.decode_rows) return true;
    return rows <= kernels.tile_rows && units < 2 * p.num_threads && p.seqlen_k >= 8 * kMinChunk;
}

// The unit of a decode problem: one (sequence, KV head) and its chunks, which lie one after the other.
struct DecodeUnit {
    int32_t sequence, kv_head;
    int64_t first_chunk, chunks;
};

void forward_by_chunks(const Problem& p, const Kernels& kernels, const std::vector<Sequence>& sequences) {
    const int64_t units = std::max<int64_t>(1, p.batch * p.num_kv_heads);
    const int64_t wanted = ceil_div(kChunksPerThread * p.num_threads, units);
    const int64_t width = round_up(p.head_dim_v, kernels.lanes);
    std::vector<KeyChunk> chunks;
    std::vector<DecodeUnit> decode_units;
    int64_t pairs = 0, floats = 0;
    for (const Sequence& s : sequences) {
        if (s.len_q == 0) continue;
        const TileRange seen = tile_range(s.mask, 0, s.len_q - 1);
        const int64_t rows = s.len_q * p.group_size, keys = seen.end - seen.begin;
        const int64_t parts = std::max<int64_t>(1, std::min(wanted, keys / kMinChunk));
        const int64_t length = std::max<int64_t>(1, round_up(ceil_div(keys, parts), 16));
        pairs += rows * keys * p.num_kv_heads;
        for (int64_t h = 0; h < p.num_kv_heads; ++h) {
            DecodeUnit unit{static_cast<int32_t>(s.index), static_cast<int32_t>(h),
                            static_cast<int64_t>(chunks.size()), 0};
            for (int64_t begin = seen.begin; begin < seen.end; begin += length) {
                chunks.push_back({unit.sequence, unit.kv_head, begin, std::min(begin + length, seen.end), nullptr});
                floats += rows * (2 + width);
            }
            unit.chunks = static_cast<int64_t>(chunks.size()) - unit.first_chunk;
            decode_units.push_back(unit);
        }
    }
    std::vector<float> partial(static_cast<size_t>(floats));
    float* next = partial.data();
    for (KeyChunk& chunk : chunks) {
        chunk.partial = next;
        next += sequences[static_cast<size_t>(chunk.sequence)].len_q * p.group_size * (2 + width);
    }
    const int threads = threads_for(p, pairs);
    run_tasks(static_cast<int64_t>(chunks.size()), threads, kernels.decode_workspace(p),
              [&](int64_t task, char* workspace) {
                  const KeyChunk& chunk = chunks[static_cast<size_t>(task)];
                  kernels.decode(p, sequences[static_cast<size_t>(chunk.sequence)], chunk, workspace);
              });
    run_tasks(static_cast<int64_t>(decode_units.size()), threads, width * 4, [&](int64_t task, char* workspace) {
        const DecodeUnit& unit = decode_units[static_cast<size_t>(task)];
        kernels.combine(p, sequences[static_cast<size_t>(unit.sequence)], unit.kv_head,
                        chunks.data() + unit.first_chunk, unit.chunks, workspace);
    });
}

// ------------------------------------------------------------------------------------------------------- backward

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
    const int64_t parts = rows_share || chains >= kRunsPerThread * p.num_threads
                              ? 1
                              : ceil_div(kRunsPerThread * p.num_threads, chains);
    std::vector<BackwardTask> tasks(static_cast<size_t>(chains * parts));
    for (const Sequence& s : sequences) {
        const int64_t rows = s.len_q * p.group_size;
        const int64_t length = std::max(kernels.tile_rows, round_up(ceil_div(rows, parts), kernels.tile_rows));
        for (int64_t h = 0; h < p.num_kv_heads; ++h) {
            const int64_t chain = (batch_shares ? 0 : s.index) * (heads_share ? 1 : p.num_kv_heads) + (heads_share ? 0 : h);
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

// --------------------------------------------------------------------------------------------------------- public

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels* kernels : all_kernels()) names.emplace_back(kernels->name);
    return names;
}

const std::string& current_isa() {
    static thread_local std::string name;
    return name = chosen()->name;
}

void force_isa(const std::string& name) { chosen() = kernels_named(name); }

void attention_forward(const Problem& problem) {
    Problem p = problem;
    const MaskSummary summary(p);
    const std::vector<Sequence> sequences = make_sequences(p);
    (few_rows(p, *chosen()) ? forward_by_chunks : forward_by_tiles)(p, *chosen(), sequences);
}

void attention_backward(const Problem& problem) {
    Problem p = problem;
    const MaskSummary summary(p);
    const std::vector<Sequence> sequences = make_sequences(p);
    backward_by_runs(p, *chosen(), sequences);
}

bool takes_decode_path(const Problem& p) { return few_rows(p, *chosen()); }

double measure_peak(DType dtype, int num_threads) {
    const Kernels& kernels = *chosen();
    const int64_t repeats = 20'000'000;
    double operations = 0.0;
    const auto begin = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(num_threads) reduction(+ : operations)
    operations += kernels.peak_flops(dtype, repeats);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    return operations / seconds.count();
}

}  // namespace tf
