// Kernels with a fault each, for the emulator alone: number 0 says whether it is there. Without it a kernel must give
// what it should under every schedule; with it the result must differ, or an Error come, under some (or every) one.
#if defined(TF_EMULATED)

#include "cuda/checks_launch.cuh"

namespace tf {
namespace cuda {
namespace {

TF_DEVICE bool is_faulty(const CheckArguments& a) { return a.number[0] != 0; }

// Those below that move a tile: 8192 bytes from in 0 or by the map, to out 0.
constexpr int kTileBytes = 8192;
using Tile = CheckShape<128, 2 * kTileBytes + 1024>;

template <class K>
void store_tile(const CheckArguments& a, const char* tile) {
    copy_words<K>(output<uint32_t>(a, 0), reinterpret_cast<const uint32_t*>(tile), kTileBytes);
}

// ------------------------------------------------------------------------------------------ shared memory

// Nobody waits for the others' writes.
struct NoBarrier : Tile {
    static void run(const CheckArguments& a, char* shared) {
        copy_words<NoBarrier>(words(shared), input<uint32_t>(a, 0), kTileBytes);
        if (!is_faulty(a)) ptx::sync_threads();
        const int thread = kThreads - 1 - ptx::thread();
        for (int i = thread; i < kTileBytes / 4; i += kThreads) output<uint32_t>(a, 0)[i] = words(shared)[i];
    }
};

// A buffer is written anew before all have read it.
struct NoBarrierBeforeReuse : Tile {
    static void run(const CheckArguments& a, char* shared) {
        for (int half = 0; half < 2; ++half) {
            const int first = half * kTileBytes / 8;
            copy_words<NoBarrierBeforeReuse>(words(shared), input<uint32_t>(a, 0) + first, kTileBytes / 2);
            ptx::sync_threads();
            const int thread = kThreads - 1 - ptx::thread();
            for (int i = thread; i < kTileBytes / 8; i += kThreads) {
                output<uint32_t>(a, 0)[first + i] = words(shared)[i];
            }
            if (!is_faulty(a)) ptx::sync_threads();
        }
    }
};

// ------------------------------------------------------------------------------------------ cp.async

template <bool kWait, bool kBarrier>
struct CpAsyncFault : Tile {
    static void run(const CheckArguments& a, char* shared) {
        const int own = ptx::thread(), read = kBarrier ? kThreads - 1 - own : own;
        for (int i = own; i < kTileBytes / 16; i += kThreads) {
            ptx::cp_async_16(ptx::shared_address(shared) + 16 * i, input<Vector16>(a, 0) + i, 16);
        }
        ptx::cp_async_commit();
        if (!kWait || !is_faulty(a)) ptx::cp_async_wait<0>();
        if (kBarrier && !is_faulty(a)) ptx::sync_threads();
        for (int i = read; i < kTileBytes / 16; i += kThreads) {
            output<Vector16>(a, 0)[i] = reinterpret_cast<const Vector16*>(shared)[i];
        }
    }
};

// The wait leaves one group too many on its way.
struct CpAsyncWaitsTooFew : Tile {
    static void run(const CheckArguments& a, char* shared) {
        const int thread = ptx::thread();
        for (int i = thread; i < kTileBytes / 16; i += kThreads) {
            ptx::cp_async_16(ptx::shared_address(shared) + 16 * i, input<Vector16>(a, 0) + i, 16);
            ptx::cp_async_commit();
        }
        if (is_faulty(a)) {
            ptx::cp_async_wait<1>();
        } else {
            ptx::cp_async_wait<0>();
        }
        for (int i = thread; i < kTileBytes / 16; i += kThreads) {
            output<Vector16>(a, 0)[i] = reinterpret_cast<const Vector16*>(shared)[i];
        }
    }
};

// ------------------------------------------------------------------------------------------ TMA

struct TmaTile : Tile {
    static uint64_t* barrier(char* shared) { return reinterpret_cast<uint64_t*>(shared + 2 * kTileBytes); }
    static void init(char* shared, int count, bool fenced) {
        if (ptx::thread() == 0) {
            ptx::mbarrier_init(barrier(shared), count);
            ptx::mbarrier_init(barrier(shared) + 1, kThreads);
            if (fenced) ptx::fence_mbarrier_init();
        }
        ptx::sync_threads();
    }
};

// The tile is read before the barrier's phase has ended.
struct TmaNoWait : TmaTile {
    static void run(const CheckArguments& a, char* shared) {
        init(shared, 1, true);
        if (ptx::thread() == 0) {
            ptx::mbarrier_arrive_expect(barrier(shared), kTileBytes);
            ptx::tma_load(shared, &a.map, barrier(shared), 0, 0, 0, 0);
        }
        if (!is_faulty(a)) ptx::mbarrier_wait(barrier(shared), 0);
        store_tile<TmaNoWait>(a, shared);
    }
};

// One byte more or less is announced than comes: a phase that never ends, or one that ends too soon.
template <int kMore>
struct TmaWrongBytes : TmaTile {
    static void run(const CheckArguments& a, char* shared) {
        init(shared, 1, true);
        if (ptx::thread() == 0) {
            ptx::mbarrier_arrive_expect(barrier(shared), kTileBytes + (is_faulty(a) ? kMore : 0));
            ptx::tma_load(shared, &a.map, barrier(shared), 0, 0, 0, 0);
        }
        ptx::mbarrier_wait(barrier(shared), 0);
        store_tile<TmaWrongBytes>(a, shared);
    }
};

struct NoFenceMbarrierInit : TmaTile {
    static void run(const CheckArguments& a, char* shared) {
        init(shared, 1, !is_faulty(a));
        if (ptx::thread() == 0) {
            ptx::mbarrier_arrive_expect(barrier(shared), kTileBytes);
            ptx::tma_load(shared, &a.map, barrier(shared), 0, 0, 0, 0);
        }
        ptx::mbarrier_wait(barrier(shared), 0);
        store_tile<NoFenceMbarrierInit>(a, shared);
    }
};

// A second tile comes into the buffer before all have read the first.
struct TmaNoEmptyBarrier : TmaTile {
    static void run(const CheckArguments& a, char* shared) {
        init(shared, 1, true);
        uint64_t *full = barrier(shared), *empty = full + 1;
        for (int round = 0; round < 2; ++round) {
            if (ptx::thread() == 0) {
                if (!is_faulty(a)) ptx::mbarrier_wait(empty, round ^ 1);
                ptx::mbarrier_arrive_expect(full, kTileBytes);
                ptx::tma_load(shared, &a.map, full, 0, 64 * round, 0, 0);
            }
            ptx::mbarrier_wait(full, round);
            uint32_t* out = output<uint32_t>(a, 0) + round * kTileBytes / 4;
            const int thread = kThreads - 1 - ptx::thread();
            for (int i = thread; i < kTileBytes / 4; i += kThreads) out[i] = words(shared)[i];
            ptx::mbarrier_arrive(empty);
        }
    }
};

// What plain stores have written goes out without a fence.
struct TmaStoreNoFence : Tile {
    static void run(const CheckArguments& a, char* shared) {
        copy_words<TmaStoreNoFence>(words(shared), input<uint32_t>(a, 0), kTileBytes);
        if (!is_faulty(a)) ptx::fence_async_proxy();
        ptx::sync_threads();
        if (ptx::thread() == 0) {
            ptx::tma_store(&a.map, shared, 0, 0, 0, 0);
            ptx::bulk_commit();
            ptx::bulk_wait<0>();
        }
    }
};
struct TmaStoreNoBarrier : Tile {
    static void run(const CheckArguments& a, char* shared) {
        copy_words<TmaStoreNoBarrier>(words(shared), input<uint32_t>(a, 0), kTileBytes);
        ptx::fence_async_proxy();
        if (!is_faulty(a)) ptx::sync_threads();
        if (ptx::thread() == 0) {
            ptx::tma_store(&a.map, shared, 0, 0, 0, 0);
            ptx::bulk_commit();
            ptx::bulk_wait<0>();
        }
    }
};

// The source of a store is written anew before it has been read; number 1: nothing is committed, so no wait waits.
struct TmaStoreNoWait : Tile {
    static void run(const CheckArguments& a, char* shared) {
        copy_words<TmaStoreNoWait>(words(shared), input<uint32_t>(a, 0), kTileBytes);
        ptx::fence_async_proxy();
        ptx::sync_threads();
        if (ptx::thread() == 0) {
            ptx::tma_store(&a.map, shared, 0, 0, 0, 0);
            if (!is_faulty(a) || a.number[1] == 0) ptx::bulk_commit();
            if (!is_faulty(a) || a.number[1] != 0) ptx::bulk_wait_read<0>();
        }
        ptx::sync_threads();
        fill_words<TmaStoreNoWait>(words(shared), 0, kTileBytes);
        if (ptx::thread() == 0) ptx::bulk_wait<0>();
    }
};

struct BulkReduceNoFence : Tile {
    static void run(const CheckArguments& a, char* shared) {
        copy_words<BulkReduceNoFence>(words(shared), input<uint32_t>(a, 0), kTileBytes);
        if (!is_faulty(a)) ptx::fence_async_proxy();
        ptx::sync_threads();
        if (ptx::thread() == 0) {
            ptx::bulk_reduce_add(output<float>(a, 0), reinterpret_cast<const float*>(shared), kTileBytes);
            ptx::bulk_commit();
            ptx::bulk_wait<0>();
        }
    }
};

// ------------------------------------------------------------------------------------------ wgmma

enum class WgmmaFault { no_wait, no_commit, overwritten_a, overwritten_shared, no_proxy_fence, no_fence, used_d };

// d (thread, 32) = 1 + A B: A (64, 16) in registers (in 1: thread, 4), B (64, 16) K-major in shared memory (in 0).
// used_d: twice that, doubled before the wait or after.
template <WgmmaFault kFault>
struct WgmmaFaulty : Tile {
    static bool has(const CheckArguments& a, WgmmaFault fault) { return kFault == fault && is_faulty(a); }
    static void run(const CheckArguments& a, char* shared) {
        const int thread = ptx::thread();
        copy_words<WgmmaFaulty>(words(shared), input<uint32_t>(a, 0), kTileBytes);
        if (!has(a, WgmmaFault::no_proxy_fence)) ptx::fence_async_proxy();
        ptx::sync_threads();
        uint32_t left[4];
        for (int i = 0; i < 4; ++i) left[i] = input<uint32_t>(a, 1)[4 * thread + i];
        float d[32], copy[32];
        for (float& x : d) x = 1.0f;
        if (!has(a, WgmmaFault::no_fence)) ptx::wgmma_fence();
        ptx::wgmma<Bfloat16, 64, false>(d, left, ptx::matrix_descriptor(shared, 16, 1024), true);
        if (!has(a, WgmmaFault::no_commit)) ptx::wgmma_commit();
        if (has(a, WgmmaFault::no_wait)) {
            for (int i = 0; i < 32; ++i) copy[i] = d[i];
        }
        if (has(a, WgmmaFault::overwritten_a)) {
            for (uint32_t& x : left) x = 0;
        }
        if (has(a, WgmmaFault::overwritten_shared)) {
            fill_words<WgmmaFaulty>(words(shared), 0, kTileBytes);
            ptx::fence_async_proxy();
            ptx::sync_threads();
        }
        if (has(a, WgmmaFault::used_d)) {
            for (float& x : d) x *= 2.0f;
        }
        ptx::wgmma_wait<0>();
        if (kFault == WgmmaFault::used_d && !is_faulty(a)) {
            for (float& x : d) x *= 2.0f;
        }
        if (!has(a, WgmmaFault::no_wait)) {
            for (int i = 0; i < 32; ++i) copy[i] = d[i];
        }
        for (int i = 0; i < 32; ++i) output<float>(a, 0)[thread * 32 + i] = copy[i];
    }
};

// ------------------------------------------------------------------------------------------ what is reported

// One arrival too few, at an mbarrier or (number 1) at a named barrier or at that of the block.
struct Deadlock : TmaTile {
    static void run(const CheckArguments& a, char* shared) {
        init(shared, kThreads, true);
        const bool comes = !is_faulty(a) || ptx::thread() / 32 != 2;
        if (a.number[1] == 0) {
            if (comes) ptx::mbarrier_arrive(barrier(shared));
            ptx::mbarrier_wait(barrier(shared), 0);
        } else if (a.number[1] == 1) {
            if (comes) ptx::barrier_sync(3, kThreads);
        } else {
            if (comes) ptx::sync_threads();
            ptx::barrier_sync(3, kThreads);
        }
        output<int>(a, 0)[ptx::thread()] = 7;
    }
};

// Half a warp does not take part; number 1: in what.
struct Divergent : TmaTile {
    static void run(const CheckArguments& a, char* shared) {
        int value = ptx::lane();
        for (int i = ptx::thread(); i < 256; i += kThreads) words(shared)[i] = 7;
        ptx::sync_threads();
        if (!is_faulty(a) || ptx::lane() < 16) {
            uint32_t r[4] = {0, 0, 0, 0};
            float d[4] = {0, 0, 0, 0};
            switch (a.number[1]) {
                case 0:
                    value = ptx::shuffle_xor(value, 1);
                    break;
                case 1:
                    value = ptx::any(value != 0);
                    break;
                case 2:
                    ptx::sync_warp();
                    break;
                case 3:
                    ptx::ldmatrix(r, ptx::shared_address(shared) + 16 * ptx::lane());
                    break;
                case 4:
                    ptx::mma<Float16>(d, r, 0, 0);
                    break;
                case 5:
                    value = ptx::elect_one();
                    break;
                default:
                    ptx::wgmma_fence();
                    break;
            }
        }
        output<int>(a, 0)[ptx::thread()] = 7 + 0 * value;
    }
};

// An address outside of shared memory, misaligned, or of nothing (number 1 says of what).
struct BadAddress : TmaTile {
    static void run(const CheckArguments& a, char* shared) {
        init(shared, 1, true);
        const uint32_t begin = ptx::shared_address(shared);
        const int off = is_faulty(a) ? 1 : 0;
        for (int i = ptx::thread(); i < 1024; i += kThreads) words(shared)[i] = 7;
        ptx::sync_threads();
        uint32_t r[4];
        const auto load = [&](char* target, uint64_t* on) {
            if (ptx::thread() == 0) {
                ptx::mbarrier_arrive_expect(barrier(shared), kTileBytes);
                ptx::tma_load(target, &a.map, on, 0, 0, 0, 0);
            }
            ptx::mbarrier_wait(barrier(shared), 0);
        };
        switch (a.number[1]) {
            case 0:
                ptx::cp_async_16(begin + 16 * ptx::thread() + off * kSharedBytes, a.in[0], 16);
                break;
            case 1:
                ptx::cp_async_16(begin + 16 * ptx::thread() + off * 4, a.in[0], 16);
                break;
            case 2:
                ptx::cp_async_16(begin + 16 * ptx::thread(), input<char>(a, 0) + off * 8, 16);
                break;
            case 3:
                ptx::ldmatrix(r, begin + 16 * ptx::lane() + off * kSharedBytes);
                break;
            case 4:
                ptx::ldmatrix(r, begin + 16 * ptx::lane() + off * 2);
                break;
            case 5:
                load(shared + off * (kSharedBytes - 4096 - 1024), barrier(shared));
                break;
            case 6:
                load(shared + off * 128, barrier(shared));
                break;  // a swizzled tile needs 1024
            case 7:
                load(shared, barrier(shared) + off * 4);
                break;  // a barrier that nobody has initialised
            case 8:
                words(shared)[kSharedBytes / 4 - 1 + off] = 7;
                break;  // a plain write
            default:
                ptx::cp_async_16(begin + 16 * ptx::thread(), a.in[0], 16 + off);
                break;
        }
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
        ptx::sync_threads();
        output<int>(a, 0)[ptx::thread()] = 7;
    }
};

// A block ends while something that it began is still on its way.
struct LeftInFlight : TmaTile {
    static void run(const CheckArguments& a, char* shared) {
        copy_words<LeftInFlight>(words(shared), input<uint32_t>(a, 0), kTileBytes);
        ptx::fence_async_proxy();
        ptx::sync_threads();
        if (ptx::thread() == 0) {
            ptx::tma_store(&a.map, shared, 0, 0, 0, 0);
            ptx::bulk_commit();
            if (!is_faulty(a)) ptx::bulk_wait_read<0>();
        }
    }
};

}  // namespace

std::vector<Check> checks_faults() {
    return {
        {"fault_no_barrier", 80, launch_check<NoBarrier>},
        {"fault_no_barrier_before_reuse", 80, launch_check<NoBarrierBeforeReuse>},
        {"fault_cp_async_no_wait", 80, launch_check<CpAsyncFault<true, false>>},
        {"fault_cp_async_no_barrier", 80, launch_check<CpAsyncFault<false, true>>},
        {"fault_cp_async_waits_too_few", 80, launch_check<CpAsyncWaitsTooFew>},
        {"fault_tma_no_wait", 90, launch_check<TmaNoWait>},
        {"fault_tma_more_bytes", 90, launch_check<TmaWrongBytes<16>>},
        {"fault_tma_less_bytes", 90, launch_check<TmaWrongBytes<-16>>},
        {"fault_no_fence_mbarrier_init", 90, launch_check<NoFenceMbarrierInit>},
        {"fault_tma_no_empty_barrier", 90, launch_check<TmaNoEmptyBarrier>},
        {"fault_tma_store_no_fence", 90, launch_check<TmaStoreNoFence>},
        {"fault_tma_store_no_barrier", 90, launch_check<TmaStoreNoBarrier>},
        {"fault_tma_store_no_wait", 90, launch_check<TmaStoreNoWait>},
        {"fault_bulk_reduce_no_fence", 90, launch_check<BulkReduceNoFence>},
        {"fault_wgmma_no_wait", 90, launch_check<WgmmaFaulty<WgmmaFault::no_wait>>},
        {"fault_wgmma_no_commit", 90, launch_check<WgmmaFaulty<WgmmaFault::no_commit>>},
        {"fault_wgmma_overwritten_a", 90, launch_check<WgmmaFaulty<WgmmaFault::overwritten_a>>},
        {"fault_wgmma_overwritten_shared", 90, launch_check<WgmmaFaulty<WgmmaFault::overwritten_shared>>},
        {"fault_wgmma_no_proxy_fence", 90, launch_check<WgmmaFaulty<WgmmaFault::no_proxy_fence>>},
        {"fault_wgmma_no_fence", 90, launch_check<WgmmaFaulty<WgmmaFault::no_fence>>},
        {"fault_wgmma_used_d", 90, launch_check<WgmmaFaulty<WgmmaFault::used_d>>},
        {"fault_deadlock", 90, launch_check<Deadlock>},
        {"fault_divergent", 90, launch_check<Divergent>},
        {"fault_bad_address", 90, launch_check<BadAddress>},
        {"fault_left_in_flight", 90, launch_check<LeftInFlight>},
    };
}

}  // namespace cuda
}  // namespace tf

#endif
