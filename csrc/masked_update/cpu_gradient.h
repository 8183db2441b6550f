// Masked passes over gradients and the group-lasso step, one vector at a time. Sums of squares are
// taken in float64, task by task: their order depends on shapes alone.
#pragma once

#include "cpu_update.h"

namespace nibblock {
namespace {

// Squares of a run of active entries, and the entries times `scale` in place.
template <class O, class P>
static double pass_span(P type, char* grad, int64_t count, bool sums, bool write, float scale) {
  constexpr int size = size_of(P{});
  const typename O::F by = O::set1f(scale);
  typename O::D a = O::zerod(), b = O::zerod();
  int64_t i = 0;
  for (; i + 2 * O::kLanes <= count; i += 2 * O::kLanes) {
    const typename O::F u = O::load_as(type, grad + i * size);
    const typename O::F v = O::load_as(type, grad + (i + O::kLanes) * size);
    if (sums) {
      a = O::add_squares(a, u);
      b = O::add_squares(b, v);
    }
    if (write) {
      O::store_as(type, grad + i * size, O::mulf(u, by));
      O::store_as(type, grad + (i + O::kLanes) * size, O::mulf(v, by));
    }
  }
  double rest = 0.0;
  const Dtype dtype = size == 4 ? Dtype::kF32 : Dtype::kBF16;
  for (; i < count; ++i) {
    const float g = load_as_f32(grad, dtype, i);
    rest += static_cast<double>(g) * g;
    if (write) store_f32_as(grad, dtype, i, g * scale);
  }
  return sums ? O::total(a) + O::total(b) + rest : 0.0;
}

// A chunk with a mask. Inactive entries become +0 whatever they were, NaN included.
template <class O, class P>
static double pass_masked(P type, char* grad, const uint8_t* mask, int64_t count, bool sums,
                          bool write, float scale) {
  constexpr int size = size_of(P{});
  const Dtype dtype = size == 4 ? Dtype::kF32 : Dtype::kBF16;
  double sum = 0.0;
  int64_t i = 0;
  if constexpr (O::kExpand) {
    const typename O::F by = O::set1f(scale);
    typename O::D a = O::zerod();
    for (; i + O::kLanes <= count; i += O::kLanes) {
      const typename O::Mask k = O::mask_of(mask + i, O::kLanes);
      const typename O::F g = O::load_masked(type, k, grad + i * size);
      if (sums) a = O::add_squares(a, g);
      // Not 0 * scale: that is -0, or NaN where scale is infinite.
      if (write) O::store_as(type, grad + i * size, O::keep(k, O::mulf(g, by)));
    }
    sum = O::total(a);
  }
  for (; i < count; ++i) {
    const float g = mask[i] ? load_as_f32(grad, dtype, i) : 0.0f;
    sum += static_cast<double>(g) * g;
    if (write) store_f32_as(grad, dtype, i, mask[i] ? g * scale : 0.0f);
  }
  return sum;
}

template <class O, class P>
static double grad_task(const GradParams& p, const GradTensor& t, P type, int64_t task) {
  constexpr int size = size_of(P{});
  const bool sums = p.sums != nullptr;
  char* grad = static_cast<char*>(t.grad);
  if (!p.blocks) {
    const int64_t begin = task * kUpdateTaskEntries;
    const int64_t count = min64(t.rows - begin, kUpdateTaskEntries);
    grad += begin * size;
    if (!t.mask) return pass_span<O>(type, grad, count, sums, p.write, p.scale);
    return pass_masked<O>(type, grad, t.mask + begin, count, sums, p.write, p.scale);
  }
  // The blocks of this row of blocks: [first, last) of the sorted list.
  int64_t first = 0, high = t.count;
  while (first < high) {
    const int64_t middle = (first + high) / 2;
    if (t.blocks[2 * middle] < task) {
      first = middle + 1;
    } else {
      high = middle;
    }
  }
  int64_t last = first;
  while (last < t.count && t.blocks[2 * last] == task) ++last;
  const int64_t B = p.block;
  double sum = 0.0;
  for (int64_t i = task * B; i < min64(t.rows, (task + 1) * B); ++i) {
    char* row = grad + i * t.stride * size;
    int64_t done = 0;
    for (int64_t e = first; e < last; ++e) {
      const int64_t from = t.blocks[2 * e + 1] * B, to = min64(t.cols, from + B);
      if (p.write && done < from) memset(row + done * size, 0, (from - done) * size);
      sum += pass_span<O>(type, row + from * size, to - from, sums, p.write, p.scale);
      done = to;
    }
    if (p.write && done < t.cols) memset(row + done * size, 0, (t.cols - done) * size);
  }
  return sum;
}

template <class O>
static Status masked_grad(const GradParams& p) {
  auto body = [&](int64_t begin, int64_t end) {
    double* sum = p.sums ? p.sums + begin : nullptr;
    each_task(p.tensors, p.tensor_count, begin, end, [&](const GradTensor& t, int64_t task) {
      const double found = t.type == Dtype::kF32 ? grad_task<O>(p, t, FloatBits::F32{}, task)
                                                 : grad_task<O>(p, t, FloatBits::BF16{}, task);
      if (sum) *sum++ = found;
    });
  };
  parallel_for(worth_tasks(p.parallel, p.task_count), p.task_count, body);
  return kOk;
}

// --- group lasso ---------------------------------------------------------------------------------

template <class O, class P>
static void prox_task(const ProxTensor& t, P type, int64_t z) {
  constexpr int size = size_of(P{});
  const Dtype dtype = size == 4 ? Dtype::kF32 : Dtype::kBF16;
  char* values = static_cast<char*>(t.values) + z * t.size * size;
  const char* origin = t.origin ? static_cast<const char*>(t.origin) + z * t.size * size : nullptr;
  const typename O::F zero = O::set1f(0.0f);
  typename O::D a = O::zerod();
  double sum = 0.0;
  int64_t i = 0;
  for (; i + O::kLanes <= t.size; i += O::kLanes) {
    const typename O::F o = origin ? O::load_as(type, origin + i * size) : zero;
    a = O::add_squares(a, O::subf(O::load_as(type, values + i * size), o));
  }
  for (; i < t.size; ++i) {
    const float d = load_as_f32(values, dtype, i) - (origin ? load_as_f32(origin, dtype, i) : 0.0f);
    sum += static_cast<double>(d) * d;
  }
  const double norm = sqrt(O::total(a) + sum), threshold = t.thresholds[z];
  double scale = norm > 0.0 ? 1.0 - threshold / norm : 1.0;
  if (scale <= 0.0) scale = 0.0;  // not for NaN, which stays
  if (norm != norm) scale = norm;
  const float factor = static_cast<float>(scale);
  t.norms[z] = factor == 0.0f ? 0.0f : static_cast<float>(norm * scale);
  if (factor == 1.0f) return;
  if (factor == 0.0f) {
    if (origin) {
      memcpy(values, origin, t.size * size);
    } else {
      memset(values, 0, t.size * size);
    }
    return;
  }
  const typename O::F by = O::set1f(factor);
  for (i = 0; i + O::kLanes <= t.size; i += O::kLanes) {
    const typename O::F o = origin ? O::load_as(type, origin + i * size) : zero;
    const typename O::F d = O::subf(O::load_as(type, values + i * size), o);
    O::store_as(type, values + i * size, O::addf(o, O::mulf(d, by)));
  }
  for (; i < t.size; ++i) {
    const float o = origin ? load_as_f32(origin, dtype, i) : 0.0f;
    store_f32_as(values, dtype, i, o + (load_as_f32(values, dtype, i) - o) * factor);
  }
}

template <class O>
static Status prox_blocks(const ProxParams& p) {
  auto body = [&](int64_t begin, int64_t end) {
    each_task(p.tensors, p.tensor_count, begin, end, [&](const ProxTensor& t, int64_t z) {
      if (t.type == Dtype::kF32) {
        prox_task<O>(t, FloatBits::F32{}, z);
      } else {
        prox_task<O>(t, FloatBits::BF16{}, z);
      }
    });
  };
  parallel_for(worth_tasks(p.parallel, p.task_count), p.task_count, body);
  return kOk;
}

}  // namespace
}  // namespace nibblock
