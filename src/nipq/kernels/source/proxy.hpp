// The noise proxy: nipq.functional.proxy.

#pragma once

#include "noise.hpp"
#include "segments.hpp"

namespace nipq {

// The ends of the range as stored. Backward tells what was truncated by its value, so an in-range result that falls on
// an end moves inward by one number; likewise one that falls where the cap of a ReLU6 with the same noise is.
template <class T> struct Ends {
  float lower, upper, inside_lower, inside_upper, step;
  explicit Ends(const Range &r)
      : lower(Element<T>::round(r.lower)), upper(Element<T>::round(r.upper)), inside_lower(above<T>(lower)),
        inside_upper(below<T>(upper)), step(r.step) {}
  float inside(float value, float noise) const {
    const float noisy = Element<T>::round(value + noise * step);
    return noisy == lower ? inside_lower : noisy == upper ? inside_upper : noisy;
  }
};

// capped: by a number below the upper end
template <class T, bool capped>
void proxy_forward(const T *__restrict x, T *__restrict y, Index begin, Index end, const Range &r, const Noise &noise,
                   float cap) {
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
      const float value = E::load(from[i]);
      float result = ends.inside(value, eps[i]);
      if (capped) {
        const float highest = ends.inside(cap, eps[i]);
        result = value >= cap ? highest : result == highest ? below<T>(result) : result;
      }
      result = value <= r.lower ? ends.lower : result;
      to[i] = E::store(!capped && value >= r.upper ? ends.upper : result);
    }
  }
}

template <class T, bool capped>
Sums proxy_backward(const T *__restrict grad, const T *__restrict y, T *__restrict dx, Index begin, Index end,
                    const Range &r, const Noise &noise, float cap) {
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
      const float g = E::load(from[i]), v = E::load(value[i]);
      const float inside = (v == ends.lower) | (v == ends.upper) | (v != v) ? 0 : g;
      to[i] = E::store(capped && v == ends.inside(cap, eps[i]) ? 0 : inside);
      slope += inside * eps[i];
      lower += v == ends.lower ? g : 0;
      upper += v == ends.upper ? g : 0;
    }
    sums.add({slope, lower, upper});
  }
  return sums;
}

}  // namespace nipq
