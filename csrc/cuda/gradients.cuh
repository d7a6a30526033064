// The elementwise part of the backward pass, between its products.
//
//   p     = exp2((score - top) * factor - log2_sum)      the probability, from what forward stored of its row
//   kept  = p * (dropout's factor)                       which meets dout in dV
//   dbias = p * ((dout . v) * (dropout's factor) - delta)
//   ds    = dbias * (softcap's derivative)               which meets K in dQ and Q in dK
//
// p alone decides who takes part: where a key is hidden it is 0, and ds is 0 though dout . v may be NaN.
#pragma once

#include "cuda/rows.cuh"
#include "cuda/softmax.cuh"

namespace tf {
namespace cuda {

// ------------------------------------------------------------------------------------------ rows

// What a row brings along, one array a kind, in shared memory. Rows that are not there see no key ([lo, hi) is empty)
// and have zeros elsewhere: as their query and dout are zeros too, they add nothing even where nobody looks at lo.
template <int kRows>
struct alignas(16) RowTable {
    float top[kRows], log2_sum[kRows], delta[kRows];
    int lo[kRows], hi[kRows], position[kRows], head[kRows];
};

struct RowNumbers {
    float top, log2_sum, delta;
};

TF_DEVICE RowNumbers read_row_numbers(const Arguments& a, const DeviceSequence& s, int head, int position,
                                      bool inside) {
    const Problem& p = a.problem;
    if (!inside) return {0.0f, 0.0f, 0.0f};
    const int64_t at = p.lse_index(s.index, head, s.first_query, position);
    return {p.stats[at], p.stats[at + p.num_heads * p.total_q], p.delta[at]};
}

template <int kRows>
TF_DEVICE void write_row(RowTable<kRows>& table, int row, const DeviceSequence& s, int head, int position, bool inside,
                         const RowNumbers& numbers) {
    const Interval keys = row_interval(s.mask, position);
    table.top[row] = numbers.top;
    table.log2_sum[row] = numbers.log2_sum;
    table.delta[row] = numbers.delta;
    table.lo[row] = static_cast<int>(keys.lo);
    table.hi[row] = inside ? static_cast<int>(keys.hi) : table.lo[row];
    table.position[row] = position;
    table.head[row] = head;
}

// The keys [lo, hi) that a row sees, from its position: what is left of an interval mask once it is known that int32
// will do. Positions and lengths are below kFar.
struct KeyLimits {
    static constexpr int kFar = 1 << 30, kNowhere = -kFar;  // from position kNowhere no key is seen
    int start, end, low, high;

