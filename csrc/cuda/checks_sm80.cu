// Checks of what an sm_80 has.
#include "cuda/checks_launch.cuh"

namespace tf {
namespace cuda {
namespace {

// ------------------------------------------------------------------------------------------ threads and warps

// Each thread tells its seven numbers, and how far the 32-bit addresses of two places in shared memory are apart.
struct Who : CheckShape<96, 2048, 3, 2> {
    static TF_DEVICE void run(const CheckArguments& a, char* shared) {
        const int block = ptx::block_y() * ptx::blocks_x() + ptx::block_x();
        int* out = output<int>(a, 0) + (block * kThreads + ptx::thread()) * 9;
        out[0] = ptx::forget(ptx::thread()), out[1] = ptx::lane(), out[2] = ptx::warp();
        out[3] = ptx::block_x(), out[4] = ptx::block_y(), out[5] = ptx::blocks_x(), out[6] = ptx::blocks_y();
        out[7] = static_cast<int>(ptx::shared_address(shared + 12 * ptx::thread() + 5) - ptx::shared_address(shared));
        out[8] = static_cast<int>(ptx::shared_address(shared) % 1024);
    }
};

// number 0: the mask, number 1: the lane.
struct Shuffles : CheckShape<64> {
    static TF_DEVICE void run(const CheckArguments& a, char*) {
        const int thread = ptx::thread(), mask = number(a, 0), lane = number(a, 1);
        const float real = input<float>(a, 0)[thread];
        const int whole = input<int>(a, 1)[thread];
        float* reals = output<float>(a, 0) + 2 * thread;
        int* wholes = output<int>(a, 1) + 2 * thread;
        reals[0] = ptx::shuffle_xor(real, mask), reals[1] = ptx::shuffle(real, lane);
        wholes[0] = ptx::shuffle_xor(whole, mask), wholes[1] = ptx::shuffle(whole, lane);
    }
};

// in 0: a truth value of each thread.
struct Votes : CheckShape<128> {
    static TF_DEVICE void run(const CheckArguments& a, char*) {
        const bool value = input<int>(a, 0)[ptx::thread()] != 0;
        output<int>(a, 0)[2 * ptx::thread()] = ptx::any(value);
        output<int>(a, 0)[2 * ptx::thread() + 1] = ptx::all(value);
    }
};

// ------------------------------------------------------------------------------------------ numbers

// number 0: how many.
template <class E>
struct Pack : CheckShape<128> {
    static TF_DEVICE void run(const CheckArguments& a, char*) {
        for (int i = ptx::thread(); i < number(a, 0); i += kThreads) {
            output<uint32_t>(a, 0)[i] = ptx::pack<E>(input<float>(a, 0)[i], input<float>(a, 1)[i]);
            output<uint16_t>(a, 1)[i] = ptx::from_float<E>(input<float>(a, 0)[i]).bits;
        }
    }
};
template <class E>
struct Unpack : CheckShape<128> {
    static TF_DEVICE void run(const CheckArguments& a, char*) {
        for (int i = ptx::thread(); i < number(a, 0); i += kThreads) {
            output<float>(a, 0)[i] = ptx::to_float(E{input<uint16_t>(a, 0)[i]});
        }
    }
};
struct Exp2 : CheckShape<128> {
    static TF_DEVICE void run(const CheckArguments& a, char*) {
        for (int i = ptx::thread(); i < number(a, 0); i += kThreads) {
            output<float>(a, 0)[i] = ptx::exp2(input<float>(a, 0)[i]);
        }
    }
};
struct Log2 : CheckShape<128> {
    static TF_DEVICE void run(const CheckArguments& a, char*) {
        for (int i = ptx::thread(); i < number(a, 0); i += kThreads) {
            output<float>(a, 0)[i] = ptx::log2(input<float>(a, 0)[i]);
        }
    }
};
struct Reciprocal : CheckShape<128> {
    static TF_DEVICE void run(const CheckArguments& a, char*) {
        for (int i = ptx::thread(); i < number(a, 0); i += kThreads) {
            output<float>(a, 0)[i] = ptx::reciprocal(input<float>(a, 0)[i]);
        }
    }
};
struct MultiplyHigh : CheckShape<128> {
    static TF_DEVICE void run(const CheckArguments& a, char*) {
        for (int i = ptx::thread(); i < number(a, 0); i += kThreads) {
            output<uint32_t>(a, 0)[i] = ptx::multiply_high(input<uint32_t>(a, 0)[i], input<uint32_t>(a, 1)[i]);
        }
    }
};

// ------------------------------------------------------------------------------------------ matrices

// in 0: 4096 bytes of shared memory; in 1: the offset of each thread's row. out 0: r of each thread.
template <bool kTransposed>
struct Ldmatrix : CheckShape<64, 4096> {
    static TF_DEVICE void run(const CheckArguments& a, char* shared) {
        copy_words<Ldmatrix>(words(shared), input<uint32_t>(a, 0), kSharedBytes);
        ptx::sync_threads();
        const uint32_t address = ptx::shared_address(shared + input<int>(a, 1)[ptx::thread()]);
        uint32_t r[4];
        if constexpr (kTransposed) {
            ptx::ldmatrix_transposed(r, address);
        } else {
            ptx::ldmatrix(r, address);
        }
        for (int i = 0; i < 4; ++i) output<uint32_t>(a, 0)[4 * ptx::thread() + i] = r[i];
    }
};

// in 0, 1, 2: a, b and d of each thread; out 0: the new d.
template <class E>
struct Mma : CheckShape<64> {
    static TF_DEVICE void run(const CheckArguments& a, char*) {
        const int thread = ptx::thread();
        uint32_t left[4];
        float sums[4];
        for (int i = 0; i < 4; ++i) left[i] = input<uint32_t>(a, 0)[4 * thread + i];
        for (int i = 0; i < 4; ++i) sums[i] = input<float>(a, 2)[4 * thread + i];
        ptx::mma<E>(sums, left, input<uint32_t>(a, 1)[2 * thread], input<uint32_t>(a, 1)[2 * thread + 1]);
        for (int i = 0; i < 4; ++i) output<float>(a, 0)[4 * thread + i] = sums[i];
    }
};

// ------------------------------------------------------------------------------------------ cp.async

// Four groups of one copy a thread, as in 1 tells (group, thread): target and source offsets, bytes; kEmpty has an
// empty group after each. out 0: what each thread finds in its own target as soon as the group is done (group, thread);
// out 1: all of shared memory, read by other threads in the end.
template <bool kEmpty>
struct CpAsync : CheckShape<128, 4 * 128 * 16> {
    static constexpr int kGroups = 4, kEach = kEmpty ? 2 : 1;

