// Philox4x32-10 (Salmon et al., SC 2011), the counter-based generator behind dropout. The counter is
// (column / 4, row, head, batch entry) and column % 4 picks the word: the same mask on every back end.
#pragma once

#include "platform.h"

namespace tf {

struct Philox4 {
    uint32_t word[4];
};

TF_INLINE Philox4 philox(uint64_t seed, uint32_t column4, uint32_t row, uint32_t head, uint32_t batch) {
    uint32_t c0 = column4, c1 = row, c2 = head, c3 = batch;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{0xD2511F53u} * c0, product1 = uint64_t{0xCD9E8D57u} * c2;
        c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
        c1 = static_cast<uint32_t>(product1);
        c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
        c3 = static_cast<uint32_t>(product0);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

}  // namespace tf
