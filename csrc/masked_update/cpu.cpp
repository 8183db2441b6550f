// masked_update on the CPU: the scalar kernels, which are the oracle in C++, the checks of index
// lists, and the tables of all.
#include <string.h>

#include <atomic>

#include "../common/flush_denormals.h"
#include "masked_update.h"

namespace nibblock {
namespace {

int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// --- scalar: one entry at a time, by the formulas ------------------------------------------------

// The new value of one entry; first and second are its states, or null.
float update_entry(UpdateRule rule, const UpdateScalars& s, float p, float g, float* first,
                   float* second) {
  g = g * s.multiplier;
  if (rule == UpdateRule::kAdamW) {
    const float m = (s.near ? *first : g) + s.blend * (g - *first);
    const float v = *second * s.beta2 + g * g * s.rest2;
    *first = m;
    *second = v;
    return p * s.decay - m * s.step / (sqrtf(v) * s.root + s.eps);
  }
  if (s.decays) g = g + p * s.decay;
  float direction = g;
  if (first) {
    const float m = s.fresh ? g : *first * s.momentum + g * s.rest;
    *first = m;
    direction = s.nesterov ? g + m * s.momentum : m;
  }
  return p - direction * s.lr;
}

// Moves entry `at` of param, whose gradient and states are the given ones.
float move(const UpdateParams& u, const UpdateTensor& t, const UpdateScalars& s, int64_t at,
           int64_t grad_at, int64_t state_at) {
  const float value = update_entry(
      u.rule, s, load_as_f32(t.param, t.type, at), load_as_f32(t.grad, t.type, grad_at),
      t.first ? t.first + state_at : nullptr, t.second ? t.second + state_at : nullptr);
  store_f32_as(t.param, t.type, at, value);
  return load_as_f32(t.param, t.type, at);
}

void block_task(const UpdateParams& u, const UpdateTensor& t, int64_t task) {
  const int64_t B = u.block, per = update_task_blocks(B);
  for (int64_t z = task * per; z < min64(t.count, (task + 1) * per); ++z) {
    const UpdateScalars s = update_scalars(u, t.age[z]);
    const int64_t n0 = t.weight ? t.blocks[2 * z] * B : 0;
    const int64_t k0 = t.weight ? t.blocks[2 * z + 1] * B : 0;
    const int64_t rows = t.weight ? min64(B, t.n - n0) : B;
    const int64_t cols = t.weight ? min64(B, t.k - k0) : B;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        const int64_t at = (z * B + i) * B + j;
        const float value = move(u, t, s, at, at, at);
        if (t.weight) {
          store_f32_as(t.weight, t.weight_type, (n0 + i) * t.weight_stride + k0 + j, value);
        }
      }
    }
  }
}

void flat_task(const UpdateParams& u, const UpdateTensor& t, int64_t task) {
  const UpdateScalars s = update_scalars(u, t.age[0]);
  const int64_t end = min64(t.count, (task + 1) * kUpdateTaskEntries);
  for (int64_t i = task * kUpdateTaskEntries; i < end; ++i) {
    const int64_t at = t.index64 ? static_cast<const int64_t*>(t.index)[i]
                                 : static_cast<const int32_t*>(t.index)[i];
    move(u, t, s, at, t.grad_packed ? i : at, i);
  }
}

void bool_task(const UpdateParams& u, const UpdateTensor& t, int64_t task) {
  const UpdateScalars s = update_scalars(u, t.age[0]);
  const int64_t end = min64(t.count, (task + 1) * kUpdateTaskEntries);
  for (int64_t i = task * kUpdateTaskEntries; i < end; i += kMaskChunk) {
    const int64_t stop = min64(end, i + kMaskChunk);
    if (!t.mask) {
      for (int64_t j = i; j < stop; ++j) move(u, t, s, j, j, j);
      continue;
    }
    int64_t state = t.offsets[i / kMaskChunk];
    const int64_t last = t.offsets[i / kMaskChunk + 1];
    const bool full = last - state == stop - i;
    for (int64_t j = i; j < stop && state < last; ++j) {
      if (full || t.mask[j]) move(u, t, s, j, j, state++);
    }
  }
}

void norm_entry(const GradParams& p, const GradTensor& t, int64_t at, double* sum) {
  const float g = load_as_f32(t.grad, t.type, at);
  *sum += static_cast<double>(g) * g;
  if (p.write) store_f32_as(t.grad, t.type, at, g * p.scale);
}

