// The noise proxy: nipq.functional.proxy.

#pragma once

#include "noise.hpp"
#include "segments.hpp"

namespace nipq {

template <class T> struct Ends {  // as stored; an in-range result that falls on an end moves one number inward
  float lower, upper, inside_lower, inside_upper;
  explicit Ends(const Range &r) : lower(Element<T>::round(r.lower)), upper(Element<T>::round(r.upper)) {
    inside_lower = Element<T>::above(lower);
    inside_upper = Element<T>::below(upper);
  }
};

template <class T>
void proxy_forward(const T *__restrict x, T *__restrict y, Index begin, Index end, const Range &r, const Noise &noise) {
  using E = Element<T>;
  const Ends<T> ends(r);
  alignas(64) float drawn[BLOCK];
  for (Index at = begin & ~Index(1); at < end; at += BLOCK) {
    noise.fill(drawn, at);
    const Index first = std::max(at, begin), count = std::min(at + BLOCK, end) - first;
    const float *eps = drawn + (first - at);
    const T *from = x + first;
    T *to = y + first;
#pragma GCC ivdep
    for (Index i = 0; i < count; ++i) {
      float value = E::load(from[i]);
      float noisy = E::round(value + eps[i] * r.step);
      noisy = noisy == ends.lower ? ends.inside_lower : noisy;
      noisy = noisy == ends.upper ? ends.inside_upper : noisy;
      noisy = value <= r.lower ? ends.lower : noisy;
      to[i] = E::store(value >= r.upper ? ends.upper : noisy);
    }
  }
}

template <class T>
Sums proxy_backward(const T *__restrict grad, const T *__restrict y, T *__restrict dx, Index begin, Index end,
                    const Range &r, const Noise &noise) {
  using E = Element<T>;
  const Ends<T> ends(r);
  alignas(64) float drawn[BLOCK];
  Sums sums;
  for (Index at = begin & ~Index(1); at < end; at += BLOCK) {
    noise.fill(drawn, at);
    const Index first = std::max(at, begin), count = std::min(at + BLOCK, end) - first;
    const float *eps = drawn + (first - at);
    const T *from = grad + first, *value = y + first;
    T *to = dx + first;
    float slope = 0, lower = 0, upper = 0;
#pragma omp simd reduction(+ : slope, lower, upper)
    for (Index i = 0; i < count; ++i) {
      float g = E::load(from[i]), v = E::load(value[i]);
      float below = v == ends.lower ? g : 0, above = v == ends.upper ? g : 0;
      float inside = (v == ends.lower) | (v == ends.upper) ? 0 : g;
      to[i] = E::store(inside);
      slope += inside * eps[i];
      lower += below;
      upper += above;
    }
    sums.slope += slope;
    sums.lower += lower;
    sums.upper += upper;
  }
  return sums;
}

}  // namespace nipq
