// Element types. All arithmetic is in float32; a result is rounded to its type once.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace nipq {

using Index = std::int64_t;
constexpr Index BLOCK = 512;  // elements worked on at a time: their noise stays in the first cache

struct BFloat16 {
  std::uint16_t bits;
};

inline float as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline std::uint32_t as_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <class T> struct Element;
template <> struct Element<float> {
  static float load(float value) { return value; }
  static float round(float value) { return value; }
  static float store(float value) { return value; }
  static constexpr std::uint32_t STEP = 1;
};
template <> struct Element<BFloat16> {
  static float load(BFloat16 value) { return as_float(std::uint32_t(value.bits) << 16); }
  static float round(float value) {  // to the nearest of the type, ties to even, as torch does
    std::uint32_t bits = as_bits(value);
    return as_float(value == value ? (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u : 0x7fc00000u);
  }
  static BFloat16 store(float value) { return {std::uint16_t(as_bits(value) >> 16)}; }
  static constexpr std::uint32_t STEP = 0x10000;  // the upper half of a float32
};

// The next number of a type in a direction; next to 0 the least one with full precision.
template <class T> inline float above(float value) {
  const std::uint32_t bits = as_bits(value);
  return value == 0 ? 0x1p-126f : as_float(value > 0 ? bits + Element<T>::STEP : bits - Element<T>::STEP);
}
template <class T> inline float below(float value) { return -above<T>(-value); }

}  // namespace nipq
