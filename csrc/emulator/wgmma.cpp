// wgmma: when products happen, and that nobody touches what they use. wgmma_product.cpp is the arithmetic.
#include <algorithm>
#include <cstring>
#include <utility>

#include "emulator/block.h"
#include "emulator/numbers.h"
#include "emulator/operations.h"

namespace tf::emulator {

namespace {

// A signalling NaN: arithmetic on it gives a quiet one, by which it is noticed.
constexpr uint32_t kPoison = 0xffa5a5a5u;

// More than a kernel's loop uses, and few enough to look at at each fence.
constexpr size_t kRememberedAccumulators = 8, kRememberedRegisters = 32;

// Calls visit(lane's element, row-major index) for all elements of one lane's part of a (16, columns) matrix.
template <class T, class Visit>
void for_each_element(T* d, int lane, int columns, Visit visit) {
    const int g = lane / 4, t = lane % 4;
    for (int j = 0; j < columns / 8; ++j) {
        const int at = g * columns + 8 * j + 2 * t, below = at + 8 * columns;
        visit(d[4 * j], at);
        visit(d[4 * j + 1], at + 1);
        visit(d[4 * j + 2], below);
        visit(d[4 * j + 3], below + 1);
    }
}

// Variables of a kernel that may have gone out of scope, of which no sanitizer must complain: their memory is read all
// the same, and if another variable is given to a product there, it has been written since. Word by word and volatile,
// so that this does not become a call of memcpy, which is checked.
__attribute__((no_sanitize("address", "undefined"))) void peek(const void* from, int words, uint32_t* to) {
    const volatile uint32_t* word = static_cast<const volatile uint32_t*>(from);
    for (int i = 0; i < words; ++i) to[i] = word[i];
}

bool same_product(const WgmmaArguments& x, const WgmmaArguments& y) {
    return x.bfloat16 == y.bfloat16 && x.columns == y.columns && x.transposed_a == y.transposed_a &&
           x.transposed_b == y.transposed_b && (x.registers == nullptr) == (y.registers == nullptr) && x.a == y.a &&
           x.b == y.b && x.accumulate == y.accumulate;
}

}  // namespace

// ------------------------------------------------------------------------------------------ begin and end

void Warpgroup::begin_block() {
    products_.clear();
    first_ = executed_ = 0;
    for (State& state : warps_) state = State{};
}

int64_t Warpgroup::issued_by_all() const {
    int64_t issued = warps_[0].issued;
    for (const State& state : warps_) issued = std::min(issued, state.issued);
    return issued;
}

void Warpgroup::finish(const Block& block) const {
    const int64_t issued = issued_by_all();
    for (const State& state : warps_) {
        if (state.issued == issued) continue;
        const Product& first = products_[static_cast<size_t>(issued - first_)];
        std::string warps;
        for (int w = 0; w < 4; ++w) {
            if ((first.warps >> w & 1) != 0) warps += (warps.empty() ? "" : ", ") + std::to_string(w);
        }
        block.fail(Operation::wgmma, first.where, "issued by warps " + warps + " of a warpgroup only");
    }
}

void Warpgroup::finish_warp(const Block& block, const Warp& warp) const {
    const State& state = warps_[warp.index % 4];
    if (state.published == state.issued) return;
    const Product& oldest = products_[static_cast<size_t>(state.published - first_)];
    block.fail(Operation::wgmma, oldest.where,
               std::string("the thread returns, and ") +
                   (state.groups.empty() ? "has never committed this product" : "has never waited for this product"));
}

// ------------------------------------------------------------------------------------------ issue

// Of what was given to products before: registers that no product has seen are not known.
void Warpgroup::fence(int warp) {
    State& state = warps_[warp];
    state.fenced = true;
    for (Accumulator& accumulator : state.accumulators) {
        if (accumulator.in_flight) continue;
        uint32_t words[128];
        for (int lane = 0; lane < 32; ++lane) {
            peek(accumulator.lanes[lane], accumulator.columns / 2, words);
            for_each_element(words, lane, accumulator.columns, [&](uint32_t element, int index) {
                accumulator.values[static_cast<size_t>(index)] = float_of(element);
            });
        }
    }
    for (Registers& registers : state.registers) {
        for (int lane = 0; lane < 32; ++lane) peek(registers.lanes[lane], 4, registers.values[lane]);
    }
}

void Warpgroup::commit(int warp) { warps_[warp].groups.push_back(warps_[warp].issued); }

// The accumulator of a warp's product. If it is not in flight already, its values move there from the lanes.
Accumulator& Warpgroup::take_accumulator(const Block& block, const Warp& warp, bool accumulate, int columns,
                                         Where where) {
    State& state = warps_[warp.index % 4];
    const auto d = [&](int lane) { return warp.argument<WgmmaArguments>(lane).d; };
    Accumulator* found = nullptr;
    Accumulator* unused = nullptr;
    for (Accumulator& candidate : state.accumulators) {
        if (candidate.lanes[0] == d(0) && candidate.columns == columns) found = &candidate;
        if (!candidate.in_flight && (unused == nullptr || candidate.last < unused->last)) unused = &candidate;
    }
    if (found != nullptr && found->in_flight) {
        for (int lane = 0; lane < 32; ++lane) {
            if (found->lanes[lane] != d(lane)) block.fail(Operation::wgmma, where, "the lanes' accumulators differ");
        }
        return *found;
    }
    const bool is_known = found != nullptr && accumulate;
    if (found == nullptr && (unused == nullptr || state.accumulators.size() < kRememberedAccumulators)) {
        unused = &state.accumulators.emplace_back();
    }
    if (found == nullptr) found = unused;
    found->columns = columns;
    found->in_flight = true;
    found->values.resize(static_cast<size_t>(16 * columns));
    for (int lane = 0; lane < 32; ++lane) {
        found->lanes[lane] = d(lane);
        for_each_element(d(lane), lane, columns, [&](float& element, int index) {
            float& value = found->values[static_cast<size_t>(index)];
            if (is_known && bits_of(value) != bits_of(element)) {
                block.fail(Operation::wgmma, where, "the accumulator has been written without a wgmma_fence since");
            }
            value = element;
            element = float_of(kPoison);
        });
    }
    return *found;
}

void Warpgroup::take_registers(const Block& block, const Warp& warp, Product& product) {
    State& state = warps_[warp.index % 4];
    Registers& registers = product.registers[warp.index % 4];
    for (int lane = 0; lane < 32; ++lane) {
        registers.lanes[lane] = warp.argument<WgmmaArguments>(lane).registers;
        std::copy_n(registers.lanes[lane], 4, registers.values[lane]);
    }
    for (const Registers& before : state.registers) {
        if (!std::equal(before.lanes, before.lanes + 32, registers.lanes)) continue;
        if (std::memcmp(before.values, registers.values, sizeof(registers.values)) == 0) return;
        block.fail(Operation::wgmma, product.where, "registers of A have been written without a wgmma_fence since");
    }
    if (state.registers.size() == kRememberedRegisters) state.registers.pop_front();
    state.registers.push_back(registers);
}

void Warpgroup::issue(Block& block, Warp& warp, Where where) {
    const int w = warp.index % 4;
    State& state = warps_[w];
    const WgmmaArguments& first = warp.argument<WgmmaArguments>(0);
    for (int lane = 1; lane < 32; ++lane) {
        if (!same_product(first, warp.argument<WgmmaArguments>(lane))) {
            block.fail(Operation::wgmma, where, "the lanes of a warp name different operands");
        }
    }
    if (!state.fenced) block.fail(Operation::wgmma, where, "wgmma without a wgmma_fence before it");
    if (state.issued - first_ == static_cast<int64_t>(products_.size())) {
        products_.emplace_back();
        products_.back().arguments = first;
        products_.back().where = where;
    }
    Product& mine = product(state.issued);
    if (!same_product(mine.arguments, first) || !(mine.where == where)) {
        block.fail(Operation::wgmma, where,
                   "the warps of a warpgroup issue different products; another of them has issued one in " +
                       to_string(mine.where) + " as its number " + std::to_string(state.issued));
    }
    Accumulator& accumulator = take_accumulator(block, warp, first.accumulate, first.columns, where);
    accumulator.last = state.issued;
    mine.accumulators[w] = &accumulator;
    if (first.registers != nullptr) take_registers(block, warp, mine);
    mine.warps |= 1u << w;
    ++state.issued;

    const int64_t issued = issued_by_all();
    if (!block.is_late()) execute_until(block, issued);
    for (State& other : warps_) {
        if (other.waits_for < 0 || other.waits_for > issued) continue;
        end_wait(block, other, std::exchange(other.waits_for, -1));
        block.wake(*other.warp);
    }
}

// ------------------------------------------------------------------------------------------ wait

bool Warpgroup::wait(Block& block, Warp& warp, int n) {
    State& state = warps_[warp.index % 4];
    if (n == 0) state.fenced = false;
    int64_t end = state.published;
    for (; static_cast<int>(state.groups.size()) > n; state.groups.pop_front()) end = state.groups.front();
    if (issued_by_all() < end) {
        state.waits_for = end;
        state.warp = &warp;
        return false;
    }
    end_wait(block, state, end);
    return true;
}

void Warpgroup::execute_until(Block& block, int64_t end) {
    for (; executed_ < end; ++executed_) {
        Product& next = product(executed_);
        for (int w = 0; w < 4; ++w) check_registers(block, next, w);
        multiply(block, next, scratch_);
    }
}

void Warpgroup::check_registers(const Block& block, const Product& product, int w) {
    if (product.arguments.registers == nullptr) return;
    const Registers& registers = product.registers[w];
    for (int lane = 0; lane < 32; ++lane) {
        if (!std::equal(registers.lanes[lane], registers.lanes[lane] + 4, registers.values[lane])) {
            block.fail(Operation::wgmma, product.where,
                       "registers of A were written in flight, in lane " + std::to_string(lane) + " of warp " +
                           std::to_string(w) + " of the warpgroup");
        }
    }
}

// Everything before product number `end` happens, and the lanes of one warp see it.
void Warpgroup::end_wait(Block& block, State& state, int64_t end) {
    execute_until(block, end);
    const int w = static_cast<int>(&state - warps_);
    for (; state.published < end; ++state.published) check_registers(block, product(state.published), w);
    for (Accumulator& accumulator : state.accumulators) {
        if (!accumulator.in_flight || accumulator.last >= end) continue;
        accumulator.in_flight = false;
        for (int lane = 0; lane < 32; ++lane) {
            for_each_element(accumulator.lanes[lane], lane, accumulator.columns, [&](float& element, int index) {
                if (bits_of(element) != kPoison) {
                    block.fail(Operation::wgmma, product(accumulator.last).where,
                               "the accumulator was written in flight, in lane " + std::to_string(lane) + " of warp " +
                                   std::to_string(w) + " of the warpgroup");
                }
                element = accumulator.values[static_cast<size_t>(index)];
            });
        }
    }
    int64_t seen_by_all = warps_[0].published;
    for (const State& other : warps_) seen_by_all = std::min(seen_by_all, other.published);
    for (; first_ < seen_by_all; ++first_) products_.pop_front();
}

// ------------------------------------------------------------------------------------------ the operations

namespace {

Warpgroup& warpgroup_of(Block& block, const Warp& warp) {
    if (warp.index / 4 * 4 + 4 > block.num_warps()) {
        block.fail(warp.operation, warp.where, "by less than a warpgroup");
    }
    return block.warpgroup(warp.index / 4);
}

}  // namespace

void wgmma_fence(Where where) {
    if (skipped(Operation::wgmma_fence, where)) return;
    collective(Operation::wgmma_fence, where, nullptr, [](Block& block, Warp& warp) {
        warpgroup_of(block, warp).fence(warp.index % 4);
        return true;
    });
}

void wgmma_commit(Where where) {
    if (skipped(Operation::wgmma_commit, where)) return;
    collective(Operation::wgmma_commit, where, nullptr, [](Block& block, Warp& warp) {
        warpgroup_of(block, warp).commit(warp.index % 4);
        return true;
    });
}

void wgmma_wait(int n, Where where) {
    if (skipped(Operation::wgmma_wait, where)) return;
    collective(Operation::wgmma_wait, where, nullptr,
               [&](Block& block, Warp& warp) { return warpgroup_of(block, warp).wait(block, warp, n); });
}

void wgmma(WgmmaArguments& arguments, Where where) {
    collective(Operation::wgmma, where, &arguments, [&](Block& block, Warp& warp) {
        warpgroup_of(block, warp).issue(block, warp, where);
        return true;
    });
}

}  // namespace tf::emulator
