// Barriers in shared memory that count arrivals and bytes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "emulator/sites.h"

namespace tf::emulator {

class Block;
struct Thread;

struct Mbarrier {
    const uint64_t* address;
    int count;            // arrivals of each phase
    int pending;          // of them still to come
    int64_t bytes = 0;    // announced and not here yet; below 0 while data has come before its announcement
    uint32_t phase = 0;   // how many have ended
    int thread;           // that initialised it
    bool fenced = false;  // visible to the asynchronous proxy
    std::vector<Thread*> waiting;
};

// What shared memory holds is a number in this table, and a pattern by which anything else there is noticed.
class Mbarriers {
  public:
    void begin_block() { all_.clear(); }
    void add(Block&, uint64_t* address, int count, Where);
    void fence(int thread);
    Mbarrier& find(const Block&, const uint64_t* address, Operation, Where);
    std::string describe(const Block&, const uint64_t* address) const;
    // Ends the phase if nothing is left to come, and wakes those who waited for it.
    void advance(Block&, Mbarrier&);

  private:
    std::vector<Mbarrier> all_;
};

}  // namespace tf::emulator
