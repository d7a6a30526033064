#include "emulator/sites.h"

#include <cstring>
#include <deque>

#include "emulator/launch.h"

namespace tf::emulator {

namespace {

struct Site {
    Operation operation;
    Where where;
    uint64_t count = 0;
    bool disabled = false;
};

// One line may be known by several pointers to the same file name, one for each object file that has it.
struct Alias {
    Operation operation = Operation::none;
    Where where{nullptr, 0};
    Site* site = nullptr;
};

constexpr size_t kSlots = 4096;

Alias aliases[kSlots];  // open addressing; a kernel has dozens of sites, so that it never fills
std::deque<Site> sites;
std::vector<std::pair<std::string, int>> disabled_lines;

bool ends_with(const char* text, const std::string& end) {
    const size_t length = std::strlen(text);
    return length >= end.size() && std::memcmp(text + length - end.size(), end.data(), end.size()) == 0;
}

bool is_disabled(const Where& where) {
    for (const auto& [file, line] : disabled_lines) {
        if (line == where.line && ends_with(where.file, file)) return true;
    }
    return false;
}

Site& canonical(Operation operation, Where where) {
    for (Site& site : sites) {
        if (site.operation == operation && site.where == where) return site;
    }
    sites.push_back({operation, where, 0, is_disabled(where)});
    return sites.back();
}

Site& find(Operation operation, Where where) {
    size_t slot = reinterpret_cast<uintptr_t>(where.file) / 16 + static_cast<size_t>(where.line) * 61 +
                  static_cast<size_t>(operation) * 1021;
    for (size_t tries = 0; tries < kSlots; ++tries, ++slot) {
        Alias& alias = aliases[slot % kSlots];
        if (alias.site == nullptr) alias = {operation, where, &canonical(operation, where)};
        if (alias.operation == operation && alias.where.file == where.file && alias.where.line == where.line) {
            return *alias.site;
        }
    }
    return canonical(operation, where);
}

}  // namespace

const char* name_of(Operation operation) {
    static const char* const kNames[] = {"nothing",
                                         "shuffle_xor",
                                         "shuffle",
                                         "any",
                                         "all",
                                         "warp",
                                         "elect_one",
                                         "ldmatrix",
                                         "ldmatrix_transposed",
                                         "mma",
                                         "increase_registers",
                                         "decrease_registers",
                                         "wgmma",
                                         "sync_warp",
                                         "wgmma_fence",
                                         "wgmma_commit",
                                         "wgmma_wait",
                                         "sync_threads",
                                         "barrier_sync",
                                         "barrier_arrive",
                                         "cp_async_commit",
                                         "cp_async_wait",
                                         "fence_mbarrier_init",
                                         "mbarrier_arrive",
                                         "mbarrier_arrive_expect",
                                         "mbarrier_wait",
                                         "bulk_commit",
                                         "bulk_wait_read",
                                         "bulk_wait",
                                         "fence_async_proxy",
                                         "cp_async_16",
                                         "mbarrier_init",
                                         "prefetch_tensor_map",
                                         "tma_load",
                                         "tma_store",
                                         "bulk_reduce_add",
                                         "load_acquire",
                                         "shared_address",
                                         "matrix_descriptor"};
    static_assert(sizeof(kNames) / sizeof(kNames[0]) == static_cast<size_t>(Operation::matrix_descriptor) + 1);
    return kNames[static_cast<size_t>(operation)];
}

std::string to_string(const Where& where) {
    if (where.file == nullptr) return "?";
    const std::string file = where.file;  // the last folder and the name tell enough
    const size_t slash = file.rfind('/');
    const size_t before = slash == std::string::npos || slash == 0 ? std::string::npos : file.rfind('/', slash - 1);
    return (before == std::string::npos ? file : file.substr(before + 1)) + ":" + std::to_string(where.line);
}

std::vector<Synchronisation> synchronisations() {
    const LaunchLock lock;
    std::vector<Synchronisation> all;
    for (const Site& site : sites) {
        all.push_back({name_of(site.operation), site.where.file, site.where.line, site.count});
    }
    return all;
}

void disable(const std::string& file, int line) {
    const LaunchLock lock;
    disabled_lines.emplace_back(file, line);
    for (Site& site : sites) site.disabled = is_disabled(site.where);
}

void enable_all() {
    const LaunchLock lock;
    disabled_lines.clear();
    for (Site& site : sites) site.disabled = false;
}

bool skipped(Operation operation, Where where) {
    Site& site = find(operation, where);
    ++site.count;
    return site.disabled;
}

}  // namespace tf::emulator
