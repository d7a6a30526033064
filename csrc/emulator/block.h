// The block that runs: its threads, its warps, and whose turn it is.
#pragma once

#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "emulator/async_copy.h"
#include "emulator/fiber.h"
#include "emulator/identity.h"
#include "emulator/launch.h"
#include "emulator/mbarrier.h"
#include "emulator/random.h"
#include "emulator/shared_memory.h"
#include "emulator/sites.h"
#include "emulator/warpgroup.h"

namespace tf::emulator {

struct Warp;

struct Thread : Identity {
    Warp* warp = nullptr;
    int position = 0;  // in the order in which the warp runs its lanes
    Fiber fiber;
    // What it waits for, for reports.
    Operation operation = Operation::none;
    Where where{nullptr, 0};
    const void* waits_on = nullptr;  // the mbarrier
    // What load_acquire last gave: another value than before is progress.
    const void* polled = nullptr;
    int polled_value = 0;
    ThreadCopies copies;
};

// Masks `ready`, `yielded` and `paused` are by position, the others by lane.
struct Warp {
    int index = 0;
    uint32_t ready = 0;    // can run
    uint32_t yielded = 0;  // can run, but polls
    uint32_t paused = 0;   // can run, but has given something free
    uint64_t paused_at = 0;
    uint32_t finished = 0;
    uint32_t arrived = 0;  // at the collective `operation`
    Operation operation = Operation::none;
    Where where{nullptr, 0};
    void* arguments[32];
    Thread* lanes[32];
    Thread* at_position[32];

    template <class T>
    T& argument(int lane) const {
        return *static_cast<T*>(arguments[lane]);
    }
    bool converged() const { return (arrived | finished) == ~0u; }
};

struct NamedBarrier {
    int expected = 0;  // threads; 0 while nobody has come
    int arrived = 0;
    uint32_t warps = 0;    // that have come
    uint32_t waiting = 0;  // those of them that wait
};

class Block {
  public:
    static constexpr int kMaxThreads = 1024, kNamedBarriers = 16;

    // `place`: its number among those that run at the same time.
    explicit Block(int place) : place_(place) {}

    void begin_launch(const LaunchShape&, const std::function<void(char*)>& body);
    void begin(int index);  // a block of the grid
    bool step();            // a warp goes as far as it can; false once all threads have returned

    const LaunchShape& shape() const { return shape_; }
    int num_warps() const { return shape_.threads / 32; }
    bool is_late() const { return late_; }
    int elected_lane() const { return elected_lane_; }
    SharedMemory& memory() { return memory_; }
    const SharedMemory& memory() const { return memory_; }
    Random& random() { return random_; }
    Mbarriers& mbarriers() { return mbarriers_; }
    LoadsInFlight& loads() { return loads_; }
    BulkWrites& bulk_writes() { return bulk_writes_; }
    Warpgroup& warpgroup(int index) { return *warpgroups_[static_cast<size_t>(index)]; }

    // By a thread: stop until something calls wake. Its own reason is noted in Thread::operation and the like.
    void suspend(Thread&);
    void yield(Thread&);
    // After an arrival, where this block does so: stop until no other warp can run.
    void pause(Thread&);
    bool pause(Warp&);  // all lanes of a collective; false if they do not go on
    // After telling other blocks something, where this block does so: they go on, and nothing of this block does.
    void give_way(Thread&);
    bool has_given_way() { return std::exchange(given_way_, false); }
    void wake(Thread& thread) { thread.warp->ready |= 1u << thread.position; }
    void wake(Warp&);  // all of its lanes that have not returned
    void wake_warps(uint32_t mask);
    // What shows that the block is not stuck.
    void note_progress() { ++progress_; }

    // A warp has come to a barrier; false if it has to wait there.
    bool arrive_at_barrier(Warp&, int id, int threads, bool waits);
    bool arrive_at_block_barrier(Warp&);

    // Plain writes become visible to the asynchronous proxy.
    void fence_async_proxy(const Thread&);
    // Throws where the asynchronous proxy would not see what is there.
    void check_proxy(uint32_t address, int bytes, Where, Operation);

    // Throws an Error of the thread that runs, if one does.
    [[noreturn]] void fail(Operation, Where, const std::string& what) const;
    // The same of an operation that a thread began earlier.
    [[noreturn]] void fail(const Thread&, Operation, Where, const std::string& what) const;
    [[noreturn]] void fail_diverged(const Warp&, const Thread&, Operation, Where) const;

    void enter_thread();  // what a fiber begins with

  private:
    void draw_schedule(int index);
    Warp* choose_warp();
    void run_warp(Warp&);
    Thread* next_lane(Warp&);
    bool resume_paused();
    void run_without_warps();
    void finish_thread(Thread&);
    void end_block();
    uint32_t unfinished_warps() const;
    void publish_fenced();
    [[noreturn]] void fail_stuck(const char* what) const;
    [[noreturn]] void throw_error(const Thread*, Operation, Where, const std::string& what) const;
    std::string schedule() const;

    const int place_;
    LaunchShape shape_;
    const std::function<void(char*)>* body_ = nullptr;
    Settings settings_;
    SharedMemory memory_;
    Random random_;
    Fiber scheduler_;
    std::vector<std::unique_ptr<Thread>> threads_;
    std::vector<std::unique_ptr<Warp>> warps_;
    std::vector<std::unique_ptr<Warpgroup>> warpgroups_;
    Mbarriers mbarriers_;
    LoadsInFlight loads_;
    BulkWrites bulk_writes_;
    NamedBarrier barriers_[kNamedBarriers];

    int index_ = 0, unfinished_ = 0;
    bool late_ = false, pauses_ = false, given_way_ = false;
    WarpOrder warp_order_ = WarpOrder::lowest_first;
    LaneOrder lane_order_ = LaneOrder::ascending;
    int starved_warp_ = -1, elected_lane_ = 0;
    uint32_t laggards_ = 0;                // warps
    const Warp* fencing_ = nullptr;        // its fence has not been carried out yet
    static inline uint64_t progress_ = 0;  // of all blocks: one may wait for another
    uint64_t last_progress_ = 0, pauses_so_far_ = 0;
    int idle_rounds_ = 0;
    std::exception_ptr error_;
};

extern Block* running;  // null where no kernel runs
void stop_running();
[[noreturn]] void fail_outside_of_launch();
inline Block& block() {
    if (running == nullptr) fail_outside_of_launch();
    return *running;
}
inline Thread& current_thread() { return *static_cast<Thread*>(identity); }

// One lane's part of an operation by a whole warp. The last lane to come executes it for all, from what each has left
// at `argument`, and says whether the warp goes on at once. Those that went before it wait.
template <class Execute>
void collective(Operation operation, Where where, void* argument, Execute execute) {
    Block& b = block();
    Thread& self = current_thread();
    Warp& warp = *self.warp;
    if (warp.arrived == 0) {
        warp.operation = operation;
        warp.where = where;
    } else if (warp.operation != operation || !(warp.where == where)) {
        b.fail_diverged(warp, self, operation, where);
    }
    if (warp.finished != 0 && operation != Operation::sync_threads) b.fail_diverged(warp, self, operation, where);
    warp.arguments[self.lane] = argument;
    warp.arrived |= 1u << self.lane;
    self.operation = operation;
    self.where = where;
    if (warp.converged()) {
        warp.arrived = 0;
        if (execute(b, warp)) {
            b.wake(warp);
            warp.ready &= ~(1u << self.position);
            return;
        }
    }
    b.suspend(self);
}

}  // namespace tf::emulator
