#include "emulator/block.h"

#include <algorithm>
#include <utility>

namespace tf::emulator {

namespace {

Identity nobody{-1, -1, -1, -1, 0, 0};

// What shared memory is full of in the beginning: NaN in every floating type; as integers -1, or very large.
constexpr uint16_t kPoisons[] = {0xffff, 0x7fff};

// Rounds in which every warp that can run only polls, and polls what it polled before.
constexpr int kIdleRounds = 10000;

void thread_entry() {
    enter_fiber();
    block().enter_thread();
}

}  // namespace

Identity* identity = &nobody;
Block* running = nullptr;

void stop_running() {
    running = nullptr;
    identity = &nobody;
}

void fail_outside_of_launch() { throw Error("a function of tf::ptx was called outside of a launch"); }

// ------------------------------------------------------------------------------------------ begin and end

void Block::begin_launch(const LaunchShape& shape, const std::function<void(char*)>& body) {
    shape_ = shape;
    body_ = &body;
    settings_ = settings();
    memory_.allocate(shape.shared_bytes);
    while (static_cast<int>(threads_.size()) < shape.threads) threads_.push_back(std::make_unique<Thread>());
    while (static_cast<int>(warps_.size()) < num_warps()) warps_.push_back(std::make_unique<Warp>());
    while (static_cast<int>(warpgroups_.size()) < num_warps() / 4) {
        warpgroups_.push_back(std::make_unique<Warpgroup>());
    }
}

void Block::draw_schedule(int index) {
    random_ = Random(settings_.seed * 0x100000001b3u + static_cast<uint64_t>(index));
    // All are drawn, also those that are set: what one setting says does not change the others.
    const int landing = random_.below(3), warps = random_.below(4), lanes = random_.below(4);
    starved_warp_ = random_.below(num_warps());
    laggards_ = static_cast<uint32_t>(random_.next());
    elected_lane_ = random_.below(2) == 0 ? 0 : random_.below(32);
    late_ = settings_.landing == Landing::drawn ? landing != 0 : settings_.landing == Landing::late;
    warp_order_ = settings_.warps == WarpOrder::drawn ? static_cast<WarpOrder>(warps + 1) : settings_.warps;
    lane_order_ = settings_.lanes == LaneOrder::drawn ? static_cast<LaneOrder>(lanes + 1) : settings_.lanes;
    if (lane_order_ == LaneOrder::leader_first) elected_lane_ = 0;
    const bool pauses = random_.below(2) == 0;
    pauses_ = settings_.arrival == Arrival::drawn ? pauses : settings_.arrival == Arrival::pauses;
}

void Block::begin(int index) {
    index_ = index;
    draw_schedule(index);
    memory_.begin_block(kPoisons[random_.below(2)]);
    mbarriers_.begin_block();
    loads_.begin_block();
    bulk_writes_.begin_block();
    std::fill(barriers_, barriers_ + kNamedBarriers, NamedBarrier{});
    for (int i = 0; i < num_warps() / 4; ++i) warpgroup(i).begin_block();
    fencing_ = nullptr;
    given_way_ = false;
    last_progress_ = progress_;
    idle_rounds_ = 0;
    error_ = nullptr;
    unfinished_ = shape_.threads;

    int order[32];
    for (int i = 0; i < 32; ++i) order[i] = lane_order_ == LaneOrder::descending ? 31 - i : i;
    if (lane_order_ == LaneOrder::random) {
        for (int i = 31; i > 0; --i) std::swap(order[i], order[random_.below(i + 1)]);
    }
    for (int w = 0; w < num_warps(); ++w) {
        Warp& warp = *warps_[static_cast<size_t>(w)];
        warp = Warp{};
        warp.index = w;
        warp.ready = ~0u;
        for (int position = 0; position < 32; ++position) {
            Thread& thread = *threads_[static_cast<size_t>(w * 32 + order[position])];
            static_cast<Identity&>(thread) = {w * 32 + order[position], order[position], index % shape_.grid_x,
                                              index / shape_.grid_x,    shape_.grid_x,   shape_.grid_y};
            thread.warp = &warp;
            thread.position = position;
            thread.operation = Operation::none;
            thread.polled = nullptr;
            thread.copies.begin_block();
            warp.lanes[thread.lane] = warp.at_position[position] = &thread;
            prepare_fiber(thread.fiber, place_ * shape_.threads + thread.thread, thread_entry);
        }
    }
}

bool Block::step() {
    running = this;
    if (unfinished_ > 0) {
        Warp* warp = choose_warp();
        if (warp != nullptr) {
            run_warp(*warp);
        } else {
            run_without_warps();
        }
    }
    if (unfinished_ > 0) return true;
    end_block();
    return false;
}

void Block::end_block() {
    for (int i = 0; i < num_warps() / 4; ++i) warpgroup(i).finish(*this);
    loads_.finish(*this);
    bulk_writes_.finish();
    const int64_t overrun = memory_.find_overrun();
    if (overrun != 0) {
        throw_error(nullptr, Operation::none, Where{nullptr, 0},
                    "shared memory of " + std::to_string(memory_.bytes()) + " bytes was written at byte " +
                        std::to_string(overrun));
    }
}

// ------------------------------------------------------------------------------------------ whose turn it is

Warp* Block::choose_warp() {
    uint32_t ready = 0, led = 0;
    for (int w = 0; w < num_warps(); ++w) {
        const uint32_t lanes = warps_[static_cast<size_t>(w)]->ready;
        ready |= (lanes != 0 ? 1u : 0u) << w;
        led |= (lanes & 1u) << w;
    }
    if (ready == 0) return nullptr;
    if (lane_order_ == LaneOrder::leader_first) {
        // All leaders first, and the rest of some warps last: what their leaders gave free, other lanes still need.
        if (led != 0) {
            ready = led;
        } else if ((ready & ~laggards_) != 0) {
            ready &= ~laggards_;
        }
    }
    int chosen = 0;
    switch (warp_order_) {
        case WarpOrder::highest_first:
            chosen = 31 - __builtin_clz(ready);
            break;
        case WarpOrder::starve_one:
            if (ready != 1u << starved_warp_) ready &= ~(1u << starved_warp_);
            [[fallthrough]];
        case WarpOrder::random:
            for (int skip = random_.below(__builtin_popcount(ready)); skip > 0; --skip) ready &= ready - 1;
            [[fallthrough]];
        default:
            chosen = __builtin_ctz(ready);
    }
    return warps_[static_cast<size_t>(chosen)].get();
}

void Block::run_warp(Warp& warp) {
    if (fencing_ != &warp) publish_fenced();
    Thread& first = *warp.at_position[__builtin_ctz(warp.ready)];
    warp.ready &= warp.ready - 1;
    identity = &first;
    switch_fiber(scheduler_, first.fiber);
    identity = &nobody;
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Block::suspend(Thread& self) {
    Thread* next = next_lane(*self.warp);
    if (next != nullptr) identity = next;
    switch_fiber(self.fiber, next != nullptr ? next->fiber : scheduler_);
}

// The lane that goes on when another one of its warp stops; null where the scheduler is to choose.
Thread* Block::next_lane(Warp& warp) {
    if (warp.ready == 0 || lane_order_ == LaneOrder::leader_first) return nullptr;
    Thread* next = warp.at_position[__builtin_ctz(warp.ready)];
    warp.ready &= warp.ready - 1;
    return next;
}

void Block::yield(Thread& self) {
    self.warp->yielded |= 1u << self.position;
    suspend(self);
}

void Block::pause(Thread& self) {
    if (!pauses_) return;
    self.warp->paused |= 1u << self.position;
    self.warp->paused_at = ++pauses_so_far_;
    suspend(self);
}

bool Block::pause(Warp& warp) {
    if (!pauses_) return true;
    warp.paused = ~0u;
    warp.paused_at = ++pauses_so_far_;
    return false;
}

void Block::give_way(Thread& self) {
    if (!pauses_ || settings_.blocks_at_once == 1) return;
    given_way_ = true;
    wake(self);
    switch_fiber(self.fiber, scheduler_);
}

// The warp that has paused for longest, so that each comes to its next arrival before any is beyond that.
bool Block::resume_paused() {
    Warp* chosen = nullptr;
    for (int w = 0; w < num_warps(); ++w) {
        Warp* warp = warps_[static_cast<size_t>(w)].get();
        if (warp->paused != 0 && (chosen == nullptr || warp->paused_at < chosen->paused_at)) chosen = warp;
    }
    if (chosen == nullptr) return false;
    chosen->ready |= std::exchange(chosen->paused, 0);
    return true;
}

void Block::wake(Warp& warp) {
    for (uint32_t lanes = ~warp.finished; lanes != 0; lanes &= lanes - 1) {
        warp.ready |= 1u << warp.lanes[__builtin_ctz(lanes)]->position;
    }
}

void Block::wake_warps(uint32_t mask) {
    for (; mask != 0; mask &= mask - 1) wake(*warps_[static_cast<size_t>(__builtin_ctz(mask))]);
}

// Those that poll have a look each time that no one else can go on; a copy lands only after a look that saw nothing.
void Block::run_without_warps() {
    if (resume_paused()) return;
    bool polling = false;
    for (int w = 0; w < num_warps(); ++w) polling |= warps_[static_cast<size_t>(w)]->yielded != 0;
    const bool idle = progress_ == last_progress_;
    if (!loads_.empty() && (!polling || idle)) {
        loads_.land_one(*this);
        note_progress();
        return;
    }
    if (!polling) fail_stuck("deadlock: every thread waits");
    idle_rounds_ = idle ? idle_rounds_ + 1 : 0;
    if (idle_rounds_ > kIdleRounds) {
        fail_stuck("livelock: a block waits for another block, which does not run at the same time, or for itself");
    }
    last_progress_ = progress_;
    for (int w = 0; w < num_warps(); ++w) {
        Warp& warp = *warps_[static_cast<size_t>(w)];
        warp.ready |= std::exchange(warp.yielded, 0);
    }
}

// ------------------------------------------------------------------------------------------ threads

void Block::enter_thread() {
    try {
        (*body_)(memory_.data());
        finish_thread(current_thread());
    } catch (...) {
        // Outside of the handler the exception is no longer this thread's; another fiber may run.
        error_ = std::current_exception();
    }
    Thread& self = current_thread();
    Thread* next = error_ ? nullptr : next_lane(*self.warp);
    if (next != nullptr) identity = next;
    leave_fiber(self.fiber, next != nullptr ? next->fiber : scheduler_);
}

uint32_t Block::unfinished_warps() const {
    uint32_t mask = 0;
    for (int w = 0; w < num_warps(); ++w) mask |= (warps_[static_cast<size_t>(w)]->finished != ~0u ? 1u : 0u) << w;
    return mask;
}

void Block::finish_thread(Thread& self) {
    Warp& warp = *self.warp;
    self.operation = Operation::none;
    self.copies.finish(*this, self);
    warp.finished |= 1u << self.lane;
    --unfinished_;
    if (warp.finished == ~0u && warp.index / 4 < num_warps() / 4) warpgroup(warp.index / 4).finish_warp(*this, warp);
    note_progress();
    if (warp.arrived != 0) {
        if (warp.operation != Operation::sync_threads) fail_diverged(warp, self, Operation::none, Where{nullptr, 0});
        if (warp.converged()) {
            warp.arrived = 0;
            if (arrive_at_block_barrier(warp)) wake(warp);
        }
    } else if (warp.finished == ~0u) {
        // A warp that has returned counts as one that has come; it may be the last.
        NamedBarrier& barrier = barriers_[0];
        if (barrier.warps != 0 && barrier.warps == unfinished_warps()) {
            wake_warps(barrier.warps);
            barrier = NamedBarrier{};
        }
    }
}

// ------------------------------------------------------------------------------------------ asynchronous proxy

// The lanes of a warp call this one after the other, before another warp runs. One copy of shared memory, by the last
// of them, is enough: what the others have written in the meantime is let through, what the last writes later is not.
void Block::fence_async_proxy(const Thread& self) {
    if (!settings_.check_proxy) return;
    fencing_ = self.warp;
    if (self.warp->ready == 0) publish_fenced();
}

void Block::publish_fenced() {
    if (fencing_ != nullptr) memory_.publish();
    fencing_ = nullptr;
}

void Block::check_proxy(uint32_t address, int bytes, Where where, Operation operation) {
    if (!settings_.check_proxy) return;
    publish_fenced();
    if (memory_.is_published(address, bytes)) return;
    fail(operation, where,
         "reads shared memory at byte " + std::to_string(address - SharedMemory::kFirstAddress) +
             ", which threads wrote without fence_async_proxy, or write while it is read");
}

}  // namespace tf::emulator
