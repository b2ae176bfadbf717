// What one call is about.

#pragma once

#include "element.hpp"

namespace nipq {

struct Call {  // the same fields, in the same order, as nipq.kernels.cpu.Call
  Index elements;  // of the tensor, in the order of memory
  Index length;    // consecutive elements that share a clipping range, or that make one share of the work
  Index channels;  // clipping ranges; segment s has clipping range s % channels

  const float *alpha;      // clipping ranges, or null:
  const float *alpha_raw;  // parameters of them

  const float *bits;                // a whole bit-width, or null:
  const std::int64_t *bits_frozen;  // the same as an integer, or null:
  const float *bit_raw;             // parameter from which one is drawn; with ``bits``, where its gradient goes
  double low, high;                 // ends of the range of learned bits
  std::uint32_t choices;            // bit b is set where b bits are allowed
  std::int32_t stochastic;          // draw a whole bit-width by the key, or take the nearest

  std::int32_t grid;  // 0 signed, 1 unsigned, 2 shifted, 3 balanced
  double shift;       // of a shifted grid
  double cap;         // upper end of a ReLU6 in front that was left out, else infinity

  const std::uint64_t *key;         // of the noise
  const float *table;               // errors to draw from, or null for uniform noise
  const std::int64_t *table_count;  // how many of them; 0 stands for uniform noise as well

  std::int32_t bfloat16;  // element type, else float32
  std::int32_t threads;

  Index segments() const { return (elements + length - 1) / length; }
};

}  // namespace nipq