double grad_task(const GradParams& p, const GradTensor& t, int64_t task) {
  double sum = 0.0;
  if (!p.blocks) {
    const int64_t end = min64(t.rows, (task + 1) * kUpdateTaskEntries);
    for (int64_t i = task * kUpdateTaskEntries; i < end; ++i) {
      if (!t.mask || t.mask[i]) {
        norm_entry(p, t, i, &sum);
      } else if (p.write) {
        store_f32_as(t.grad, t.type, i, 0.0f);
      }
    }
    return sum;
  }
  const int64_t B = p.block;
  for (int64_t i = task * B; i < min64(t.rows, (task + 1) * B); ++i) {
    int64_t e = 0;
    while (e < t.count && t.blocks[2 * e] < task) ++e;
    for (int64_t j = 0; j < t.cols; ++j) {
      while (e < t.count && t.blocks[2 * e] == task && t.blocks[2 * e + 1] < j / B) ++e;
      if (e < t.count && t.blocks[2 * e] == task && t.blocks[2 * e + 1] == j / B) {
        norm_entry(p, t, i * t.stride + j, &sum);
      } else if (p.write) {
        store_f32_as(t.grad, t.type, i * t.stride + j, 0.0f);
      }
    }
  }
  return sum;
}

void prox_task(const ProxTensor& t, int64_t z) {
  const int64_t begin = z * t.size, end = begin + t.size;
  double sum = 0.0;
  for (int64_t i = begin; i < end; ++i) {
    const double o = t.origin ? load_as_f32(t.origin, t.type, i) : 0.0;
    const double d = load_as_f32(t.values, t.type, i) - o;
    sum += d * d;
  }
  const double norm = sqrt(sum), threshold = t.thresholds[z];
  double scale = norm > 0.0 ? 1.0 - threshold / norm : 1.0;
  if (scale <= 0.0) scale = 0.0;  // not for NaN, which stays
  if (norm != norm) scale = norm;
  const float factor = static_cast<float>(scale);
  t.norms[z] = factor == 0.0f ? 0.0f : static_cast<float>(norm * scale);
  if (factor == 1.0f) return;
  for (int64_t i = begin; i < end; ++i) {
    const float o = t.origin ? load_as_f32(t.origin, t.type, i) : 0.0f;
    const float d = load_as_f32(t.values, t.type, i) - o;
    store_f32_as(t.values, t.type, i, factor == 0.0f ? o : o + d * factor);
  }
}

}  // namespace

Status masked_update_scalar(const UpdateParams& p) {
  auto body = [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    each_task(p.tensors, p.tensor_count, begin, end, [&](const UpdateTensor& t, int64_t task) {
      if (p.kind == MaskKind::kBlock) {
        block_task(p, t, task);
      } else if (p.kind == MaskKind::kFlat) {
        flat_task(p, t, task);
      } else {
        bool_task(p, t, task);
      }
    });
  };
  parallel_for(worth_tasks(p.parallel, p.task_count), p.task_count, body);
  return kOk;
}

Status masked_grad_scalar(const GradParams& p) {
  auto body = [&](int64_t begin, int64_t end) {
    double* sum = p.sums ? p.sums + begin : nullptr;
    each_task(p.tensors, p.tensor_count, begin, end, [&](const GradTensor& t, int64_t task) {
      const double found = grad_task(p, t, task);
      if (sum) *sum++ = found;
    });
  };
  parallel_for(worth_tasks(p.parallel, p.task_count), p.task_count, body);
  return kOk;
}

Status prox_blocks_scalar(const ProxParams& p) {
  auto body = [&](int64_t begin, int64_t end) {
    each_task(p.tensors, p.tensor_count, begin, end, prox_task);
  };
  parallel_for(worth_tasks(p.parallel, p.task_count), p.task_count, body);
  return kOk;
}

// --- checks of index lists -----------------------------------------------------------------------

namespace {

template <class T>
bool increasing(const T* index, int64_t count, int64_t numel, int64_t task) {
  const int64_t begin = task * kUpdateTaskEntries;
  const int64_t end = min64(count, begin + kUpdateTaskEntries);
  if (begin == 0 && index[0] < 0) return false;
  if (end == count && static_cast<int64_t>(index[count - 1]) >= numel) return false;
  T bad = 0;  // no early exit: this way it runs a vector at a time
  for (int64_t i = begin; i < min64(end, count - 1); ++i) bad |= index[i] >= index[i + 1];
  return !bad;
}

}  // namespace

int64_t masked_bad_index(const UpdateParams& p) {
  std::atomic<int64_t> first(p.tensor_count);
  auto body = [&](int64_t begin, int64_t end) {
    each_task(p.tensors, p.tensor_count, begin, end, [&](const UpdateTensor& t, int64_t task) {
      const bool ok =
          t.index64 ? increasing(static_cast<const int64_t*>(t.index), t.count, t.numel, task)
                    : increasing(static_cast<const int32_t*>(t.index), t.count, t.numel, task);
      int64_t known = first.load();
      const int64_t here = &t - p.tensors;
      while (!ok && here < known && !first.compare_exchange_weak(known, here)) {
      }
    });
  };
  parallel_for(worth_tasks(p.parallel, p.task_count), p.task_count, body);
  return first == p.tensor_count ? -1 : first.load();
}

