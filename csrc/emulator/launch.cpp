#include "emulator/launch.h"

#include <numeric>
#include <string>
#include <vector>

#include "emulator/block.h"

namespace tf::emulator {

namespace {

std::mutex mutex;
Settings current_settings;

// Threads, stacks and shared memory are kept from launch to launch.
Block& the_block() {
    static Block block;
    return block;
}

struct Running {
    ~Running() { stop_running(); }
};

void check(const LaunchShape& shape) {
    // 227 KB is what a block can have on sm_90.
    if (shape.grid_x < 1 || shape.grid_y < 1 || shape.grid_y > 65535) {
        throw Error("a grid of " + std::to_string(shape.grid_x) + " x " + std::to_string(shape.grid_y) + " blocks");
    }
    if (shape.threads < 32 || shape.threads > Block::kMaxThreads || shape.threads % 32 != 0) {
        throw Error("a block of " + std::to_string(shape.threads) + " threads; allowed are multiples of 32 to 1024");
    }
    if (shape.shared_bytes < 0 || shape.shared_bytes > 227 * 1024) {
        throw Error(std::to_string(shape.shared_bytes) + " bytes of shared memory; a block can have 232448");
    }
}

}  // namespace

LaunchLock::LaunchLock() : lock_(mutex) {}

void set(const Settings& settings) {
    const LaunchLock lock;
    current_settings = settings;
}

Settings settings() { return current_settings; }

void launch(const LaunchShape& shape, const std::function<void(char* shared)>& body) {
    check(shape);
    const LaunchLock lock;
    const Running while_here;
    Block& block = the_block();
    block.begin_launch(shape, body);
    std::vector<int> order(static_cast<size_t>(shape.grid_x) * static_cast<size_t>(shape.grid_y));
    std::iota(order.begin(), order.end(), 0);
    if (current_settings.shuffle_blocks) {
        Random random(current_settings.seed);
        for (size_t i = order.size() - 1; i > 0; --i) {
            std::swap(order[i], order[static_cast<size_t>(random.below(static_cast<int>(i) + 1))]);
        }
    }
    for (const int index : order) block.run(index);
}

}  // namespace tf::emulator
