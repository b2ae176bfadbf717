// One pass forward and one pass backward for the noise proxy and for the true quantizer, on a CPU.
//
// The formulas are those of nipq.functional, which the tests hold these files to, bit for bit. Compiled on first use by
// nipq.kernels.cpu; no header of torch is needed. Keep -ffp-contract=off: a multiply and an add fused into one would
// round once where torch rounds twice.

#include "proxy.hpp"
#include "rounding.hpp"

namespace nipq {

template <class T> void run_proxy_forward(const Call &call, const void *x, void *y) {
  const Noise noise(call);
  const auto ranges = ranges_of(call);
  for_segments(call, [&](Index, Index channel, Index begin, Index end) {
    const Range &range = ranges[channel];
    const auto run = call.cap < range.upper ? proxy_forward<T, true> : proxy_forward<T, false>;
    run(static_cast<const T *>(x), static_cast<T *>(y), begin, end, range, noise, float(call.cap));
  });
}

template <class T>
void run_proxy_backward(const Call &call, const void *grad, const void *y, void *dx, float *d_alpha, float *d_bits) {
  const Noise noise(call);
  const auto ranges = ranges_of(call);
  std::vector<Sums> parts(call.segments());
  for_segments(call, [&](Index s, Index channel, Index begin, Index end) {
    const Range &range = ranges[channel];
    const auto run = call.cap < range.upper ? proxy_backward<T, true> : proxy_backward<T, false>;
    parts[s] = run(static_cast<const T *>(grad), static_cast<const T *>(y), static_cast<T *>(dx), begin, end, range,
                   noise, float(call.cap));
  });
  finish_gradients(call, ranges, parts, d_alpha, d_bits);
}

template <class T> void run_round_forward(const Call &call, const void *x, void *y) {
  const auto ranges = ranges_of(call);
  for_segments(call, [&](Index, Index channel, Index begin, Index end) {
    const auto run = call.grid == 3 ? round_forward<T, true> : round_forward<T, false>;
    run(static_cast<const T *>(x), static_cast<T *>(y), begin, end, ranges[channel], float(call.cap));
  });
}

template <class T>
void run_round_backward(const Call &call, const void *grad, const void *x, void *dx, float *d_alpha, float *d_bits) {
  const auto ranges = ranges_of(call);
  std::vector<Sums> parts(call.segments());
  for_segments(call, [&](Index s, Index channel, Index begin, Index end) {
    const auto run = call.grid == 3 ? round_backward<T, true> : round_backward<T, false>;
    parts[s] = run(static_cast<const T *>(grad), static_cast<const T *>(x), static_cast<T *>(dx), begin, end,
                   ranges[channel], float(call.cap));
  });
  finish_gradients(call, ranges, parts, d_alpha, d_bits);
}

}  // namespace nipq

extern "C" {

using nipq::BFloat16;
using nipq::Call;

void nipq_proxy_forward(const Call *call, const void *x, void *y) {
  (call->bfloat16 ? nipq::run_proxy_forward<BFloat16> : nipq::run_proxy_forward<float>)(*call, x, y);
}

void nipq_proxy_backward(const Call *call, const void *grad, const void *y, void *dx, float *d_alpha, float *d_bits) {
  (call->bfloat16 ? nipq::run_proxy_backward<BFloat16> : nipq::run_proxy_backward<float>)(*call, grad, y, dx, d_alpha,
                                                                                          d_bits);
}

void nipq_round_forward(const Call *call, const void *x, void *y) {
  (call->bfloat16 ? nipq::run_round_forward<BFloat16> : nipq::run_round_forward<float>)(*call, x, y);
}

void nipq_round_backward(const Call *call, const void *grad, const void *x, void *dx, float *d_alpha, float *d_bits) {
  (call->bfloat16 ? nipq::run_round_backward<BFloat16> : nipq::run_round_backward<float>)(*call, grad, x, dx, d_alpha,
                                                                                          d_bits);
}
}
