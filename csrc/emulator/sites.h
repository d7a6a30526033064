// Where in a kernel something is called, and the calls that a mutation test removes one at a time.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace tf::emulator {

// A line of a kernel. As the last default argument of a function, `Where::here()` is the line that calls it.
struct Where {
    const char* file;
    int line;
    static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};
// Several object files may each have the same file's name.
inline bool operator==(const Where& a, const Where& b) {
    return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

enum class Operation : uint8_t {
    none,
    // By a warp together.
    shuffle_xor,
    shuffle,
    any,
    all,
    warp,
    elect_one,
    ldmatrix,
    ldmatrix_transposed,
    mma,
    increase_registers,
    decrease_registers,
    wgmma,
    // What can be removed, from here on: by a warp together ...
    sync_warp,
    wgmma_fence,
    wgmma_commit,
    wgmma_wait,
    sync_threads,
    barrier_sync,
    barrier_arrive,
    // ... and by one thread.
    cp_async_commit,
    cp_async_wait,
    fence_mbarrier_init,
    mbarrier_arrive,
    mbarrier_arrive_expect,
    mbarrier_wait,
    bulk_commit,
    bulk_wait_read,
    bulk_wait,
    fence_async_proxy,
    // By one thread, and never removed.
    cp_async_16,
    mbarrier_init,
    prefetch_tensor_map,
    tma_load,
    tma_store,
    bulk_reduce_add,
    load_acquire,
    shared_address,
    matrix_descriptor,
};
const char* name_of(Operation);
std::string to_string(const Where&);  // "cuda/forward.cuh:12"

struct Synchronisation {
    std::string operation, file;
    int line;
    uint64_t count;  // calls by threads, since the process began
};

// Every synchronisation that a kernel has executed in this process.
std::vector<Synchronisation> synchronisations();
// Makes the synchronisations of one line do nothing, in launches to come: the fault that a missing call is. `file` is
// the end of a path. enable_all() takes all of these back.
void disable(const std::string& file, int line);
void enable_all();

// Counts a call; true where it is to do nothing.
bool skipped(Operation, Where);

}  // namespace tf::emulator