    TF_DEVICE int lo(int position) const { return max_of(start, position + low); }
    TF_DEVICE int hi(int position) const { return min_of(end, position + high); }
};
TF_DEVICE KeyLimits key_limits(const SequenceMask& mask) {
    const int64_t far = KeyLimits::kFar;
    const int64_t low = max_of(mask.offset - mask.left, -far), high = min_of(mask.offset + mask.right + 1, far);
    return {static_cast<int>(mask.start), static_cast<int>(mask.end), static_cast<int>(min_of(low, far)),
            static_cast<int>(max_of(high, -far))};
}

// The rows [begin, end) of a tile of packed rows, counted as the tile's own, that see some key of [first, last], with
// the rows that see all of them: the mask with the sides of rows and keys exchanged. Packed rows of the sequence.
TF_DEVICE TileRange rows_of(const Arguments& a, const DeviceSequence& s, int first_key, int last_key) {
    if (first_key > last_key) return {0, 0, 0, 0};
    const int64_t group = a.problem.group_size;
    const SequenceMask mask{0, s.len_q, -s.mask.offset, s.mask.right, s.mask.left};
    const TileRange range = tile_range(mask, first_key, last_key);
    return {range.begin * group, range.full_begin * group, range.full_end * group, range.end * group};
}

// Brings the rows first.. of one head into a tile of kRows x kColumns, those in [begin, end), zeros for the others and
// beyond `columns`. `rows` is row 0; begin < end. As load_rows_at in all else, but no row has to be looked up.
template <class E, int kRows, int kColumns, int kThreads>
TF_DEVICE void load_rows_between(char* tile, const E* rows, int64_t stride, int first, int begin, int end, int columns,
                                 bool chunks) {
    constexpr int kChunks = kColumns / 8, kStep = kThreads / kChunks;
    static_assert(kThreads % kChunks == 0 && kRows % kStep == 0, "whole rows in each pass");
    const unsigned thread = static_cast<unsigned>(ptx::thread()) % kThreads;  // so that the compiler knows its range
    const int chunk = thread % kChunks, own = thread / kChunks;
    const int last = chunk * 8 < columns ? end : begin;
    const E* source = rows + (first + own) * stride + chunk * 8;
    const uint32_t target = ptx::shared_address(tile);
    if (chunks) {
        TF_UNROLL
        for (int i = 0; i < kRows / kStep; ++i) {
            const int row = first + own + i * kStep;
            const bool there = row >= begin && row < last;
            ptx::cp_async_16(target + chunk_offset<kRows>(own + i * kStep, chunk),
                             there ? source : rows + begin * stride, there ? 16 : 0);
            source += kStep * stride;
        }
        return;
    }
    TF_NO_UNROLL
    for (int i = 0; i < kRows / kStep; ++i) {
        const int row = first + own + i * kStep;
        const bool there = row >= begin && row < last;
        *reinterpret_cast<Vector16*>(tile + chunk_offset<kRows>(own + i * kStep, chunk)) =
            gather_chunk(there ? rows + row * stride : nullptr, chunk, columns);
    }
}

// ------------------------------------------------------------------------------------------ elements

// The probability of a score, 0 of -infinity. The maximum goes first: rounded to a multiple of 2^-8, as a score of 1e5
// is in base 2, it would leave nothing of log2_sum.
TF_DEVICE float probability(float score, float top, float log2_sum, float factor) {
    return ptx::exp2(__builtin_fmaf(score - top, factor, -log2_sum));
}

// The softcap's derivative where it left a score.
TF_DEVICE float softcap_slope(const Problem& p, float capped) {
    if (p.softcap == 0.0f) return 1.0f;
    const float t = capped / p.softcap;
    return 1.0f - t * t;
}

// ------------------------------------------------------------------------------------------ dropout

// One call of Philox serves four neighbouring keys. They lie in four threads, or two; each thread makes one call and
// hands out four bits, so that a block of 16 x 8 results costs each thread one call and its neighbours' bits.
TF_DEVICE uint32_t kept_bits(const Arguments& a, uint64_t seed, const DeviceSequence& s, int head, int position,
                             int key) {
    const Philox4 draw = philox(seed, static_cast<uint32_t>(key / 4), static_cast<uint32_t>(position),
                                static_cast<uint32_t>(head), static_cast<uint32_t>(s.index));
    uint32_t bits = 0;
    TF_UNROLL
    for (int i = 0; i < 4; ++i) bits |= static_cast<uint32_t>(draw.word[i] >= a.dropout_threshold) << i;
    return bits;
}

// For results whose 16 rows are keys, `key` and up (a multiple of 4), and whose 8 columns are rows of a table, `row`
// and up. Bit e is for element e (0 to 3) of the thread, as mma spreads them.
template <int kRows>
TF_DEVICE uint32_t kept_of_keys(const Arguments& a, uint64_t seed, const DeviceSequence& s,
                                const RowTable<kRows>& table, int row, int key) {
    const int g = ptx::lane() / 4, t = ptx::lane() % 4, own = g % 4;
    const int column = row + 2 * t + own % 2;
    uint32_t bits = kept_bits(a, seed, s, table.head[column], table.position[column], key + own / 2 * 8 + g / 4 * 4)
                    << (4 * own);
    bits |= ptx::shuffle_xor(bits, 4);
    bits |= ptx::shuffle_xor(bits, 8);
    bits >>= g % 4;  // own is the element's number, and the key's last two bits are g's
    return (bits & 1u) | (bits >> 3 & 2u) | (bits >> 6 & 4u) | (bits >> 9 & 8u);
}

// The same for results whose rows are rows, `row` (the thread's first one in the table) and 8 further, and whose 8
// columns are keys, `key` and up.
template <class Table>
TF_DEVICE uint32_t kept_of_rows(const Arguments& a, uint64_t seed, const DeviceSequence& s, const Table& table, int row,
                                int key) {
    const int t = ptx::lane() % 4, own = row + t % 2 * 8;
    uint32_t bits = kept_bits(a, seed, s, table.head[own], table.position[own], key + t / 2 * 4) << (4 * (t % 2));
    bits |= ptx::shuffle_xor(bits, 1);
    bits >>= t % 2 * 2;
    return (bits & 3u) | (bits >> 2 & 12u);
}

// ------------------------------------------------------------------------------------------ operands

// Two elements of a product's operand with 0 for what is not finite. A key that a bias or the padding hides may hold
// NaN, and 0 times NaN is NaN; one that is seen has made its row's ds NaN already.
template <class E>
TF_DEVICE uint32_t finite_or_zero(uint32_t pair) {
    constexpr uint32_t kExponent = E::kType == DType::bf16 ? 0x7f807f80u : 0x7c007c00u;
    constexpr uint32_t kOne = E::kType == DType::bf16 ? 0x00800080u : 0x04000400u;
    const uint32_t bad = ((pair & kExponent) + kOne) & 0x80008000u;  // an exponent of ones runs over into the sign
    return pair & ~((bad >> 15) * 0xffffu);
}

template <class E>
TF_DEVICE float low_of(uint32_t pair) {
    return ptx::to_float(E{static_cast<uint16_t>(pair & 0xffffu)});
}
template <class E>
TF_DEVICE float high_of(uint32_t pair) {
    return ptx::to_float(E{static_cast<uint16_t>(pair >> 16)});
}

}  // namespace cuda
}  // namespace tf
