// Four warps in a row and their matrix products in flight.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "emulator/operations.h"
#include "emulator/sites.h"

namespace tf::emulator {

class Block;
struct Warp;

// 16 rows of D, those of one warp, while products in flight write them. The lanes' own variables are NaN meanwhile.
struct Accumulator {
    int columns = 0;
    bool in_flight = false;
    int64_t last = 0;  // the number of the last product that writes it
    float* lanes[32] = {};
    // (16, columns). Out of flight: as the lanes' variables were at the end of the last product or the last
    // wgmma_fence.
    std::vector<float> values;
};

// Registers of A that a warp has given to a product, and what they held then or at the last wgmma_fence after it.
struct Registers {
    const uint32_t* lanes[32];
    uint32_t values[32][4];
};

// A product, issued by up to four warps so far. It happens when all four have issued it, and one of them waits for it
// or, in early mode, at once.
struct Product {
    WgmmaArguments arguments;  // of the first lane that came; d and registers are each lane's own
    Where where;
    uint32_t warps = 0;  // that have issued it, by number in the warpgroup
    Accumulator* accumulators[4] = {};
    Registers registers[4];
};

struct WgmmaScratch {
    float a[64 * 16], b[16 * 256];
};

// wgmma_product.cpp: reads the operands and adds the product to the accumulators.
void multiply(Block&, Product&, WgmmaScratch&);

class Warpgroup {
  public:
    void begin_block();
    void finish(const Block&) const;                    // throws for a product that not all warps have issued
    void finish_warp(const Block&, const Warp&) const;  // throws for those that the warp has not waited for

    // Registers that products take must not have been written since the last one.
    void fence(int warp);
    void issue(Block&, Warp&, Where);
    void commit(int warp);
    // False if the warp has to stop, until other warps have issued what it waits for.
    bool wait(Block&, Warp&, int n);

  private:
    struct State {
        int64_t issued = 0, published = 0;  // numbers of products
        std::deque<int64_t> groups;         // how many had been issued when each group was committed; oldest first
        bool fenced = false;
        int64_t waits_for = -1;  // so many to be issued by all
        Warp* warp = nullptr;
        std::deque<Accumulator> accumulators;  // in flight, and a few that were
        std::deque<Registers> registers;       // the same
    };

    Product& product(int64_t number) { return products_[static_cast<size_t>(number - first_)]; }
    int64_t issued_by_all() const;
    Accumulator& take_accumulator(const Block&, const Warp&, bool accumulate, int columns, Where);
    void take_registers(const Block&, const Warp&, Product&);
    static void check_registers(const Block&, const Product&, int warp);
    void execute_until(Block&, int64_t end);
    void end_wait(Block&, State&, int64_t end);

    std::deque<Product> products_;  // from number first_ on: those that some warp has not seen the end of
    int64_t first_ = 0, executed_ = 0;
    State warps_[4];
    WgmmaScratch scratch_;
};

}  // namespace tf::emulator
