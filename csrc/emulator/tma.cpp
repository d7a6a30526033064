// TMA: boxes of tensors to and from shared memory, and reductions from there.
#include <algorithm>
#include <cstring>

#include "emulator/block.h"
#include "emulator/operations.h"
#include "emulator/tensor_map.h"

namespace tf::emulator {

namespace {

// Calls visit(offset in shared memory, address in global memory, first byte, end byte) for each 16 bytes of a box.
// Bytes outside of the tensor are outside of [first, end), which may be empty.
template <class Visit>
void for_each_chunk(const TensorGeometry& g, const int* coordinate, Visit visit) {
    const int64_t element = size_of(g.dtype);
    const int64_t row_bytes = g.box[0] * element;
    const int64_t row_start = coordinate[0] * element, row_end = static_cast<int64_t>(g.size[0]) * element;
    const int rows = static_cast<int>(box_bytes(g) / row_bytes);
    for (int row = 0; row < rows; ++row) {
        int64_t global = row_start;
        bool inside = true;
        for (int i = 1, rest = row; i < g.rank; ++i) {
            const int64_t at = int64_t{coordinate[i]} + rest % static_cast<int>(g.box[i]);
            rest /= static_cast<int>(g.box[i]);
            inside &= at >= 0 && at < static_cast<int64_t>(g.size[i]);
            global += at * static_cast<int64_t>(g.stride[i - 1]);
        }
        for (int64_t byte = 0; byte < row_bytes; byte += 16) {
            const int64_t first = std::clamp<int64_t>(-(row_start + byte), 0, 16);
            const int64_t end = inside ? std::clamp<int64_t>(row_end - (row_start + byte), first, 16) : first;
            const int64_t chunk = g.swizzle_128 ? (byte / 16 ^ row % 8) * 16 : byte;
            char* address =
                reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(g.data) + static_cast<uintptr_t>(global + byte));
            visit(static_cast<uint32_t>(row * row_bytes + chunk), address, first, end);
        }
    }
}

TensorGeometry geometry_of(const TensorMap* map, Operation operation, Where where) {
    TensorGeometry geometry;
    if (!decode_tensor_map(map, &geometry)) block().fail(operation, where, "not a tensor map");
    return geometry;
}

// The shared side of a box copy.
uint32_t check_tile(const TensorGeometry& g, const void* tile, int rank, Operation operation, Where where) {
    Block& b = block();
    const auto refuse = [&](const std::string& what) { b.fail(operation, where, what); };
    if (rank != g.rank) {
        refuse(std::to_string(rank) + " coordinates for a tensor map of rank " + std::to_string(g.rank));
    }
    const uint32_t address = shared_address(tile, where);
    const uint32_t alignment = g.swizzle_128 ? 1024 : 128;
    if (address % alignment != 0) {
        refuse("the tile is at byte " + std::to_string(address - SharedMemory::kFirstAddress) +
               "; allowed are multiples of " + std::to_string(alignment));
    }
    if (g.swizzle_128 && g.box[0] * size_of(g.dtype) != 128) refuse("rows of other than 128 bytes, but swizzled");
    if (!b.memory().contains(address, box_bytes(g))) refuse("the tile reaches beyond the end of shared memory");
    return address;
}

}  // namespace

void prefetch_tensor_map(const TensorMap* map, Where where) { geometry_of(map, Operation::prefetch_tensor_map, where); }

// ------------------------------------------------------------------------------------------ loads

namespace {

void land(Block& block, const LoadsInFlight::Load& load) {
    SharedMemory& memory = block.memory();
    char* tile = memory.at(load.target);
    for_each_chunk(load.geometry, load.coordinate, [&](uint32_t offset, const char* from, int64_t first, int64_t end) {
        char* to = tile + offset;
        if (end - first < 16) std::memset(to, 0, 16);
        if (end > first) std::memcpy(to + first, from + first, static_cast<size_t>(end - first));
    });
    const int bytes = box_bytes(load.geometry);
    memory.publish(load.target, bytes);
    Mbarrier& barrier = block.mbarriers().find(block, load.barrier, Operation::tma_load, load.where);
    barrier.bytes -= bytes;
    block.mbarriers().advance(block, barrier);
}

}  // namespace

void tma_load(void* target, const TensorMap* map, uint64_t* barrier, const int* coordinate, int rank, Where where) {
    constexpr Operation kOperation = Operation::tma_load;
    Block& b = block();
    LoadsInFlight::Load load{&current_thread(), where, geometry_of(map, kOperation, where), {}, 0, barrier};
    std::copy(coordinate, coordinate + rank, load.coordinate);
    load.target = check_tile(load.geometry, target, rank, kOperation, where);
    if (!b.mbarriers().find(b, barrier, kOperation, where).fenced) {
        b.fail(kOperation, where, "the thread that initialised the barrier has not called fence_mbarrier_init");
    }
    b.loads().add(b, load);
}

void LoadsInFlight::add(Block& block, const Load& load) {
    if (!block.is_late()) return land(block, load);
    const int bytes = box_bytes(load.geometry);
    std::memset(block.memory().at(load.target), 0xff, static_cast<size_t>(bytes));
    block.memory().publish(load.target, bytes);
    loads_.push_back(load);
}