bool masked_blocks_ok(const int32_t* blocks, int64_t count, int64_t rows, int64_t cols) {
  int64_t last = -1;
  for (int64_t z = 0; z < count; ++z) {
    const int64_t row = blocks[2 * z], col = blocks[2 * z + 1], key = row * cols + col;
    if (row < 0 || row >= rows || col < 0 || col >= cols || key <= last) return false;
    last = key;
  }
  return true;
}

bool masked_offsets_ok(const int64_t* offsets, int64_t numel, int64_t active) {
  const int64_t chunks = (numel + kMaskChunk - 1) / kMaskChunk;
  int bad = offsets[0] != 0 || offsets[chunks] != active;
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t step = offsets[c + 1] - offsets[c];
    bad |= step < 0 || step > min64(kMaskChunk, numel - c * kMaskChunk);
  }
  return !bad;
}

// --- the tables ----------------------------------------------------------------------------------

namespace {

#define NB_UPDATE_ROWS(op)                                                                         \
  {                                                                                                \
      {op ".cpu.avx512.fused", Isa::kAvx512, "any call", masked_update_avx512},                    \
      {op ".cpu.avx2.fused", Isa::kAvx2, "any call", masked_update_avx2},                          \
      {op ".cpu.scalar.reference", Isa::kScalar, "any call", masked_update_scalar},                \
  }
const UpdateKernel kUpdate[2][3][3] = {
    {NB_UPDATE_ROWS("masked_adamw_block"), NB_UPDATE_ROWS("masked_adamw_flat"),
     NB_UPDATE_ROWS("masked_adamw_bool")},
    {NB_UPDATE_ROWS("masked_sgd_block"), NB_UPDATE_ROWS("masked_sgd_flat"),
     NB_UPDATE_ROWS("masked_sgd_bool")},
};
#define NB_GRAD_ROWS(op)                                                                           \
  {                                                                                                \
      {op ".cpu.avx512.stream", Isa::kAvx512, "any call", masked_grad_avx512},                     \
      {op ".cpu.avx2.stream", Isa::kAvx2, "any call", masked_grad_avx2},                           \
      {op ".cpu.scalar.reference", Isa::kScalar, "any call", masked_grad_scalar},                  \
  }
const GradKernel kGrad[3][3] = {
    NB_GRAD_ROWS("masked_grad_bool"),
    NB_GRAD_ROWS("masked_grad_block"),
    NB_GRAD_ROWS("grad_norm"),
};
const ProxKernel kProx[] = {
    {"prox_blocks.cpu.avx512.stream", Isa::kAvx512, "any call", prox_blocks_avx512},
    {"prox_blocks.cpu.avx2.stream", Isa::kAvx2, "any call", prox_blocks_avx2},
    {"prox_blocks.cpu.scalar.reference", Isa::kScalar, "any call", prox_blocks_scalar},
};

template <class Table>
auto first_row(const Table& t) -> decltype(t.rows) {
  for (int i = 0; i < t.count; ++i) {
    if (t.rows[i].isa <= cpu_isa()) return &t.rows[i];
  }
  return nullptr;
}

}  // namespace

UpdateTable masked_update_table(UpdateRule rule, MaskKind kind) {
  return {kUpdate[static_cast<int>(rule)][static_cast<int>(kind)], 3};
}
GradTable masked_grad_table(GradOp op) { return {kGrad[static_cast<int>(op)], 3}; }
ProxTable prox_blocks_table() { return {kProx, 3}; }

Status masked_update_run(const UpdateParams& p) {
  const UpdateKernel* row = first_row(masked_update_table(p.rule, p.kind));
  if (!row) return kNoKernel;
  const Status status = row->run(p);
  if (status != kOk) return status;
  for (int64_t i = 0; i < p.tensor_count; ++i) {
    const UpdateTensor& t = p.tensors[i];
    const int64_t ages = p.kind == MaskKind::kBlock ? t.count : 1;
    for (int64_t z = 0; z < ages; ++z) ++t.age[z];
  }
  return kOk;
}

Status masked_grad_run(GradOp op, const GradParams& p) {
  const GradKernel* row = first_row(masked_grad_table(op));
  return row ? row->run(p) : kNoKernel;
}

Status prox_blocks_run(const ProxParams& p) {
  const ProxKernel* row = first_row(prox_blocks_table());
  return row ? row->run(p) : kNoKernel;
}

}  // namespace nibblock
