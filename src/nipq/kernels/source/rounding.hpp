// The true quantizer: nipq.functional.uniform.

#pragma once

#include "segments.hpp"

namespace nipq {

// code = clamp(round_half_even(x / step), low, high), or clamp(floor(x / step) + 1/2, low, high) on a balanced grid
template <bool balanced> inline float code_of(float x, const Range &r) {
  const float place = x / r.step;
  return std::min(std::max(balanced ? std::floor(place) + 0.5f : std::nearbyint(place), r.low), r.high);
}

template <class T, bool balanced>
void round_forward(const T *__restrict x, T *__restrict y, Index begin, Index end, const Range &r, float cap) {
#pragma GCC ivdep
  for (Index i = begin; i < end; ++i) {
    const float value = std::min(Element<T>::load(x[i]), cap), level = code_of<balanced>(value, r) * r.step;
    y[i] = Element<T>::store(Element<T>::round(value == value ? level : value));
  }
}

template <class T, bool balanced>
Sums round_backward(const T *__restrict grad, const T *__restrict x, T *__restrict dx, Index begin, Index end,
                    const Range &r, float cap) {
  Sums sums;
  for (Index at = begin; at < end; at += BLOCK) {
    const Index stop = std::min(at + BLOCK, end);
    float slope = 0, lower = 0, upper = 0;
#pragma omp simd reduction(+ : slope, lower, upper)
    for (Index i = at; i < stop; ++i) {
      const float g = Element<T>::load(grad[i]), given = Element<T>::load(x[i]), v = std::min(given, cap);
      const bool within = (v > r.lower) & (v < r.upper);  // not a number is not
      dx[i] = Element<T>::store(within & (given < cap) ? g : 0);
      slope += within ? g * (code_of<balanced>(v, r) - v / r.step) : 0;
      lower += v <= r.lower ? g : 0;
      upper += v >= r.upper ? g : 0;
    }
    sums.add({slope, lower, upper});
  }
  return sums;
}

}  // namespace nipq