// One that somebody waits for, so that what nobody waits for stays in flight to the end.
void LoadsInFlight::land_one(Block& block) {
    std::vector<size_t> awaited;
    for (size_t i = 0; i < loads_.size(); ++i) {
        const Load& load = loads_[i];
        const Mbarrier& barrier = block.mbarriers().find(block, load.barrier, Operation::tma_load, load.where);
        if (!barrier.waiting.empty()) awaited.push_back(i);
    }
    const size_t count = awaited.empty() ? loads_.size() : awaited.size();
    const auto drawn = static_cast<size_t>(block.random().below(static_cast<int>(count)));
    const auto chosen = loads_.begin() + static_cast<ptrdiff_t>(awaited.empty() ? drawn : awaited[drawn]);
    const Load load = *chosen;
    loads_.erase(chosen);
    land(block, load);
}

void LoadsInFlight::finish(Block& block) {
    if (loads_.empty()) return;
    block.fail(*loads_[0].thread, Operation::tma_load, loads_[0].where,
               "the block ends before this copy has landed: nobody has waited for it");
}

// ------------------------------------------------------------------------------------------ stores

namespace {

void read(Block& block, BulkWrite& write) {
    write.read = true;
    write.data.assign(static_cast<size_t>(write.bytes), '\0');
    const auto copy = [&](uint32_t offset, int64_t first, int64_t end) {
        const uint32_t from = write.source + offset + static_cast<uint32_t>(first);
        const int bytes = static_cast<int>(end - first);
        block.check_proxy(from, bytes, write.where, write.operation);
        std::memcpy(write.data.data() + offset + first, block.memory().at(from), static_cast<size_t>(bytes));
    };
    if (write.target != nullptr) return copy(0, 0, write.bytes);
    // What lies outside of the tensor is not looked at: it may be what no one has written.
    for_each_chunk(write.geometry, write.coordinate, [&](uint32_t offset, const char*, int64_t first, int64_t end) {
        if (end > first) copy(offset, first, end);
    });
}

void write_global(BulkWrite& write) {
    write.written = true;
    if (write.target != nullptr) {
        for (int i = 0; i < write.bytes / 4; ++i) {
            float value;
            std::memcpy(&value, write.data.data() + 4 * i, 4);
            write.target[i] += value;
        }
        return;
    }
    for_each_chunk(write.geometry, write.coordinate, [&](uint32_t offset, char* to, int64_t first, int64_t end) {
        if (end > first) {
            std::memcpy(to + first, write.data.data() + offset + first, static_cast<size_t>(end - first));
        }
    });
}

void issue(Block& block, BulkWrite&& write) {
    ThreadCopies& mine = current_thread().copies;
    write.group = mine.writes_committed;
    if (!block.is_late()) {
        read(block, write);
        write_global(write);
    }
    mine.writes.push_back(std::move(write));
}

}  // namespace

void tma_store(const TensorMap* map, const void* source, const int* coordinate, int rank, Where where) {
    BulkWrite write{};
    write.operation = Operation::tma_store;
    write.where = where;
    write.geometry = geometry_of(map, write.operation, where);
    write.source = check_tile(write.geometry, source, rank, write.operation, where);
    write.bytes = box_bytes(write.geometry);
    std::copy(coordinate, coordinate + rank, write.coordinate);
    issue(block(), std::move(write));
}

void bulk_reduce_add(float* target, const float* source, int bytes, Where where) {
    Block& b = block();
    BulkWrite write{};
    write.operation = Operation::bulk_reduce_add;
    write.where = where;
    write.source = shared_address(source, where);
    write.bytes = bytes;
    write.target = target;
    if (write.source % 16 != 0 || reinterpret_cast<uintptr_t>(target) % 16 != 0 || bytes < 16 || bytes % 16 != 0) {
        b.fail(write.operation, where,
               std::to_string(bytes) + " bytes from byte " +
                   std::to_string(write.source - SharedMemory::kFirstAddress) +
                   ": these and the target's address must be multiples of 16");
    }
    if (!b.memory().contains(write.source, bytes)) {
        b.fail(write.operation, where, "the source reaches beyond the end of shared memory");
    }
    issue(b, std::move(write));
}

void bulk_commit(Where where) {
    if (!skipped(Operation::bulk_commit, where)) ++current_thread().copies.writes_committed;
}

void bulk_wait(Operation operation, int n, Where where) {
    if (skipped(operation, where)) return;
    Block& b = block();
    ThreadCopies& mine = current_thread().copies;
    for (BulkWrite& write : mine.writes) {
        if (write.group >= mine.writes_committed - n) break;
        write.waited = true;
        if (!write.read) read(b, write);
        if (operation == Operation::bulk_wait && !write.written) write_global(write);
    }
    mine.writes.erase(std::remove_if(mine.writes.begin(), mine.writes.end(),
                                     [](const BulkWrite& write) { return write.waited && write.written; }),
                      mine.writes.end());
}

void BulkWrites::finish() {
    for (BulkWrite& write : writes_) write_global(write);
}

void fence_async_proxy(Where where) {
    if (!skipped(Operation::fence_async_proxy, where)) block().fence_async_proxy(current_thread());
}

}  // namespace tf::emulator
