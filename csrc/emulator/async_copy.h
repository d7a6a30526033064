// Copies between global and shared memory that are under way: cp.async, TMA, bulk reductions.
#pragma once

#include <cstdint>
#include <vector>

#include "emulator/device.h"
#include "emulator/sites.h"

namespace tf::emulator {

class Block;
struct Thread;

struct CpAsync {
    uint32_t target;
    const char* source;
    int bytes;
    int64_t group;  // counted by thread; the open group until it is committed
    Where where;
};

// A TMA store, or a reduction of floats where `reduce` is set. In two steps: shared memory is read when the thread has
// waited for that, global memory written when it has waited for the whole, or else when the block ends.
struct BulkWrite {
    Operation operation;
    Where where;
    int64_t group;
    uint32_t source;
    int bytes;
    bool waited = false, read = false, written = false;
    TensorGeometry geometry;
    int coordinate[5] = {};
    float* target = nullptr;
    std::vector<char> data;
};

struct ThreadCopies {
    std::vector<CpAsync> copies;
    std::vector<BulkWrite> writes;
    int64_t committed = 0, writes_committed = 0;

    void begin_block();
    // Throws for what the thread has begun and not waited for. What is only to be written then goes on in the block.
    void finish(Block&, const Thread&);
};

// TMA loads of the block that have not landed. In late mode they do so one at a time, when no warp can run without.
class LoadsInFlight {
  public:
    struct Load {
        const Thread* thread;
        Where where;
        TensorGeometry geometry;
        int coordinate[5];
        uint32_t target;
        uint64_t* barrier;
    };
    void begin_block() { loads_.clear(); }
    void add(Block&, const Load&);
    bool empty() const { return loads_.empty(); }
    void land_one(Block&);
    void finish(Block&);  // throws for a load that no one has waited for

  private:
    std::vector<Load> loads_;
};

// Writes of threads that have returned.
class BulkWrites {
  public:
    void begin_block() { writes_.clear(); }
    void add(BulkWrite&& write) { writes_.push_back(std::move(write)); }
    void finish();

  private:
    std::vector<BulkWrite> writes_;
};

}  // namespace tf::emulator
