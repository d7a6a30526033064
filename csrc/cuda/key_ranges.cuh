// Where a key padding mask begins and ends to show keys, for every batch entry: a small kernel before all others.
#pragma once

#include "cuda/tile.cuh"

namespace tf {
namespace cuda {

// One block a batch entry. The mask of a row of keys is read once, so that no other kernel needs to read it where it
// hides keys at the ends only, which is what padding is.
struct KeyRanges {
    static constexpr int kThreads = 256, kMinBlocks = 1, kBlockM = 1, kBlockN = 1, kSharedBytes = 3 * 4 * kThreads / 32;

    struct Found {
        int first, last, count;  // of the keys that are kept: the first, one past the last, how many
    };

    static TF_DEVICE void keep(Found& found, int key) {
        found.first = min_of(found.first, key);
        found.last = max_of(found.last, key + 1);
        found.count += 1;
    }

    // The 16 keys from `key` on; any byte but 0 keeps its key.
    static TF_DEVICE void keep_vector(Found& found, int key, const Vector16& bytes) {
        TF_UNROLL
        for (int i = 0; i < 4; ++i) {
            TF_UNROLL
            for (int b = 0; b < 4; ++b) {
                if ((bytes.word[i] >> (8 * b) & 0xff) != 0) keep(found, key + 4 * i + b);
            }
        }
    }

    static TF_DEVICE Found join(const Found& a, const Found& b) {
        return {min_of(a.first, b.first), max_of(a.last, b.last), a.count + b.count};
    }

    static TF_DEVICE void run(const Arguments& a, char* shared) {
        const Problem& p = a.problem;
        const int index = ptx::block_x(), thread = ptx::thread();
        int length = static_cast<int>(p.seqlen_k);
        if (p.seqlens_k != nullptr) length = min_of(length, static_cast<int>(p.seqlens_k[index * p.seqlens_k_stride]));
        const uint8_t* mask = p.key_mask + index * p.key_mask_batch;
        const int64_t stride = p.key_mask_key;

        // Whole vectors where bytes are neighbours, from the first multiple of 16 on, and the rest one by one.
        Found found{length, 0, 0};
        int begin = 0, end = 0;
        if (stride == 1) {
            begin = min_of(length, static_cast<int>(-reinterpret_cast<uint64_t>(mask) % 16));
            end = begin + (length - begin) / 16 * 16;
        }
        for (int key = begin + 16 * thread; key < end; key += 16 * kThreads) {
            keep_vector(found, key, *reinterpret_cast<const Vector16*>(mask + key));
        }
        for (int i = thread; i < length - (end - begin); i += kThreads) {
            const int key = i < begin ? i : i + (end - begin);
            if (mask[key * stride] != 0) keep(found, key);
        }

        for (int x = 16; x > 0; x /= 2) {
            found = join(found, {ptx::shuffle_xor(found.first, x), ptx::shuffle_xor(found.last, x),
                                 ptx::shuffle_xor(found.count, x)});
        }
        Found* const of_warp = reinterpret_cast<Found*>(shared);
        const int warp = ptx::warp();
        if (ptx::lane() == 0) of_warp[warp] = found;
        ptx::sync_threads();
        if (thread != 0) return;
        for (int w = 1; w < kThreads / 32; ++w) found = join(found, of_warp[w]);
        KeyRange range{0, 0, 0, 0};
        if (found.count > 0) range = {found.first, found.last, found.count < found.last - found.first, 0};
        const_cast<KeyRange*>(a.key_ranges)[index] = range;
    }
};

}  // namespace cuda
}  // namespace tf
