// The two 16-bit float formats as they lie in memory, one value at a time. The vector kernels convert by themselves.
#pragma once

#include <cstdint>
#include <cstring>

namespace miwv::cpu {

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct BFloat16 {
  uint16_t bits;
  operator float() const { return float_from_bits(static_cast<uint32_t>(bits) << 16); }
};

struct Float16 {
  uint16_t bits;
  operator float() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    const uint32_t exponent = (bits >> 10) & 31;
    const uint32_t mantissa = bits & 1023;
    if (exponent == 31) return float_from_bits(sign | 0x7f800000 | (mantissa << 13));
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(mantissa) * 0x1p-24f;
    return float_from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
  }
};

}  // namespace miwv::cpu
