// What all elements of a tensor, or of a channel, share: nipq.functional.bitwidth, clipping, counter_rng and grid.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "call.hpp"

namespace nipq {

struct Key {
  std::uint32_t low = 0, high = 0;
};

inline Key key_of(const Call &call) {
  return call.key ? Key{std::uint32_t(*call.key), std::uint32_t(*call.key >> 32)} : Key{};
}

// 32 random bits for a pair of elements.
inline std::uint32_t mix(std::uint32_t pair, Key key) {
  std::uint32_t h = pair * 0x9e3779b9u + key.low;
  h ^= h >> 16;
  h = h * 0x7feb352du + key.high;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  h ^= h >> 16;
  return h;
}

inline double sigmoid(double raw) { return 1 / (1 + std::exp(-raw)); }

// The whole bit-width that a soft one stands for: one of the two choices around it.
inline float whole_bits(const Call &call, float soft) {
  int lower = -1, upper = -1;  // beyond the ends the outermost two
  for (int b = 0; b < 32; ++b) {
    if (!(call.choices >> b & 1)) continue;
    if (upper >= 0 && lower != upper && soft < float(upper)) break;
    lower = upper < 0 ? b : upper;
    upper = b;
  }
  const float below = soft - float(lower), above = float(upper) - soft;
  if (!call.stochastic || lower == upper) return float(below <= above ? lower : upper);
  const float draw = float(mix(0xffffffffu, key_of(call)) >> 8) * 0x1p-24f;
  return float(draw < below / float(upper - lower) ? upper : lower);
}

inline float bits_of(const Call &call) {
  if (call.bits) return *call.bits;
  if (call.bits_frozen) return float(*call.bits_frozen);
  return whole_bits(call, float(call.low + (call.high - call.low) * sigmoid(*call.bit_raw)));
}

struct Range {
  float n, step, zero;   // zero: the zero point
  float low, high;       // codes
  float offset;          // of the levels from whole steps: 1/2 on a balanced grid
  float lower, upper;    // values
  double step_slope;     // d step / d bits
};

inline Range range_of(const Call &call, float alpha, float bits) {
  const bool both = call.grid == 0 || call.grid == 3;  // ends at -alpha and alpha
  const float power = std::exp2(both ? bits - 1 : bits);
  Range r{};
  r.offset = call.grid == 3 ? 0.5f : 0;
  r.n = power - 1 + r.offset;
  r.step = alpha / r.n;
  if (call.grid == 2) r.zero = std::min(std::nearbyint(float(call.shift) / r.step), std::floor(r.n));
  const float below = r.zero * r.step;
  r.low = both ? -r.n : -r.zero;
  r.high = r.n - r.zero;
  r.lower = both ? -alpha : -below;
  r.upper = alpha - below;
  r.step_slope = -double(alpha) * std::log(2.0) * power / (double(r.n) * r.n);
  return r;
}

inline std::vector<Range> ranges_of(const Call &call) {
  const float bits = bits_of(call);
  std::vector<Range> ranges(call.channels);
  for (Index c = 0; c < call.channels; ++c) {
    const double raw = call.alpha ? 0 : call.alpha_raw[c];  // softplus, linear above 20 as in torch
    ranges[c] = range_of(call, call.alpha ? call.alpha[c] : float(raw > 20 ? raw : std::log1p(std::exp(raw))), bits);
  }
  return ranges;
}

}  // namespace nipq