    template <int kGroup>
    static TF_DEVICE void collect(const CheckArguments& a, const char* shared) {
        ptx::cp_async_wait<(kGroups - 1 - kGroup) * kEach>();
        const int index = kGroup * kThreads + ptx::thread();
        output<Vector16>(a, 0)[index] = *reinterpret_cast<const Vector16*>(shared + input<int>(a, 1)[3 * index]);
    }
    static TF_DEVICE void run(const CheckArguments& a, char* shared) {
        fill_words<CpAsync>(words(shared), 0xa5a5a5a5u, kSharedBytes);
        ptx::sync_threads();
        for (int group = 0; group < kGroups; ++group) {
            const int* copy = input<int>(a, 1) + 3 * (group * kThreads + ptx::thread());
            ptx::cp_async_16(ptx::shared_address(shared + copy[0]), input<char>(a, 0) + copy[1], copy[2]);
            ptx::cp_async_commit();
            if (kEmpty) ptx::cp_async_commit();
        }
        collect<0>(a, shared);
        collect<1>(a, shared);
        collect<2>(a, shared);
        collect<3>(a, shared);
        ptx::sync_threads();
        for (int i = 0; i < kGroups; ++i) {
            const int index = i * kThreads + (ptx::thread() + 37) % kThreads;
            output<Vector16>(a, 1)[index] = reinterpret_cast<const Vector16*>(shared)[index];
        }
    }
};

// ------------------------------------------------------------------------------------------ barriers

// Rounds (number 0) between warp 0, which writes, and warps 1 to 3, which read: barriers 1 and 2, where one side only
// arrives. Then each pair of warps swaps numbers across barrier 14 or 15. in 0: (round, lane); out 0: what each reader
// saw (round, thread), out 1: what each thread got of its partner.
struct Barriers : CheckShape<128> {
    static TF_DEVICE void run(const CheckArguments& a, char* shared) {
        int* slots = reinterpret_cast<int*>(shared);
        const int thread = ptx::thread(), lane = ptx::lane(), warp = ptx::warp();
        for (int round = 0; round < number(a, 0); ++round) {
            if (warp == 0) {
                slots[lane] = input<int>(a, 0)[round * 32 + lane];
                ptx::barrier_arrive(1, kThreads);
                ptx::barrier_sync(2, kThreads);
            } else {
                ptx::barrier_sync(1, kThreads);
                output<int>(a, 0)[round * kThreads + thread] = slots[31 - lane];
                ptx::barrier_arrive(2, kThreads);
            }
        }
        const int pair = warp % 2;
        int* own = slots + 64 + thread;
        const int* other = slots + 64 + (thread ^ 64);
        *own = input<int>(a, 0)[thread % 32] + thread;
        ptx::barrier_sync(14 + pair, 64);
        output<int>(a, 1)[thread] = *other;
    }
};

// Writes to shared memory seen by the other lanes after sync_warp, by all threads after sync_threads. in 0: (thread).
struct Syncs : CheckShape<128> {
    static TF_DEVICE void run(const CheckArguments& a, char* shared) {
        int* slots = reinterpret_cast<int*>(shared);
        const int thread = ptx::thread();
        slots[thread] = input<int>(a, 0)[thread];
        ptx::sync_warp();
        output<int>(a, 0)[thread] = slots[thread ^ 31];
        ptx::sync_threads();
        output<int>(a, 1)[thread] = slots[kThreads - 1 - thread];
    }
};

// ------------------------------------------------------------------------------------------ between blocks

// out 0: eight sums of floats. out 1: a counter, and who got which number from it.
struct Atomics : CheckShape<64, 1024, 4> {
    static TF_DEVICE void run(const CheckArguments& a, char*) {
        const int thread = ptx::block_x() * kThreads + ptx::thread();
        ptx::atomic_add(output<float>(a, 0) + thread % 8, input<float>(a, 0)[thread]);
        const int before = ptx::atomic_add(output<int>(a, 1), 1);
        output<int>(a, 1)[1 + before] = thread;
    }
};

// Blocks take turns, each upon what the one before it left: x = 3 x + in (block, thread). out 1: whose turn it is.
struct Turns : CheckShape<64, 1024, 4> {
    static TF_DEVICE void run(const CheckArguments& a, char*) {
        const int thread = ptx::thread(), block = ptx::block_x();
        if (thread == 0) {
            while (ptx::load_acquire(output<int>(a, 1)) != block) {
            }
        }
        ptx::sync_threads();
        const int mirrored = block % 2 == 0 ? thread : kThreads - 1 - thread;
        output<int>(a, 0)[mirrored] = output<int>(a, 0)[mirrored] * 3 + input<int>(a, 0)[block * kThreads + thread];
        ptx::sync_threads();
        if (thread == 0) ptx::add_release(output<int>(a, 1), 1);
    }
};

// The last block to come sums up what all have left. out 0: (block, thread), then the sums; out 1: who has come.
struct LastBlock : CheckShape<64, 1024, 4> {
    static TF_DEVICE void run(const CheckArguments& a, char* shared) {
        const int thread = ptx::thread(), block = ptx::block_x();
        int* parts = output<int>(a, 0);
        int* last = reinterpret_cast<int*>(shared);
        parts[block * kThreads + thread] = input<int>(a, 0)[block * kThreads + thread];
        ptx::fence_device();
        ptx::sync_threads();
        if (thread == 0) *last = ptx::atomic_add(output<int>(a, 1), 1) == kBlocksX - 1;
        ptx::sync_threads();
        if (*last == 0) return;
        ptx::fence_device();
        int sum = 0;
        for (int b = 0; b < kBlocksX; ++b) sum += parts[b * kThreads + (thread + 1) % kThreads];
        parts[kBlocksX * kThreads + thread] = sum;
    }
};

}  // namespace

std::vector<Check> checks_sm80() {
    return {
        {"who", 80, launch_check<Who>},
        {"shuffles", 80, launch_check<Shuffles>},
        {"votes", 80, launch_check<Votes>},
        {"pack_bf16", 80, launch_check<Pack<Bfloat16>>},
        {"pack_f16", 80, launch_check<Pack<Float16>>},
        {"unpack_bf16", 80, launch_check<Unpack<Bfloat16>>},
        {"unpack_f16", 80, launch_check<Unpack<Float16>>},
        {"exp2", 80, launch_check<Exp2>},
        {"log2", 80, launch_check<Log2>},
        {"reciprocal", 80, launch_check<Reciprocal>},
        {"multiply_high", 80, launch_check<MultiplyHigh>},
        {"ldmatrix", 80, launch_check<Ldmatrix<false>>},
        {"ldmatrix_transposed", 80, launch_check<Ldmatrix<true>>},
        {"mma_bf16", 80, launch_check<Mma<Bfloat16>>},
        {"mma_f16", 80, launch_check<Mma<Float16>>},
        {"cp_async", 80, launch_check<CpAsync<false>>},
        {"cp_async_empty_groups", 80, launch_check<CpAsync<true>>},
        {"barriers", 80, launch_check<Barriers>},
        {"syncs", 80, launch_check<Syncs>},
        {"atomics", 80, launch_check<Atomics>},
        {"turns", 80, launch_check<Turns>},
        {"last_block", 80, launch_check<LastBlock>},
    };
}

}  // namespace cuda
}  // namespace tf
