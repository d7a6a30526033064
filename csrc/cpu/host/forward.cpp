// Schedule of the forward pass: tiles of query rows, or for few rows chunks of keys.
#include <algorithm>
#include <vector>

#include "attention.h"
#include "isa.h"
#include "sequences.h"
#include "tasks.h"

namespace tf {
namespace {

// Pairs of a row and a key that rows [first, last] of one head visit, before dense masks.
int64_t visited_pairs(const Sequence& s, int64_t first, int64_t last) {
    const TileRange range = tile_range(s.mask, first, last);
    return (last - first + 1) * (range.end - range.begin);
}

struct WeightedTile {
    Tile tile;
    int64_t pairs;
};

constexpr int64_t kTasksPerThread = 8;  // enough for the last one not to be waited for

// Packed rows of a task: as many tiles as may share each block of keys, if that leaves enough tasks.
int64_t rows_of_task(const Problem& p, const Kernels& kernels, const std::vector<Sequence>& sequences) {
    int64_t tiles = 0;
    for (const Sequence& s : sequences) tiles += ceil_div(s.len_q * p.group_size, kernels.tile_rows) * p.num_kv_heads;
    const int64_t wanted = p.num_threads > 1 ? tiles / (kTasksPerThread * p.num_threads) : tiles;
    return kernels.tile_rows * std::clamp<int64_t>(wanted, 1, kernels.forward_rows / kernels.tile_rows);
}

// Tasks of `rows` packed rows; heavy sequences first, and within a head its heavy tiles first, so that threads end
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
            const int64_t pairs = visited_pairs(*s, r / p.group_size, (r + count - 1) / p.group_size) * p.group_size;
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
    const std::vector<WeightedTile> tiles = make_tiles(p, sequences, rows_of_task(p, kernels, sequences));
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

// The keys that some row of some head of a group sees, from the first to the last.
Interval seen_by_group(const Problem& p, const Sequence& s, int64_t kv_head) {
    const TileRange seen = tile_range(s.mask, 0, s.len_q - 1);
    const RowSummary& dense = p.summary;
    if (dense.lo == nullptr) return {seen.begin, seen.end};
    Interval keys{seen.end, seen.begin};
    for (int64_t head = kv_head * p.group_size; head < (kv_head + 1) * p.group_size; ++head) {
        for (int64_t row = 0; row < s.len_q; ++row) {
            const int64_t at = s.index * dense.batch + head * dense.head + row * dense.row;
            const int64_t lo = std::max<int64_t>(seen.begin, dense.lo[at]);
            const int64_t hi = std::min<int64_t>(seen.end, dense.hi[at]);
            if (lo < hi) keys = {std::min(keys.lo, lo), std::max(keys.hi, hi)};
        }
    }
    return keys.lo < keys.hi ? keys : Interval{seen.begin, seen.begin};
}

void forward_by_chunks(const Problem& p, const Kernels& kernels, const std::vector<Sequence>& sequences) {
    const int64_t units = std::max<int64_t>(1, p.batch * p.num_kv_heads);
    const int64_t wanted = ceil_div(kChunksPerThread * p.num_threads, units);
    const int64_t state = kernels.decode_state(p);
    std::vector<KeyChunk> chunks;
    std::vector<DecodeUnit> decode_units;
    int64_t pairs = 0, floats = 0;
    for (const Sequence& s : sequences) {
        if (s.len_q == 0) continue;
        const int64_t rows = s.len_q * p.group_size;
        for (int64_t h = 0; h < p.num_kv_heads; ++h) {
            DecodeUnit unit{static_cast<int32_t>(s.index), static_cast<int32_t>(h), static_cast<int64_t>(chunks.size()),
                            0};
            const Interval seen = seen_by_group(p, s, h);
            const int64_t keys = seen.hi - seen.lo, parts = std::max<int64_t>(1, std::min(wanted, keys / kMinChunk));
            const int64_t length = std::max<int64_t>(1, round_up(ceil_div(keys, parts), 16));
            pairs += rows * keys;
            for (int64_t begin = seen.lo; begin < seen.hi; begin += length) {
                chunks.push_back({unit.sequence, unit.kv_head, begin, std::min(begin + length, seen.hi), nullptr});
                floats += rows * state;
            }
            unit.chunks = static_cast<int64_t>(chunks.size()) - unit.first_chunk;
            decode_units.push_back(unit);
        }
    }
    std::vector<float> partial(static_cast<size_t>(floats));
    float* next = partial.data();
    for (KeyChunk& chunk : chunks) {
        chunk.partial = next;
        next += sequences[static_cast<size_t>(chunk.sequence)].len_q * p.group_size * state;
    }
    const int threads = threads_for(p, pairs);
    run_tasks(static_cast<int64_t>(chunks.size()), threads, kernels.decode_workspace(p),
              [&](int64_t task, char* workspace) {
                  const KeyChunk& chunk = chunks[static_cast<size_t>(task)];
                  kernels.decode(p, sequences[static_cast<size_t>(chunk.sequence)], chunk, workspace);
              });
    run_tasks(static_cast<int64_t>(decode_units.size()), threads, state * 4, [&](int64_t task, char* workspace) {
        const DecodeUnit& unit = decode_units[static_cast<size_t>(task)];
        kernels.combine(p, sequences[static_cast<size_t>(unit.sequence)], unit.kv_head,
                        chunks.data() + unit.first_chunk, unit.chunks, workspace);
    });
}

}  // namespace

void attention_forward(const Problem& problem) {
    Problem p = problem;
    const MaskSummary summary(p);
    const std::vector<Sequence> sequences = make_sequences(p);
    (few_rows(p, current_kernels()) ? forward_by_chunks : forward_by_tiles)(p, current_kernels(), sequences);
}

bool takes_decode_path(const Problem& p) { return few_rows(p, current_kernels()); }

}  // namespace tf
