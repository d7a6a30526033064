// Barriers: of the block, by number, and in shared memory.
#include "emulator/block.h"
#include "emulator/operations.h"

namespace tf::emulator {

// ------------------------------------------------------------------------------------------ of the block

bool Block::arrive_at_block_barrier(Warp& warp) {
    NamedBarrier& barrier = barriers_[0];
    barrier.warps |= 1u << warp.index;
    if (barrier.warps != unfinished_warps()) return false;
    wake_warps(barrier.warps & ~(1u << warp.index));
    barrier = NamedBarrier{};
    note_progress();
    return true;
}

void sync_threads(Where where) {
    if (skipped(Operation::sync_threads, where)) return;
    collective(Operation::sync_threads, where, nullptr,
               [](Block& block, Warp& warp) { return block.arrive_at_block_barrier(warp); });
}

bool Block::arrive_at_barrier(Warp& warp, int id, int threads, bool waits) {
    const auto refuse = [&](const std::string& what) {
        fail(warp.operation, warp.where, "barrier " + std::to_string(id) + ": " + what);
    };
    if (id < 1 || id >= kNamedBarriers) refuse("allowed are 1 to 15");
    if (threads < 32 || threads % 32 != 0 || threads > shape_.threads) {
        refuse(std::to_string(threads) + " threads, in a block of " + std::to_string(shape_.threads) +
               "; allowed are multiples of 32");
    }
    NamedBarrier& barrier = barriers_[id];
    if (barrier.warps == 0) barrier.expected = threads;
    if (barrier.expected != threads) {
        refuse("warp " + std::to_string(warp.index) + " counts " + std::to_string(threads) +
               " threads, those before it " + std::to_string(barrier.expected));
    }
    const uint32_t bit = 1u << warp.index;
    if ((barrier.warps & bit) != 0) refuse("warp " + std::to_string(warp.index) + " comes a second time");
    barrier.warps |= bit;
    barrier.arrived += 32;
    if (waits) barrier.waiting |= bit;
    if (barrier.arrived < barrier.expected) return !waits;
    wake_warps(barrier.waiting & ~bit);
    barrier = NamedBarrier{};
    note_progress();
    return true;
}

void named_barrier(Operation operation, int id, int threads, Where where) {
    if (skipped(operation, where)) return;
    int arguments[] = {id, threads};
    collective(operation, where, arguments, [&](Block& block, Warp& warp) {
        for (int lane = 0; lane < 32; ++lane) {
            const int* theirs = &warp.argument<int>(lane);
            if (theirs[0] != id || theirs[1] != threads) {
                block.fail(operation, where, "the lanes of a warp name different barriers or counts");
            }
        }
        const bool waits = operation == Operation::barrier_sync;
        return block.arrive_at_barrier(warp, id, threads, waits) && (waits || block.pause(warp));
    });
}

// ------------------------------------------------------------------------------------------ in shared memory

namespace {

constexpr uint64_t kPattern = 0x6d62617272696572u << 16;  // the upper 48 bits; the lower 16 are the number

constexpr int kMaxBytes = (1 << 20) - 1;  // of a phase, PTX ISA 9.0, "Tracking asynchronous operations"

}  // namespace

void Mbarriers::add(Block& block, uint64_t* address, int count, Where where) {
    shared_address(address, where);
    if (reinterpret_cast<uintptr_t>(address) % 8 != 0) {
        block.fail(Operation::mbarrier_init, where, "the address is not a multiple of 8");
    }
    if (count < 1 || count > kMaxBytes) {
        block.fail(Operation::mbarrier_init, where, "a count of " + std::to_string(count));
    }
    for (const Mbarrier& other : all_) {
        if (other.address == address && *address == (kPattern | static_cast<uint64_t>(&other - all_.data()))) {
            block.fail(Operation::mbarrier_init, where, "this barrier has been initialised before");
        }
    }
    *address = kPattern | static_cast<uint64_t>(all_.size());
    all_.push_back({address, count, count, 0, 0, identity->thread, false, {}});
}

void Mbarriers::fence(int thread) {
    for (Mbarrier& barrier : all_) barrier.fenced |= barrier.thread == thread;
}

Mbarrier& Mbarriers::find(const Block& block, const uint64_t* address, Operation operation, Where where) {
    if (!block.memory().contains(address)) block.fail(operation, where, "no barrier: not in shared memory");
    const uint64_t index = *address ^ kPattern;
    if (index >= all_.size() || all_[index].address != address) {
        block.fail(operation, where,
                   "the barrier at byte " +
                       std::to_string(block.memory().address_of(address) - SharedMemory::kFirstAddress) +
                       " has not been initialised, or was written over");
    }
    return all_[index];
}

void Mbarriers::advance(Block& block, Mbarrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    ++barrier.phase;
    barrier.pending = barrier.count;
    block.note_progress();
    for (Thread* thread : barrier.waiting) block.wake(*thread);
    barrier.waiting.clear();
}

std::string Mbarriers::describe(const Block& block, const uint64_t* address) const {
    std::string text =
        "mbarrier at byte " + std::to_string(block.memory().address_of(address) - SharedMemory::kFirstAddress);
    for (const Mbarrier& barrier : all_) {
        if (barrier.address != address) continue;
        text += ", phase " + std::to_string(barrier.phase) + ": " + std::to_string(barrier.pending) + " of " +
                std::to_string(barrier.count) + " arrivals and " + std::to_string(barrier.bytes) + " bytes to come";
    }
    return text;
}

void mbarrier_init(uint64_t* barrier, int count, Where where) {
    block().mbarriers().add(block(), barrier, count, where);
}

void fence_mbarrier_init(Where where) {
    if (skipped(Operation::fence_mbarrier_init, where)) return;
    block().mbarriers().fence(identity->thread);
}

void mbarrier_arrive(Operation operation, uint64_t* address, int bytes, Where where) {
    if (skipped(operation, where)) return;
    Block& b = block();
    Thread& self = current_thread();
    self.operation = operation;
    self.where = where;
    Mbarrier& barrier = b.mbarriers().find(b, address, operation, where);
    if (bytes < 0 || barrier.bytes + bytes > kMaxBytes) {
        b.fail(operation, where, std::to_string(barrier.bytes + bytes) + " bytes to wait for; allowed are 1048575");
    }
    if (barrier.pending == 0) {
        b.fail(operation, where,
               "more than the " + std::to_string(barrier.count) + " arrivals of a phase, which still waits for " +
                   std::to_string(barrier.bytes) + " bytes");
    }
    barrier.bytes += bytes;
    --barrier.pending;
    b.mbarriers().advance(b, barrier);
    // Not where bytes are announced: the copies that come next are to be as early as they can.
    if (operation == Operation::mbarrier_arrive) b.pause(self);
}

void mbarrier_wait(uint64_t* address, uint32_t parity, Where where) {
    if (skipped(Operation::mbarrier_wait, where)) return;
    Block& b = block();
    Thread& self = current_thread();
    if (parity > 1) b.fail(Operation::mbarrier_wait, where, "a parity of " + std::to_string(parity));
    // Looked at again after each end of a phase: who comes too late waits for the next one, as on the GPU.
    while (true) {
        Mbarrier& barrier = b.mbarriers().find(b, address, Operation::mbarrier_wait, where);
        if ((barrier.phase & 1) != parity) return;
        barrier.waiting.push_back(&self);
        self.operation = Operation::mbarrier_wait;
        self.where = where;
        self.waits_on = address;
        b.suspend(self);
    }
}

// ------------------------------------------------------------------------------------------ in global memory

// Others go first: what they write in the meantime is what an unlucky thread would see.
int load_acquire(const int* address, Where where) {
    Block& b = block();
    Thread& self = current_thread();
    self.operation = Operation::load_acquire;
    self.where = where;
    b.yield(self);
    const int value = *address;
    if (self.polled != address || self.polled_value != value) b.note_progress();
    self.polled = address;
    self.polled_value = value;
    return value;
}

int atomic_add(int* address, int value) {
    const int before = *address;
    *address = before + value;
    block().give_way(current_thread());
    return before;
}

}  // namespace tf::emulator
