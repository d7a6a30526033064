// Buffers between warps that fill them and warps that use them: rings of mbarriers, and a mailbox for jobs.
//
// Each buffer has two barriers. `full` completes when it is filled: by the bytes of TMA copies that its filler
// announced, or by arrivals of warps. `empty` completes when all users have arrived. Both sides count rounds by parity:
// the user waits for the round it is in, the filler for the one before, which on a fresh barrier counts as over. No
// side can be two rounds ahead of the other, so one bit is enough.
#pragma once

#include "cuda/device.cuh"

namespace tf {
namespace cuda {

// Where a thread stands in a ring of buffers; every thread keeps its own.
template <int kStages>
struct RingPosition {
    int stage = 0;
    uint32_t parity = 0;

    TF_DEVICE void advance() {
        stage = stage + 1 == kStages ? 0 : stage + 1;
        parity ^= stage == 0 ? 1u : 0u;
    }
    TF_DEVICE RingPosition previous() const {
        return {stage == 0 ? kStages - 1 : stage - 1, parity ^ (stage == 0 ? 1u : 0u)};
    }
};

template <int kStages>
struct RingBarriers {
    uint64_t full[kStages], empty[kStages];

    TF_DEVICE void init(int fillers, int users) {
        for (int i = 0; i < kStages; ++i) {
            ptx::mbarrier_init(&full[i], fillers);
            ptx::mbarrier_init(&empty[i], users);
        }
    }
    TF_DEVICE void wait_full(const RingPosition<kStages>& at) { ptx::mbarrier_wait(&full[at.stage], at.parity); }
    TF_DEVICE void wait_empty(const RingPosition<kStages>& at) { ptx::mbarrier_wait(&empty[at.stage], at.parity ^ 1); }
    // By all lanes of a warp, when the warp is done with a buffer; the barrier counts warps.
    TF_DEVICE void release(const RingPosition<kStages>& at) {
        if (ptx::lane() == 0) ptx::mbarrier_arrive(&empty[at.stage]);
    }
};

// A block that stays on its multiprocessor takes job after job: one thread draws them and finds out what they are, and
// warps read that. The thread may be one job ahead.
template <class Job>
struct Mailbox {
    RingBarriers<2> barriers;
    Job jobs[2];

    // Who has seen `count` jobs stands here.
    static TF_DEVICE RingPosition<2> after(int count) { return {count & 1, static_cast<uint32_t>(count >> 1 & 1)}; }

    TF_DEVICE void init(int reading_warps) { barriers.init(1, reading_warps); }

    // By the one thread that draws: waits for a place for its next job, writes it there, and posts it.
    TF_DEVICE Job& place(int count) {
        barriers.wait_empty(after(count));
        return jobs[count & 1];
    }
    TF_DEVICE void post(int count) { ptx::mbarrier_arrive(&barriers.full[count & 1]); }

    // By all lanes of each reading warp: a job may be read until it is released.
    TF_DEVICE const Job& take(int count) {
        barriers.wait_full(after(count));
        return jobs[count & 1];
    }
    TF_DEVICE void release(int count) {
        ptx::sync_warp();
        barriers.release(after(count));
    }
};

}  // namespace cuda
}  // namespace tf
