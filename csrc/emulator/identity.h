// Which thread runs: all that the inline functions of ptx.h need to know.
#pragma once

namespace tf::emulator {

struct Identity {
    int thread = 0, lane = 0;
    int block_x = 0, block_y = 0, blocks_x = 1, blocks_y = 1;
};

extern Identity* identity;  // of a thread that does not exist where no kernel runs, never null

}  // namespace tf::emulator
