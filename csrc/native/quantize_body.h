// The body of the quantiser, written once on vectors of eight floats and compiled twice: into two
// SSE registers (quantize_baseline.cpp) and into one AVX2 register (quantize_avx2.cpp). Everything
// is static and no library header is used, so neither file can hand the other a function. See
// quantize.h.
#pragma once

#include <stdint.h>
#include <string.h>

#include "quantize.h"

namespace nibblock {
namespace native {
namespace {

typedef float V8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));

#define NB_INLINE static inline __attribute__((always_inline))

NB_INLINE V8 load(const float* p) {
  V8 v;
  memcpy(&v, p, sizeof v);
  return v;
}
NB_INLINE void store(float* p, V8 v) { memcpy(p, &v, sizeof v); }
NB_INLINE V8 splat(float f) { return V8{f, f, f, f, f, f, f, f}; }
NB_INLINE V8 vmin(V8 a, V8 b) { return a < b ? a : b; }
NB_INLINE V8 vmax(V8 a, V8 b) { return a > b ? a : b; }
// Nearest integer, ties to even, for |v| < 2^22: the addition leaves no bit below one.
NB_INLINE V8 vround(V8 v) {
  const V8 magic = splat(12582912.0f);
  return (v + magic) - magic;
}
NB_INLINE V8 to_code(V8 v, V8 top) { return vround(vmin(vmax(v, splat(0.0f)), top)); }
NB_INLINE double total(V8 v) {
  return ((static_cast<double>(v[0]) + v[4]) + (static_cast<double>(v[2]) + v[6])) +
         ((static_cast<double>(v[1]) + v[5]) + (static_cast<double>(v[3]) + v[7]));
}

// 2^e for -126 <= e <= 127.
NB_INLINE float power_of_two(int e) {
  const uint32_t bits = static_cast<uint32_t>(e + 127) << 23;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// One group, padded to a multiple of 8 with copies of its last value that have no weight.
struct Group {
  int64_t count, padded;
  float* x;                     // scaled values
  float* q;                     // weights of the squared error, 0 in the padding
  float* xq;                    // x * q
  float* codes;                 // the codes kept so far
  float* trial;                 // codes being tried
  double sum_q, sum_x, sum_xx;  // sums of q, x q, x x q
};

struct Fit {
  float scale, offset;
  double error;  // weighted squared error by the sums below; ranks candidates only
};

// trial = clamp(round((x - lo) * inverse)), then the best scale and offset for those codes. With
// `zero` >= 0 the form is symmetric: offset = -zero * scale.
NB_INLINE bool try_codes(const Group& g, float lo, float inverse, float top, float zero, Fit* fit) {
  const V8 vlo = splat(lo), vinv = splat(inverse), vtop = splat(top);
  const V8 vzero = splat(zero < 0 ? 0.0f : zero);
  V8 c1 = splat(0), c2 = splat(0), xc = splat(0);
  for (int64_t i = 0; i < g.padded; i += 8) {
    const V8 code = to_code((load(g.x + i) - vlo) * vinv, vtop);
    store(g.trial + i, code);
    const V8 c = code - vzero, qc = load(g.q + i) * c;
    c1 += qc;
    c2 += qc * c;
    xc += load(g.xq + i) * c;
  }
  const double sum_c = total(c1), sum_cc = total(c2), sum_xc = total(xc);
  if (zero >= 0) {
    if (!(sum_cc > 0)) return false;
    const double scale = sum_xc / sum_cc;
    fit->scale = static_cast<float>(scale);
    fit->offset = -zero * fit->scale;
    fit->error = g.sum_xx - scale * sum_xc;
    return scale != 0;
  }
  // Sums about the means: the plain ones would cancel where the offset is large.
  const double mean_c = sum_c / g.sum_q, mean_x = g.sum_x / g.sum_q;
  const double var_c = sum_cc - mean_c * sum_c;
  if (!(var_c > 1e-6 * sum_cc)) return false;  // one code only
  const double cov = sum_xc - mean_c * g.sum_x;
  const double scale = cov / var_c;
  fit->scale = static_cast<float>(scale);
  fit->offset = static_cast<float>(mean_x - scale * mean_c);
  fit->error = (g.sum_xx - mean_x * g.sum_x) - scale * cov;
  return scale > 0;
}

// The weighted squared error of what a kernel will multiply with, in float64.
NB_INLINE double true_error(const Group& g, const float* codes, float scale, float offset) {
  double lanes[4] = {0, 0, 0, 0};
  const double s = scale, o = offset;
  for (int64_t i = 0; i < g.padded; i += 4) {
    for (int j = 0; j < 4; ++j) {
      const double d = g.x[i + j] - (s * codes[i + j] + o);
      lanes[j] += d * d * g.q[i + j];
    }
  }
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

NB_INLINE void search_affine(Group& g, float lo, float hi, float top, float* scale, float* offset) {
  // Steps of the grid as shares of the range: both ends move in, and out by one step. Four bits
  // gain from clipping up to about a quarter of the range at either end, eight bits from next to
  // none.
  const float step = top > 15 ? 0.0025f : 0.035f;
  const float range = hi - lo;
  Fit best = {0, 0, 1e300}, fit;
  for (int a = -1; a <= 7; ++a) {
    for (int b = -1; b <= 7; ++b) {
      const float from = lo + static_cast<float>(a) * step * range;
      const float to = hi - static_cast<float>(b) * step * range;
      if (try_codes(g, from, top / (to - from), top, -1, &fit) && fit.error < best.error)
        best = fit;
    }
  }
  for (int i = 0; i < 8 && best.error < 1e300; ++i) {
    if (!try_codes(g, best.offset, 1.0f / best.scale, top, -1, &fit)) break;
    if (!(fit.error < best.error)) break;
    best = fit;
  }
  if (best.error == 1e300) return;
  try_codes(g, best.offset, 1.0f / best.scale, top, -1, &fit);
  if (true_error(g, g.trial, best.scale, best.offset) < true_error(g, g.codes, *scale, *offset)) {
    *scale = best.scale;
    *offset = best.offset;
    memcpy(g.codes, g.trial, static_cast<size_t>(g.padded) * sizeof(float));
  }
}

NB_INLINE void search_symmetric(Group& g, float top, float zero, float* scale) {
  const float step = top > 15 ? 0.002f : 0.0175f;
  const float base = *scale;
  Fit best = {0, 0, 1e300}, fit;
  // The far end has one code more than the near one, so the sign is part of the search.
  for (int sign = -1; sign <= 1; sign += 2) {
    for (int a = -10; a <= 20; ++a) {
      const float s = static_cast<float>(sign) * base * (1.0f - static_cast<float>(a) * step);
      if (try_codes(g, -zero * s, 1.0f / s, top, zero, &fit) && fit.error < best.error) best = fit;
    }
  }
  for (int i = 0; i < 8 && best.error < 1e300; ++i) {
    if (!try_codes(g, best.offset, 1.0f / best.scale, top, zero, &fit)) break;
    if (!(fit.error < best.error)) break;
    best = fit;
  }
  if (best.error == 1e300) return;
  try_codes(g, best.offset, 1.0f / best.scale, top, zero, &fit);
  if (true_error(g, g.trial, best.scale, best.offset) <
      true_error(g, g.codes, *scale, -zero * *scale)) {
    *scale = best.scale;
    memcpy(g.codes, g.trial, static_cast<size_t>(g.padded) * sizeof(float));
  }
}

// Copies a group in, scaled. Returns false on a value that is not finite; *exponent is 1000 if all
// are 0.
NB_INLINE bool load_group(const float* w, Group* g, int* exponent) {
  g->padded = (g->count + 7) / 8 * 8;
  memcpy(g->x, w, static_cast<size_t>(g->count) * sizeof(float));
  for (int64_t i = g->count; i < g->padded; ++i) g->x[i] = w[g->count - 1];
  V8 largest = splat(0), zeros = splat(0);
  for (int64_t i = 0; i < g->padded; i += 8) {
    const V8 x = load(g->x + i);
    zeros += x - x;  // NaN from an infinity or a NaN
    largest = vmax(largest, vmax(x, -x));
  }
  if (!(total(zeros) == 0)) return false;
  float top = 0;
  for (int j = 0; j < 8; ++j) top = largest[j] > top ? largest[j] : top;
  *exponent = 1000;
  if (top == 0) return true;
  uint32_t bits;
  memcpy(&bits, &top, 4);
  int e = static_cast<int>(bits >> 23) - 127;
  e = e < -126 ? -126 : e > 126 ? 126 : e;
  const V8 factor = splat(power_of_two(-e));
  for (int64_t i = 0; i < g->padded; i += 8) store(g->x + i, load(g->x + i) * factor);
  *exponent = e;
  return true;
}

NB_INLINE void load_weights(const float* importance, Group* g) {
  V8 q1 = splat(0), x1 = splat(0), x2 = splat(0);
  for (int64_t i = 0; i < g->padded; ++i) {
    g->q[i] = i >= g->count ? 0.0f : importance ? importance[i] : 1.0f;
  }
  for (int64_t i = 0; i < g->padded; i += 8) {
    const V8 x = load(g->x + i), q = load(g->q + i), xq = x * q;
    store(g->xq + i, xq);
    q1 += q;
    x1 += xq;
    x2 += xq * x;
  }
  g->sum_q = total(q1);
  g->sum_x = total(x1);
  g->sum_xx = total(x2);
}

// Quantises the group in g->x: codes into g->codes, scale and offset in units of the scaled values.
NB_INLINE void quantize_group(const QuantizeParams& p, const float* importance, Group& g,
                              float* scale, float* offset) {
  const float top = p.bits == 8 ? 255.0f : 15.0f, zero = p.bits == 8 ? 128.0f : 8.0f;
  V8 vlo = load(g.x), vhi = vlo;
  for (int64_t i = 8; i < g.padded; i += 8) {
    vlo = vmin(vlo, load(g.x + i));
    vhi = vmax(vhi, load(g.x + i));
  }
  float lo = vlo[0], hi = vhi[0];
  for (int j = 1; j < 8; ++j) {
    lo = vlo[j] < lo ? vlo[j] : lo;
    hi = vhi[j] > hi ? vhi[j] : hi;
  }
  if (p.affine) {
    *scale = (hi - lo) / top;
    *offset = lo;
  } else {
    *scale = (-lo >= hi ? lo : hi) / -zero;
    *offset = 0;
  }
  if (*scale == 0) {  // constant: offset alone says it
    for (int64_t i = 0; i < g.padded; ++i) g.codes[i] = 0;
    return;
  }
  const V8 vscale = splat(*scale), vtop = splat(top);
  const V8 vfrom = splat(p.affine ? lo : 0.0f), vzero = splat(p.affine ? 0.0f : zero);
  for (int64_t i = 0; i < g.padded; i += 8) {
    // Divided, not multiplied by an inverse: what the formula says, to the bit.
    const V8 t = vround((load(g.x + i) - vfrom) / vscale) + vzero;
    store(g.codes + i, vmin(vmax(t, splat(0.0f)), vtop));
  }
  if (!p.search) return;
  load_weights(importance, &g);
  if (!(g.sum_q > 0)) load_weights(nullptr, &g);  // no weight at all: every error counts the same
  if (p.affine) {
    search_affine(g, lo, hi, top, scale, offset);
  } else {
    search_symmetric(g, top, zero, scale);
  }
}

NB_INLINE void store_codes(const QuantizeParams& p, const float* codes, uint8_t* out) {
  if (p.bits == 8) {
    for (int64_t k = 0; k < p.k; ++k) out[k] = static_cast<uint8_t>(static_cast<int32_t>(codes[k]));
    return;
  }
  for (int64_t b = 0; b < (p.k + 1) / 2; ++b) {  // an odd k is followed by a zero in the scratch
    const int32_t pair = static_cast<int32_t>(codes[2 * b] + 16.0f * codes[2 * b + 1]);
    out[b] = static_cast<uint8_t>(pair);
  }
}

int64_t quantize_rows(const QuantizeParams& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t room = p.group + 8;
  Group g;
  g.x = scratch;
  g.q = scratch + room;
  g.xq = scratch + 2 * room;
  g.codes = scratch + 3 * room;
  g.trial = scratch + 4 * room;
  float* row_codes = scratch + 5 * room;
  for (int64_t n = begin; n < end; ++n) {
    const float* w = p.weight + n * p.k;
    row_codes[p.k] = 0;
    for (int64_t gi = 0; gi < p.groups && p.k > 0; ++gi) {
      const int64_t at = gi * p.group;
      g.count = p.k - at < p.group ? p.k - at : p.group;
      int exponent;
      if (!load_group(w + at, &g, &exponent)) return n;
      float scale = 0, offset = 0;
      if (exponent == 1000) {
        const float code = p.affine ? 0.0f : p.bits == 8 ? 128.0f : 8.0f;
        for (int64_t i = 0; i < g.count; ++i) g.codes[i] = code;
        exponent = 0;
      } else {
        quantize_group(p, p.importance ? p.importance + at : nullptr, g, &scale, &offset);
      }
      memcpy(row_codes + at, g.codes, static_cast<size_t>(g.count) * sizeof(float));
      p.scales[n * p.groups + gi] = scale * power_of_two(exponent);
      if (p.affine) p.offsets[n * p.groups + gi] = offset * power_of_two(exponent);
    }
    store_codes(p, row_codes, p.qweight + n * (p.bits == 8 ? p.k : (p.k + 1) / 2));
  }
  return -1;
}

}  // namespace
}  // namespace native
}  // namespace nibblock
