#include "emulator/launch.h"

#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "emulator/block.h"

namespace tf::emulator {

namespace {

std::mutex mutex;
Settings current_settings;

// As many as run at the same time. Threads, stacks and shared memory are kept from launch to launch.
std::vector<Block*> blocks(int count) {
    static std::vector<std::unique_ptr<Block>> all;
    while (static_cast<int>(all.size()) < count) all.push_back(std::make_unique<Block>(static_cast<int>(all.size())));
    std::vector<Block*> first;
    for (int i = 0; i < count; ++i) first.push_back(all[static_cast<size_t>(i)].get());
    return first;
}

// The blocks of a grid, in the order in which they start.
std::vector<int> order_of(const LaunchShape& shape) {
    std::vector<int> order(static_cast<size_t>(shape.grid_x) * static_cast<size_t>(shape.grid_y));
    std::iota(order.begin(), order.end(), 0);
    if (current_settings.shuffle_blocks) {
        Random random(current_settings.seed);
        for (size_t i = order.size() - 1; i > 0; --i) {
            std::swap(order[i], order[static_cast<size_t>(random.below(static_cast<int>(i) + 1))]);
        }
    }
    return order;
}

// Blocks that run at the same time, one thread of the CPU among them.
class Turns {
  public:
    explicit Turns(uint64_t seed) : random_(seed) {}
    void add(Block* block) { all_.push_back({block, 0}); }
    bool is_empty() const { return all_.empty(); }

    // A turn of one of them: a few steps mostly, and sometimes all that it has. Returns it if it is over, or null.
    Block* take() {
        const auto chosen = choose();
        for (int left = 1 + random_.below(1 << random_.below(10)); left > 0; --left) {
            ++steps_;
            if (!chosen->block->step()) {
                Block* const over = chosen->block;
                all_.erase(chosen);
                return over;
            }
            if (chosen->block->has_given_way()) {
                chosen->behind_until = steps_ + kStepsBehind;
                break;
            }
        }
        return nullptr;
    }

  private:
    static constexpr int64_t kStepsBehind = 1000;  // enough for others to finish, mostly
    struct Resident {
        Block* block;
        int64_t behind_until;
    };

    std::vector<Resident>::iterator choose() {
        const auto draw = [&] { return all_.begin() + random_.below(static_cast<int>(all_.size())); };
        auto chosen = draw();
        for (int tries = 0; chosen->behind_until > steps_ && tries < 16; ++tries) chosen = draw();
        return chosen;
    }

    Random random_;
    std::vector<Resident> all_;
    int64_t steps_ = 0;
};

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
    std::vector<Block*> free = blocks(current_settings.blocks_at_once);
    for (Block* block : free) block->begin_launch(shape, body);
    const std::vector<int> order = order_of(shape);
    auto next = order.begin();
    Turns turns(current_settings.seed);
    while (true) {
        for (; next != order.end() && !free.empty(); free.pop_back(), ++next) {
            free.back()->begin(*next);
            turns.add(free.back());
        }
        if (turns.is_empty()) return;
        if (Block* over = turns.take()) free.push_back(over);
    }
}

}  // namespace tf::emulator
