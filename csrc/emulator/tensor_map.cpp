#include "emulator/tensor_map.h"

#include <cstring>

namespace tf::emulator {

namespace {

constexpr uint32_t kMagic = 0x746d6170;

struct Encoded {
    uint32_t magic;
    uint8_t dtype, rank, swizzle;
    uint64_t data;
    uint32_t last[5];  // size - 1: a size of 2^32 is allowed
    uint16_t box[5];
    uint64_t stride[4];
};
static_assert(sizeof(Encoded) <= sizeof(TensorMap));

std::string refusal(const TensorGeometry& g) {
    const auto bytes = static_cast<uint64_t>(size_of(g.dtype));
    if (g.rank < 3 || g.rank > 5) return "rank is " + std::to_string(g.rank) + "; allowed are 3 to 5";
    if (g.dtype == DType::boolean) return "dtype is boolean; allowed are f32, bf16 and f16";
    if (g.data == nullptr || reinterpret_cast<uintptr_t>(g.data) % 16 != 0) {
        return "the address is null or no multiple of 16";
    }
    for (int i = 0; i < g.rank; ++i) {
        const std::string at = "[" + std::to_string(i) + "] is ";
        if (g.size[i] < 1 || g.size[i] > uint64_t{1} << 32) {
            return "size" + at + std::to_string(g.size[i]) + "; allowed are 1 to 2^32";
        }
        if (g.box[i] < 1 || g.box[i] > 256) return "box" + at + std::to_string(g.box[i]) + "; allowed are 1 to 256";
        if (i == 0) continue;
        const uint64_t stride = g.stride[i - 1];
        if (stride % 16 != 0 || stride >= uint64_t{1} << 40) {
            return "stride[" + std::to_string(i - 1) + "] is " + std::to_string(stride) +
                   " bytes; allowed are multiples of 16 below 2^40";
        }
    }
    const uint64_t inner = g.box[0] * bytes;
    if (inner % 16 != 0) return "box[0] has " + std::to_string(inner) + " bytes; allowed are multiples of 16";
    if (g.swizzle_128 && inner > 128) {
        return "box[0] has " + std::to_string(inner) + " bytes; allowed are up to 128, by which it is swizzled";
    }
    return "";
}

}  // namespace

bool encode_tensor_map(TensorMap* map, const TensorGeometry& g, std::string* why_not) {
    const std::string why = refusal(g);
    if (why_not != nullptr) *why_not = why;
    if (!why.empty()) return false;
    Encoded encoded{};
    encoded.magic = kMagic;
    encoded.dtype = static_cast<uint8_t>(g.dtype);
    encoded.rank = static_cast<uint8_t>(g.rank);
    encoded.swizzle = g.swizzle_128;
    encoded.data = reinterpret_cast<uintptr_t>(g.data);
    for (int i = 0; i < g.rank; ++i) {
        encoded.last[i] = static_cast<uint32_t>(g.size[i] - 1);
        encoded.box[i] = static_cast<uint16_t>(g.box[i]);
        if (i > 0) encoded.stride[i - 1] = g.stride[i - 1];
    }
    *map = TensorMap{};
    std::memcpy(map->opaque, &encoded, sizeof(Encoded));
    return true;
}

bool decode_tensor_map(const TensorMap* map, TensorGeometry* g) {
    Encoded encoded;
    std::memcpy(&encoded, map, sizeof(Encoded));
    if (encoded.magic != kMagic) return false;
    *g = TensorGeometry{};
    g->dtype = static_cast<DType>(encoded.dtype);
    g->rank = encoded.rank;
    g->swizzle_128 = encoded.swizzle != 0;
    g->data = reinterpret_cast<const void*>(encoded.data);
    for (int i = 0; i < g->rank; ++i) {
        g->size[i] = uint64_t{encoded.last[i]} + 1;
        g->box[i] = encoded.box[i];
        if (i > 0) g->stride[i - 1] = encoded.stride[i - 1];
    }
    return true;
}

int box_bytes(const TensorGeometry& g) {
    int64_t bytes = size_of(g.dtype);
    for (int i = 0; i < g.rank; ++i) bytes *= g.box[i];
    return static_cast<int>(bytes);
}

}  // namespace tf::emulator
