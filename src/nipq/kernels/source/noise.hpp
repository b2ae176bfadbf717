// Noise of a block of elements, in units of the step: nipq.functional.counter and empirical.

#pragma once

#include "scalars.hpp"

namespace nipq {

struct Noise {
  Key key;
  const float *table;
  std::uint32_t count;

  explicit Noise(const Call &call)
      : key(key_of(call)), table(call.table), count(call.table ? std::uint32_t(*call.table_count) : 0) {}

  // Noise of elements first, first + 1, ... (first even) up to BLOCK of them.
  void fill(float *out, Index first) const {
    alignas(64) std::uint32_t bits[BLOCK / 2];
    for (int i = 0; i < BLOCK / 2; ++i) bits[i] = mix(std::uint32_t(first / 2 + i), key);
    if (count) {
      std::uint16_t half[BLOCK];
      std::memcpy(half, bits, sizeof half);
      for (int i = 0; i < BLOCK; ++i) out[i] = table[half[i] * count >> 16];
    } else {
      std::int16_t half[BLOCK];
      std::memcpy(half, bits, sizeof half);
      for (int i = 0; i < BLOCK; ++i) out[i] = (float(half[i]) + 0.5f) * 0x1p-16f;
    }
  }
};

}  // namespace nipq
