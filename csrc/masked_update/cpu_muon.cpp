// muon_direction on the CPU: the scalar kernel, which is the oracle in C++, and the table of all.
#include <math.h>

#include <algorithm>
#include <vector>

#include "../common/flush_denormals.h"
#include "muon_direction.h"

namespace nibblock {
namespace {

// C = scale * P Q + add * base + diagonal I; `turned`: P stands for its transpose.
void product(const float* P, bool turned, const float* Q, float* C, int64_t B, float scale,
             float add, const float* base, float diagonal) {
  for (int64_t i = 0; i < B; ++i) {
    for (int64_t j = 0; j < B; ++j) {
      float sum = 0.0f;
      for (int64_t k = 0; k < B; ++k) {
        sum = fmaf(turned ? P[k * B + i] : P[i * B + k], Q[k * B + j], sum);
      }
      if (base) {
        sum = fmaf(add, base[i * B + j], sum * scale);
        if (i == j) sum += diagonal;
      }
      C[i * B + j] = sum;
    }
  }
}

void block(const MuonParams& p, const MuonTensor& t, int64_t z, float* X, float* next, float* A,
           float* S) {
  const int64_t B = p.block, area = B * B, first = z * area;
  uint32_t largest = 0;
  for (int64_t i = 0; i < area; ++i) {
    const float g = load_as_f32(t.grad, t.type, first + i) * p.multiplier;
    X[i] = g;
    if (t.momentum) {
      float& m = t.momentum[first + i];
      m = m * p.momentum + g;
      X[i] = p.nesterov ? m * p.momentum + g : m;
    }
    uint32_t bits;
    memcpy(&bits, X + i, 4);
    largest = std::max(largest, bits & 0x7fffffffu);
  }
  const float scale = muon_scale(largest);
  for (int64_t i = 0; i < area; ++i) X[i] = scale > 0.0f ? X[i] * scale : scale;
  for (int64_t step = 0; scale > 0.0f && step < p.steps; ++step) {
    product(X, true, X, A, B, 1.0f, 0.0f, nullptr, 0.0f);
    float a = kMuonA, b = kMuonB, c = kMuonC;
    if (step == 0) {
      float squares = 0.0f;
      for (int64_t i = 0; i < B; ++i) squares += A[i * B + i];
      const float r = 1.0f / sqrtf(squares), r2 = r * r;
      a *= r;
      b *= r * r2;
      c *= r * r2 * r2;
    }
    product(A, true, A, S, B, c, b, A, a);
    product(X, false, S, next, B, 1.0f, 0.0f, nullptr, 0.0f);
    std::swap(X, next);
  }
  for (int64_t i = 0; i < area; ++i) store_f32_as(t.out, t.type, first + i, X[i]);
}

const MuonKernel kRows[] = {
    {"muon_direction.cpu.avx512.tile", Isa::kAvx512, "any call", muon_direction_avx512},
    {"muon_direction.cpu.avx2.tile", Isa::kAvx2, "any call", muon_direction_avx2},
    {"muon_direction.cpu.scalar.reference", Isa::kScalar, "any call", muon_direction_scalar},
};

}  // namespace

Status muon_direction_scalar(const MuonParams& p) {
  auto body = [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    const int64_t area = p.block * p.block;
    std::vector<float> scratch(static_cast<size_t>(muon_scratch(p.block)));
    float* at = scratch.data();
    each_task(p.tensors, p.tensor_count, begin, end, [&](const MuonTensor& t, int64_t z) {
      block(p, t, z, at, at + area, at + 2 * area, at + 3 * area);
    });
  };
  parallel_for(worth_tasks(p.parallel, p.task_count), p.task_count, body);
  return kOk;
}

MuonTable muon_direction_table() { return {kRows, 3}; }

Status muon_direction_run(const MuonParams& p) {
  for (const MuonKernel& row : kRows) {
    if (row.isa <= cpu_isa()) return row.run(p);
  }
  return kNoKernel;
}

}  // namespace nibblock
