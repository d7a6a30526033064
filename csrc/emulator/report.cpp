// What an Error says.
#include <map>
#include <tuple>

#include "emulator/block.h"

namespace tf::emulator {

namespace {

std::string describe(Operation operation, const Where& where) {
    if (operation == Operation::none) return where.file == nullptr ? "" : to_string(where) + ": ";
    return to_string(where) + ": " + name_of(operation) + ": ";
}

// 0, 1, 2, 5 as "0-2, 5".
std::string ranges(const std::vector<int>& sorted) {
    std::string text;
    for (size_t i = 0; i < sorted.size();) {
        size_t end = i + 1;
        while (end < sorted.size() && sorted[end] == sorted[end - 1] + 1) ++end;
        text += (text.empty() ? "" : ", ") + std::to_string(sorted[i]);
        if (end > i + 1) text += "-" + std::to_string(sorted[end - 1]);
        i = end;
    }
    return text;
}

std::string lanes_of(uint32_t mask) {
    std::vector<int> lanes;
    for (; mask != 0; mask &= mask - 1) lanes.push_back(__builtin_ctz(mask));
    return (lanes.size() == 1 ? "lane " : "lanes ") + ranges(lanes);
}

}  // namespace

std::string Block::schedule() const {
    static const char* const kWarps[] = {"drawn", "lowest first", "highest first", "in random order", "but one first"};
    static const char* const kLanes[] = {"drawn", "ascending", "descending", "in random order", "0 of all warps first"};
    std::string text = "seed " + std::to_string(settings_.seed) + ", block " + std::to_string(index_) + ": warps " +
                       kWarps[static_cast<int>(warp_order_)];
    if (warp_order_ == WarpOrder::starve_one) text += " (warp " + std::to_string(starved_warp_) + " last)";
    return text + ", lanes " + kLanes[static_cast<int>(lane_order_)] + ", copies " + (late_ ? "late" : "early") +
           (pauses_ ? ", pauses after arrivals" : "");
}

void Block::throw_error(const Thread* thread, Operation operation, Where where, const std::string& what) const {
    std::string text = describe(operation, where) + what + "\n  in block (" + std::to_string(index_ % shape_.grid_x) +
                       ", " + std::to_string(index_ / shape_.grid_x) + ")";
    if (thread != nullptr) {
        text += ", thread " + std::to_string(thread->thread) + " (warp " + std::to_string(thread->warp->index) +
                ", lane " + std::to_string(thread->lane) + ")";
    }
    throw Error(text + "; " + schedule());
}

void Block::fail(Operation operation, Where where, const std::string& what) const {
    throw_error(identity->thread >= 0 ? &current_thread() : nullptr, operation, where, what);
}

void Block::fail(const Thread& thread, Operation operation, Where where, const std::string& what) const {
    throw_error(&thread, operation, where, what);
}

void Block::fail_diverged(const Warp& warp, const Thread& self, Operation operation, Where where) const {
    std::string text = "warp " + std::to_string(warp.index) + " has diverged: ";
    text += "lane " + std::to_string(self.lane) + " ";
    text += operation == Operation::none ? "returns" : "is here";
    if (warp.arrived != 0) {
        text += ", " + lanes_of(warp.arrived) + " at " + name_of(warp.operation) + " in " + to_string(warp.where);
    }
    if (warp.finished != 0 && operation != Operation::none) text += ", " + lanes_of(warp.finished) + " returned";
    throw_error(&self, operation, where, text);
}

void Block::fail_stuck(const char* what) const {
    struct Group {
        std::vector<int> threads;
        std::map<const void*, std::vector<int>> barriers;
    };
    std::map<std::tuple<std::string, int, Operation>, Group> groups;
    std::vector<int> returned;
    for (int t = 0; t < shape_.threads; ++t) {
        const Thread& thread = *threads_[static_cast<size_t>(t)];
        if ((thread.warp->finished >> thread.lane & 1) != 0) {
            returned.push_back(t);
            continue;
        }
        const std::string file = thread.where.file == nullptr ? "" : thread.where.file;
        Group& group = groups[{file, thread.where.line, thread.operation}];
        group.threads.push_back(t);
        if (thread.operation == Operation::mbarrier_wait) group.barriers[thread.waits_on].push_back(t);
    }
    std::string text = what;
    for (const auto& [place, group] : groups) {
        const Where where{std::get<0>(place).c_str(), std::get<1>(place)};
        text += "\n  " + describe(std::get<2>(place), where) + "threads " + ranges(group.threads);
        for (const auto& [address, threads] : group.barriers) {
            text += "\n    " + mbarriers_.describe(*this, static_cast<const uint64_t*>(address)) + ": threads " +
                    ranges(threads);
        }
    }
    if (!returned.empty()) text += "\n  returned: threads " + ranges(returned);
    for (int id = 0; id < kNamedBarriers; ++id) {
        const NamedBarrier& barrier = barriers_[id];
        if (barrier.warps == 0) continue;
        std::vector<int> warps;
        for (uint32_t mask = barrier.warps; mask != 0; mask &= mask - 1) warps.push_back(__builtin_ctz(mask));
        text += "\n  barrier " + std::to_string(id) + ": has warps " + ranges(warps);
        if (id != 0) text += ", waits for " + std::to_string(barrier.expected) + " threads";
    }
    throw_error(nullptr, Operation::none, Where{nullptr, 0}, text);
}

}  // namespace tf::emulator
