// Runs a CUDA kernel on a CPU, to find out whether it is right under every order of its threads and copies.
//
// Blocks run one after the other, or a few at a time, in turns; their threads are fibers of the calling thread. A warp
// runs until all of its lanes wait or have returned: an order drawn at random finds almost no missing barrier, this
// greedy one nearly all. Which warp goes on, in which order its lanes do, and whether copies land at once or as late as
// they may is drawn from the seed for each block. Run a kernel with several seeds.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <stdexcept>

namespace tf::emulator {

// A fault of the kernel: what, where, in which thread and under which schedule.
class Error : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

struct LaunchShape {
    int grid_x = 1, grid_y = 1, threads = 32;
    int shared_bytes = 0;
};

constexpr int kMostBlocksAtOnce = 8;

enum class WarpOrder { drawn, lowest_first, highest_first, random, starve_one };
// Lanes of a warp run in this order before another warp does. leader_first: lane 0 and the other warps' lanes 0 run as
// far as they can before the rest, which finds what one lane says of its warp too early.
enum class LaneOrder { drawn, ascending, descending, random, leader_first };
// Whether a thread that arrives at an mbarrier, or a warp at barrier_arrive, goes on at once, or only when no other
// can: then whoever waited for it runs first, which finds what is given free too early. Drawn: pauses in every second
// block.
enum class Arrival { drawn, goes_on, pauses };
// When copies and matrix products in flight happen: as late as allowed (before that their targets are NaN), or when
// they are issued, which finds those that are issued too early. Drawn: two blocks in three are late.
enum class Landing { drawn, late, early };

struct Settings {
    uint64_t seed = 0;
    // Blocks in an order drawn from the seed. Otherwise ascending, since a kernel may wait for a block before its own.
    bool shuffle_blocks = false;
    // How many blocks run at the same time, from 1 to kMostBlocksAtOnce.
    int blocks_at_once = 1;
    // Whether plain writes of shared memory must be fenced before TMA and wgmma read them.
    bool check_proxy = true;
    WarpOrder warps = WarpOrder::drawn;
    LaneOrder lanes = LaneOrder::drawn;
    Landing landing = Landing::drawn;
    Arrival arrival = Arrival::drawn;
};

// For all launches to come, in the whole process.
void set(const Settings&);
Settings settings();

// Shared memory is 1024-byte aligned and full of NaN at the start of each block. Throws Error, and what `body` throws;
// the threads that are then left behind are forgotten, their destructors do not run. One launch at a time in a process.
void launch(const LaunchShape&, const std::function<void(char* shared)>& body);

// Held while a kernel runs, by which the emulator's state belongs to one thread.
class LaunchLock {
  public:
    LaunchLock();

  private:
    std::unique_lock<std::mutex> lock_;
};

}  // namespace tf::emulator
