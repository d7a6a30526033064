// Checks of what an sm_90 has besides, but for wgmma.
#include "cuda/checks_launch.cuh"

namespace tf {
namespace cuda {
namespace {

constexpr int kTileBytes = 32768;  // the greatest tile that the checks move
constexpr int kGuardBytes = 1024;  // behind it, which nothing may touch

// What shared memory holds before a tile arrives: the asynchronous proxy writes over plain stores.
template <class K>
TF_DEVICE void paint(char* shared, int bytes) {
    fill_words<K>(words(shared), 0xa5a5a5a5u, bytes);
    ptx::fence_async_proxy();
}

// The first coordinate of five in numbers 0 to 4.
template <int kRank>
TF_DEVICE void load_box(char* target, const TensorMap* map, uint64_t* barrier, const int* c) {
    if constexpr (kRank == 4) {
        ptx::tma_load(target, map, barrier, c[0], c[1], c[2], c[3]);
    } else {
        ptx::tma_load(target, map, barrier, c[0], c[1], c[2], c[3], c[4]);
    }
}
template <int kRank>
TF_DEVICE void store_box(const TensorMap* map, const char* source, const int* c) {
    if constexpr (kRank == 4) {
        ptx::tma_store(map, source, c[0], c[1], c[2], c[3]);
    } else {
        ptx::tma_store(map, source, c[0], c[1], c[2], c[3], c[4]);
    }
}

// ------------------------------------------------------------------------------------------ one lane

// How often each lane was elected, of number 0 times; out 0: (thread).
struct Elect : CheckShape<96> {
    static TF_DEVICE void run(const CheckArguments& a, char*) {
        int times = 0;
        for (int i = 0; i < number(a, 0); ++i) times += ptx::elect_one() ? 1 : 0;
        output<int>(a, 0)[ptx::thread()] = times;
    }
};

// ------------------------------------------------------------------------------------------ mbarrier

// Number 0 threads fill slots, all read them; number 1 rounds over two stages, by a barrier of each kind for each
// stage. in 0: (round, writer); out 0: (round, thread) the sum over the slots, times the thread's number + 1.
struct Phases : CheckShape<128, 2048> {
    static TF_DEVICE void run(const CheckArguments& a, char* shared) {
        constexpr int kStages = 2;
        uint64_t* full = reinterpret_cast<uint64_t*>(shared);
        uint64_t* empty = full + kStages;
        int* slots = reinterpret_cast<int*>(shared + 1024);
        const int thread = ptx::thread(), writers = number(a, 0);
        if (thread == 0) {
            for (int i = 0; i < kStages; ++i) {
                ptx::mbarrier_init(full + i, writers);
                ptx::mbarrier_init(empty + i, kThreads);
            }
            ptx::fence_mbarrier_init();
        }
        ptx::sync_threads();
        for (int round = 0; round < number(a, 1); ++round) {
            const int stage = round % kStages;
            const uint32_t parity = round / kStages % 2;
            if (thread < writers) {
                ptx::mbarrier_wait(empty + stage, parity ^ 1);  // returns at once in the first round of a stage
                slots[stage * kThreads + thread] = input<int>(a, 0)[round * writers + thread];
                ptx::mbarrier_arrive(full + stage);
            }
            ptx::mbarrier_wait(full + stage, parity);
            int sum = 0;
            for (int i = 0; i < writers; ++i) sum += slots[stage * kThreads + i];
            output<int>(a, 0)[round * kThreads + thread] = sum * (thread + 1);
            ptx::mbarrier_arrive(empty + stage);
        }
    }
};

// ------------------------------------------------------------------------------------------ TMA

// Numbers 0 to 4: coordinates, 5: bytes. out 0: the tile as it lies, and the guard behind it.
template <int kRank>
struct TmaLoad : CheckShape<128, kTileBytes + kGuardBytes + 1024> {
    static TF_DEVICE void run(const CheckArguments& a, char* shared) {
        uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + kTileBytes + kGuardBytes);
        const int bytes = number(a, 5);
        paint<TmaLoad>(shared, kTileBytes + kGuardBytes);
        if (ptx::thread() == 0) {
            ptx::prefetch_tensor_map(&a.map);
            ptx::mbarrier_init(barrier, 1);
            ptx::fence_mbarrier_init();
        }
        ptx::sync_threads();
        if (ptx::thread() == 0) {
            const int c[5] = {number(a, 0), number(a, 1), number(a, 2), number(a, 3), number(a, 4)};
            ptx::mbarrier_arrive_expect(barrier, bytes);
            load_box<kRank>(shared, &a.map, barrier, c);
        }
        ptx::mbarrier_wait(barrier, 0);
        copy_words<TmaLoad>(output<uint32_t>(a, 0), words(shared), bytes + kGuardBytes);
    }
};

// Number 0 rounds over two stages, each of number 1 tiles (1 to 4) of number 2 bytes (up to 8192) by as many threads,
// whose announcement comes before their load or (number 3) after. in 0: coordinates (round, tile, 4); out 0: the tiles.
struct TmaPipeline : CheckShape<128, 2 * 4 * 8192 + 1024> {
    static TF_DEVICE void run(const CheckArguments& a, char* shared) {
        constexpr int kStages = 2, kStageBytes = 4 * 8192;
        uint64_t* full = reinterpret_cast<uint64_t*>(shared + kStages * kStageBytes);
        uint64_t* empty = full + kStages;
        const int rounds = number(a, 0), tiles = number(a, 1), bytes = number(a, 2);
        if (ptx::thread() == 0) {
            for (int i = 0; i < kStages; ++i) {
                ptx::mbarrier_init(full + i, tiles);
                ptx::mbarrier_init(empty + i, kThreads - 32);
            }
            ptx::fence_mbarrier_init();
        }
        ptx::sync_threads();
        for (int round = 0; round < rounds; ++round) {
            const int stage = round % kStages;
            const uint32_t parity = round / kStages % 2;
            char* tile = shared + stage * kStageBytes;
            if (ptx::warp() != 0) {
                ptx::mbarrier_wait(full + stage, parity);
                uint32_t* out = output<uint32_t>(a, 0) + round * tiles * bytes / 4;
                for (int i = ptx::thread() - 32; i < tiles * bytes / 4; i += kThreads - 32) out[i] = words(tile)[i];
                ptx::mbarrier_arrive(empty + stage);
            } else if (ptx::thread() < tiles) {
                ptx::mbarrier_wait(empty + stage, parity ^ 1);
                const int* c = input<int>(a, 0) + (round * tiles + ptx::thread()) * 4;
                if (number(a, 3) == 0) ptx::mbarrier_arrive_expect(full + stage, bytes);
                load_box<4>(tile + ptx::thread() * bytes, &a.map, full + stage, c);
                if (number(a, 3) != 0) ptx::mbarrier_arrive_expect(full + stage, bytes);
            }
        }
    }
};

// Numbers 0 to 4: coordinates, 5: bytes; in 0: the tile as it lies. The tensor of the map takes it.
template <int kRank>
struct TmaStore : CheckShape<128, kTileBytes> {
    static TF_DEVICE void run(const CheckArguments& a, char* shared) {
        copy_words<TmaStore>(words(shared), input<uint32_t>(a, 0), number(a, 5));
        ptx::fence_async_proxy();
        ptx::sync_threads();
        if (ptx::thread() == 0) {
            const int c[5] = {number(a, 0), number(a, 1), number(a, 2), number(a, 3), number(a, 4)};
            store_box<kRank>(&a.map, shared, c);
            ptx::bulk_commit();
            ptx::bulk_wait<0>();
        }
    }
};

// A tile goes through two buffers to several places of a tensor: number 0 rounds, number 1 bytes (up to 8192). in 0:
// tiles (round), in 1: coordinates (round, 4). The buffer of two rounds ago is written anew once it has been read.
struct TmaStoreBuffers : CheckShape<128, 2 * 8192> {
    static TF_DEVICE void run(const CheckArguments& a, char* shared) {
        const int rounds = number(a, 0), bytes = number(a, 1);
        for (int round = 0; round < rounds; ++round) {
            char* buffer = shared + round % 2 * 8192;
            if (ptx::thread() == 0) ptx::bulk_wait_read<1>();
            ptx::sync_threads();
            copy_words<TmaStoreBuffers>(words(buffer), input<uint32_t>(a, 0) + round * bytes / 4, bytes);
            ptx::fence_async_proxy();
            ptx::sync_threads();
            if (ptx::thread() == 0) {
                store_box<4>(&a.map, buffer, input<int>(a, 1) + round * 4);
                ptx::bulk_commit();
            }
        }
        if (ptx::thread() == 0) ptx::bulk_wait<0>();
    }
};

// A tile comes by TMA, is changed in place (each word's bits are flipped) and goes back by TMA. Numbers as of TmaLoad;
// the target's coordinates are numbers 6 to 9.
struct TmaThrough : CheckShape<128, kTileBytes + 1024> {
    static TF_DEVICE void run(const CheckArguments& a, char* shared) {
        uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + kTileBytes);
        if (ptx::thread() == 0) {
            ptx::mbarrier_init(barrier, 1);
            ptx::fence_mbarrier_init();
        }
        ptx::sync_threads();
        if (ptx::thread() == 0) {
            const int c[4] = {number(a, 0), number(a, 1), number(a, 2), number(a, 3)};
            ptx::mbarrier_arrive_expect(barrier, number(a, 5));
            load_box<4>(shared, &a.map, barrier, c);
        }
        ptx::mbarrier_wait(barrier, 0);
        for (int i = ptx::thread(); i < number(a, 5) / 4; i += kThreads) words(shared)[i] = ~words(shared)[i];
        ptx::fence_async_proxy();
        ptx::sync_threads();
        if (ptx::thread() == 0) {
            const int c[4] = {number(a, 6), number(a, 7), number(a, 8), number(a, 9)};
            store_box<4>(&a.map, shared, c);
            ptx::bulk_commit();
            ptx::bulk_wait<0>();
        }
    }
};

// Each of four blocks adds its part of in 0, number 0 bytes in number 1 pieces, to out 0.
struct BulkReduce : CheckShape<128, 16384, 4> {
    static TF_DEVICE void run(const CheckArguments& a, char* shared) {
        const int bytes = number(a, 0), pieces = number(a, 1), piece = bytes / pieces;
        copy_words<BulkReduce>(words(shared), input<uint32_t>(a, 0) + ptx::block_x() * bytes / 4, bytes);
        ptx::fence_async_proxy();
        ptx::sync_threads();
        if (ptx::thread() == 0) {
            for (int i = 0; i < pieces; ++i) {
                ptx::bulk_reduce_add(output<float>(a, 0) + i * piece / 4,
                                     reinterpret_cast<const float*>(shared + i * piece), piece);
                ptx::bulk_commit();
            }
            ptx::bulk_wait<0>();
        }
    }
};

// ------------------------------------------------------------------------------------------ registers

// A warpgroup gives registers away to two that hold a hundred numbers at once. in 0: 128 numbers; out 0: (thread).
struct Registers : CheckShape<384> {
    static TF_DEVICE void run(const CheckArguments& a, char*) {
        const int thread = ptx::thread();
        if (thread < 128) {
            ptx::decrease_registers<24>();
            output<float>(a, 0)[thread] = input<float>(a, 0)[thread];
            return;
        }
        ptx::increase_registers<240>();
        float x[128];
        TF_UNROLL
        for (int i = 0; i < 128; ++i) x[i] = input<float>(a, 0)[i];
        for (int turn = 0; turn < number(a, 0); ++turn) {
            const float first = x[0];
            TF_UNROLL
            for (int i = 0; i < 127; ++i) x[i] = x[i + 1] + static_cast<float>(thread % 4);
            x[127] = first;
        }
        float sum = 0.0f;
        TF_UNROLL
        for (int i = 0; i < 128; ++i) sum += x[i] * static_cast<float>(i);
        output<float>(a, 0)[thread] = sum;
    }
};

}  // namespace

std::vector<Check> checks_sm90() {
    return {
        {"elect", 90, launch_check<Elect>},
        {"phases", 90, launch_check<Phases>},
        {"tma_load_4d", 90, launch_check<TmaLoad<4>>},
        {"tma_load_5d", 90, launch_check<TmaLoad<5>>},
        {"tma_pipeline", 90, launch_check<TmaPipeline>},
        {"tma_store_4d", 90, launch_check<TmaStore<4>>},
        {"tma_store_5d", 90, launch_check<TmaStore<5>>},
        {"tma_store_buffers", 90, launch_check<TmaStoreBuffers>},
        {"tma_through", 90, launch_check<TmaThrough>},
        {"bulk_reduce", 90, launch_check<BulkReduce>},
        {"registers", 90, launch_check<Registers>},
    };
}

}  // namespace cuda
}  // namespace tf
