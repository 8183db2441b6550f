// muon_direction, one block of a task at a time. O holds the instructions.
//
// A block of 32 is 4 KB, and so are A, its polynomial and the next X: all stay in the first cache
// while 15 products of 65 kFLOP run on them, and only the gradient, the momentum and the direction
// touch memory. So the fused multiply-adds are all that counts. Each product is C = P Q or P^T Q
// with rows of Q and C as vectors and elements of P broadcast, which needs no transposition: A and
// its polynomial are symmetric (five eighths of them are multiplied out), and X stands on the left
// only as itself.
#pragma once

#include <string.h>

#include <algorithm>

#include "cpu_update.h"
#include "muon_direction.h"

namespace nibblock {
namespace {

// How a product ends: scale * sum + add * (what is in `base`) + diagonal on i = j.
struct MuonEnd {
  float scale, add, diagonal;
  const float* base;
};

// ROWS x COLS vectors of C = sum_k P[k, i] Q[k, :]; element (k, i) of P is P[k * pk + i * pi].
template <class O, int ROWS, int COLS>
NB_INLINE void muon_tile(const float* P, int64_t pk, int64_t pi, const float* Q, float* C,
                         int64_t B, int64_t i0, int64_t j0, const MuonEnd* end) {
  typename O::F sum[ROWS][COLS];
  NB_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    NB_UNROLL
    for (int c = 0; c < COLS; ++c) sum[r][c] = O::set1f(0.0f);
  }
  NB_UNROLL_DEPTH
  for (int64_t k = 0; k < B; ++k) {
    typename O::F q[COLS];
    NB_UNROLL
    for (int c = 0; c < COLS; ++c) q[c] = O::loadf(Q + k * B + j0 + c * O::kLanes);
    NB_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const typename O::F p = O::set1f(P[k * pk + (i0 + r) * pi]);
      NB_UNROLL
      for (int c = 0; c < COLS; ++c) sum[r][c] = O::fmaf(p, q[c], sum[r][c]);
    }
  }
  NB_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    NB_UNROLL
    for (int c = 0; c < COLS; ++c) {
      const int64_t at = (i0 + r) * B + j0 + c * O::kLanes;
      typename O::F v = sum[r][c];
      if (end) {
        v = O::mulf(v, O::set1f(end->scale));
        v = O::fmaf(O::set1f(end->add), O::loadf(end->base + at), v);
      }
      O::storef(C + at, v);
    }
  }
}

typedef float Eight __attribute__((vector_size(32)));

