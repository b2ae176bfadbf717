// Segments of a tensor side by side, and what their gradients add up to.

#pragma once

#include "scalars.hpp"

namespace nipq {

struct Sums {
  double slope = 0;             // in range: gradient * noise, or gradient * error
  double lower = 0, upper = 0;  // truncated: gradient

  void add(const Sums &other) {
    slope += other.slope;
    lower += other.lower;
    upper += other.upper;
  }
};

template <class Work> void for_segments(const Call &call, Work work) {
  const Index segments = call.segments();
  const bool parallel = call.threads > 1 && segments > 1 && call.elements > (1 << 15);
#pragma omp parallel for num_threads(call.threads) if (parallel)
  for (Index s = 0; s < segments; ++s)
    work(s, s % call.channels, s * call.length, std::min((s + 1) * call.length, call.elements));
}

// From the sums of the segments, added up in the order of memory (so alike for any number of threads), to the gradients
// of clipping ranges and bits, or of the parameters behind them. The step is alpha / n; the ends are -alpha and alpha, 0 and
// alpha, or -zero step and alpha - zero step, with the zero point held constant.
inline void finish_gradients(const Call &call, const std::vector<Range> &ranges, const std::vector<Sums> &parts,
                             float *d_alpha, float *d_bits) {
  std::vector<Sums> total(call.channels);
  for (std::size_t s = 0; s < parts.size(); ++s) total[s % call.channels].add(parts[s]);
  double bits = 0;
  for (Index c = 0; c < call.channels; ++c) {
    const Range &r = ranges[c];
    const double moved = total[c].slope - r.zero * (total[c].lower + total[c].upper);
    const double alpha = moved / r.n + total[c].upper - (call.grid == 0 || call.grid == 3 ? total[c].lower : 0);
    d_alpha[c] = float(alpha * (call.alpha ? 1 : sigmoid(call.alpha_raw[c])));
    bits += moved * r.step_slope;
  }
  if (!d_bits) return;
  const double share = call.bit_raw ? sigmoid(*call.bit_raw) : 0;
  *d_bits = float(bits * (call.bit_raw ? (call.high - call.low) * share * (1 - share) : 1));
}

}  // namespace nipq
