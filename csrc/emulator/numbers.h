// Two-byte floating-point numbers, as the GPU converts them: to nearest even, NaN to the one canonical NaN.
#pragma once

#include <cstring>

#include "core/platform.h"

namespace tf::emulator {

TF_INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
TF_INLINE float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

TF_INLINE float bfloat16_to_float(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

TF_INLINE uint16_t float_to_bfloat16(float x) {
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The exponent is moved from bias 15 to bias 127. What that makes wrong: infinities and NaN, whose exponent must become
// the greatest one, and subnormals, which the subtraction normalises.
TF_INLINE float float16_to_float(uint16_t x) {
    constexpr uint32_t kExponent = 0x7c00u << 13;
    uint32_t bits = (x & 0x7fffu) << 13;
    const uint32_t exponent = bits & kExponent;
    bits += (127u - 15u) << 23;
    bits += exponent == kExponent ? (128u - 16u) << 23 : 0;
    const float subnormal = float_of(bits + (1u << 23)) - float_of(113u << 23);
    bits = exponent == 0 ? bits_of(subnormal) : bits;
    return float_of(bits | (x & 0x8000u) << 16);
}

TF_INLINE uint16_t float_to_float16(float x) {
    const uint32_t sign = bits_of(x) & 0x80000000u;
    uint32_t bits = bits_of(x) ^ sign;
    if (bits > 0x7f800000u) return 0x7fff;
    if (bits >= (127u + 16u) << 23) {
        bits = 0x7c00;
    } else if (bits < 113u << 23) {
        // Subnormal: added to a number whose last place is a subnormal's, the sum is rounded there.
        constexpr uint32_t kMagic = (127u - 15u + 23u - 10u + 1u) << 23;
        bits = bits_of(float_of(bits) + float_of(kMagic)) - kMagic;
    } else {
        bits += 0xfffu + ((bits >> 13) & 1u) - ((127u - 15u) << 23);
        bits >>= 13;
    }
    return static_cast<uint16_t>(bits | sign >> 16);
}

template <bool kBfloat16>
TF_INLINE float half_to_float(uint16_t x) {
    if constexpr (kBfloat16) return bfloat16_to_float(x);
    return float16_to_float(x);
}

}  // namespace tf::emulator
