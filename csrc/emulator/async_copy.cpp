// cp.async, and the groups of cp.async and of bulk copies.
#include "emulator/async_copy.h"

#include <algorithm>
#include <cstring>

#include "emulator/block.h"
#include "emulator/operations.h"

namespace tf::emulator {

uint32_t shared_address(const void* p, Where where) {
    const SharedMemory& memory = block().memory();
    if (!memory.contains(p)) {
        const auto distance = static_cast<const char*>(p) - memory.data();
        block().fail(Operation::shared_address, where,
                     "a pointer to byte " + std::to_string(distance) + " of " + std::to_string(memory.bytes()) +
                         " bytes of shared memory");
    }
    return memory.address_of(p);
}

// ------------------------------------------------------------------------------------------ cp.async

namespace {

// Plain accesses, not the asynchronous proxy's.
void land(SharedMemory& memory, const CpAsync& copy) {
    char* target = memory.at(copy.target);
    std::memcpy(target, copy.source, static_cast<size_t>(copy.bytes));
    std::memset(target + copy.bytes, 0, static_cast<size_t>(16 - copy.bytes));
}

}  // namespace

void cp_async_16(uint32_t target, const void* source, int bytes, Where where) {
    Block& b = block();
    if (bytes < 0 || bytes > 16) {
        b.fail(Operation::cp_async_16, where, std::to_string(bytes) + " bytes; allowed are 0 to 16");
    }
    if (target % 16 != 0 || !b.memory().contains(target, 16)) {
        b.fail(Operation::cp_async_16, where,
               "a target of " + std::to_string(target) +
                   ", which is no multiple of 16 or not in shared memory (which begins at 1024)");
    }
    if (reinterpret_cast<uintptr_t>(source) % 16 != 0) {
        b.fail(Operation::cp_async_16, where, "the source is no multiple of 16");
    }
    ThreadCopies& copies = current_thread().copies;
    const CpAsync copy{target, static_cast<const char*>(source), bytes, copies.committed, where};
    if (b.is_late()) {
        std::memset(b.memory().at(target), 0xff, 16);
    } else {
        land(b.memory(), copy);
    }
    copies.copies.push_back(copy);
}

void cp_async_commit(Where where) {
    if (!skipped(Operation::cp_async_commit, where)) ++current_thread().copies.committed;
}

void cp_async_wait(int n, Where where) {
    if (skipped(Operation::cp_async_wait, where)) return;
    ThreadCopies& mine = current_thread().copies;
    size_t covered = 0;
    while (covered < mine.copies.size() && mine.copies[covered].group < mine.committed - n) ++covered;
    if (block().is_late()) {
        for (size_t i = 0; i < covered; ++i) land(block().memory(), mine.copies[i]);
    }
    mine.copies.erase(mine.copies.begin(), mine.copies.begin() + static_cast<ptrdiff_t>(covered));
}

// ------------------------------------------------------------------------------------------ a thread's copies

void ThreadCopies::begin_block() {
    copies.clear();
    writes.clear();
    committed = writes_committed = 0;
}

void ThreadCopies::finish(Block& block, const Thread& thread) {
    const auto refuse = [&](Operation operation, Where where, bool was_committed) {
        block.fail(thread, operation, where,
                   std::string("the thread returns, and ") +
                       (was_committed ? "has never waited for this copy" : "has never committed this copy"));
    };
    if (!copies.empty()) refuse(Operation::cp_async_16, copies[0].where, copies[0].group < committed);
    for (BulkWrite& write : writes) {
        if (!write.waited) refuse(write.operation, write.where, write.group < writes_committed);
        if (!write.written) block.bulk_writes().add(std::move(write));
    }
    writes.clear();
}

}  // namespace tf::emulator