// 8 x 8 of a matrix with rows of B as the transpose of 8 x 8 others.
NB_INLINE void muon_mirror(const float* from, float* to, int64_t B) {
  Eight rows[8], pairs[8], quads[8];
  NB_UNROLL
  for (int i = 0; i < 8; ++i) memcpy(&rows[i], from + i * B, sizeof rows[i]);
  NB_UNROLL
  for (int i = 0; i < 8; i += 2) {
    const Eight a = rows[i], b = rows[i + 1];
    pairs[i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  }
  NB_UNROLL
  for (int i = 0; i < 8; i += 4) {
    NB_UNROLL
    for (int h = 0; h < 2; ++h) {
      const Eight a = pairs[i + h], b = pairs[i + 2 + h];
      quads[i + 2 * h] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
      quads[i + 2 * h + 1] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  NB_UNROLL
  for (int i = 0; i < 4; ++i) {
    const Eight a = quads[i], b = quads[i + 4];
    const Eight low = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
    const Eight high = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    memcpy(to + i * B, &low, sizeof low);
    memcpy(to + (i + 4) * B, &high, sizeof high);
  }
}

// SYMMETRIC: C is, bit for bit (its products commute, its sums run in one order): what lies left of
// the diagonal is copied.
template <class O, bool SYMMETRIC>
static void muon_product(const float* P, int64_t pk, int64_t pi, const float* Q, float* C,
                         int64_t B, const MuonEnd* end) {
  // B is a multiple of 16: of two vectors but for AVX-512 at 16.
  for (int64_t i = 0; i < B; i += 8) {
    int64_t j = SYMMETRIC ? i / O::kLanes * O::kLanes : 0;
    for (; j + 2 * O::kLanes <= B; j += 2 * O::kLanes) {
      if (O::kLanes == 16) {
        muon_tile<O, 8, 2>(P, pk, pi, Q, C, B, i, j, end);
      } else {  // 16 registers
        muon_tile<O, 4, 2>(P, pk, pi, Q, C, B, i, j, end);
        muon_tile<O, 4, 2>(P, pk, pi, Q, C, B, i + 4, j, end);
      }
    }
    if (j < B) muon_tile<O, 8, 1>(P, pk, pi, Q, C, B, i, j, end);
  }
  for (int64_t i = 0; SYMMETRIC && i < B; i += 8) {
    for (int64_t j = i + 8; j < B; j += 8) muon_mirror(C + i * B + j, C + j * B + i, B);
  }
  if (!end) return;
  for (int64_t i = 0; i < B; ++i) C[i * B + i] += end->diagonal;
}

// u of one block into X; the bits of its largest magnitude.
template <class O, class T>
static uint32_t muon_momentum(const MuonParams& p, T type, const char* grad, float* momentum,
                              float* X, int64_t area) {
  constexpr int size = size_of(T{});
  const typename O::F multiplier = O::set1f(p.multiplier), mu = O::set1f(p.momentum);
  for (int64_t i = 0; i < area; i += O::kLanes) {
    const typename O::F g = O::mulf(O::load_as(type, grad + i * size), multiplier);
    typename O::F u = g;
    if (momentum) {
      const typename O::F m = O::addf(O::mulf(O::loadf(momentum + i), mu), g);
      O::storef(momentum + i, m);
      u = p.nesterov ? O::addf(O::mulf(m, mu), g) : m;
    }
    O::storef(X + i, u);
  }
  uint32_t largest = 0;
  for (int64_t i = 0; i < area; ++i) {  // integers, which the compiler makes vectors of
    uint32_t bits;
    memcpy(&bits, X + i, 4);
    largest = std::max(largest, bits & 0x7fffffffu);
  }
  return largest;
}

// X to its polar factor, nearly; returns where that is, of the two.
template <class O>
static const float* muon_iterate(float* X, float* next, float* A, float* S, int64_t B,
                                 int64_t steps) {
  for (int64_t step = 0; step < steps; ++step) {
    muon_product<O, true>(X, B, 1, X, A, B, nullptr);
    float a = kMuonA, b = kMuonB, c = kMuonC;
    if (step == 0) {  // the norm, from the diagonal: X / ||X|| without a pass over X
      float squares = 0.0f;
      for (int64_t i = 0; i < B; ++i) squares += A[i * B + i];
      const float r = 1.0f / __builtin_sqrtf(squares), r2 = r * r;
      a *= r;
      b *= r * r2;
      c *= r * r2 * r2;
    }
    const MuonEnd end = {c, b, a, A};
    muon_product<O, true>(A, B, 1, A, S, B, &end);
    muon_product<O, false>(X, 1, B, S, next, B, nullptr);
    std::swap(X, next);
  }
  return X;
}

template <class O, class T>
static void muon_block(const MuonParams& p, const MuonTensor& t, T type, int64_t z,
                       float* scratch) {
  constexpr int size = size_of(T{});
  const int64_t B = p.block, area = B * B;
  float *X = scratch, *next = X + area, *A = next + area, *S = A + area;
  const char* grad = static_cast<const char*>(t.grad) + z * area * size;
  char* out = static_cast<char*>(t.out) + z * area * size;
  float* momentum = t.momentum ? t.momentum + z * area : nullptr;
  const float scale = muon_scale(muon_momentum<O>(p, type, grad, momentum, X, area));
  const float* result = X;
  if (scale > 0.0f) {
    const typename O::F by = O::set1f(scale);
    for (int64_t i = 0; i < area; i += O::kLanes) O::storef(X + i, O::mulf(O::loadf(X + i), by));
    result = muon_iterate<O>(X, next, A, S, B, p.steps);
  } else {  // nothing, or NaN
    for (int64_t i = 0; i < area; i += O::kLanes) O::storef(X + i, O::set1f(scale));
  }
  for (int64_t i = 0; i < area; i += O::kLanes) {
    O::store_as(type, out + i * size, O::loadf(result + i));
  }
}

template <class O>
static Status muon_direction(const MuonParams& p) {
  bool starved = false;
  auto body = [&](int64_t begin, int64_t end) {
    float* scratch = static_cast<float*>(aligned_malloc(muon_scratch(p.block) * 4));
    if (!scratch) {
      starved = true;
      return;
    }
    const FlushDenormals flush;
    each_task(p.tensors, p.tensor_count, begin, end, [&](const MuonTensor& t, int64_t z) {
      if (t.type == Dtype::kF32) {
        muon_block<O>(p, t, FloatBits::F32{}, z, scratch);
      } else {
        muon_block<O>(p, t, FloatBits::BF16{}, z, scratch);
      }
    });
    free(scratch);
  };
  parallel_for(worth_tasks(p.parallel, p.task_count), p.task_count, body);
  return starved ? kOutOfMemory : kOk;
}

}  // namespace
}  // namespace nibblock
