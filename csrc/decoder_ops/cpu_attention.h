// causal_attention and its gradient in float32, for any vector of 8 or 16 floats.
//
//     s = scale q k^T, masked;  p = softmax(s);  y = p v
//     dv = p^T dy;  ds = p (dy v^T - sum(dy y));  dq = scale ds k;  dk = scale ds^T q
//
// A task is some queries of one head, kQueries at a time. Scores are kept transposed, [key][query]:
// a softmax goes down the keys with a query in each lane, and nothing is summed across lanes. All
// five products run through one register tile of kWide columns. What it broadcasts from is either
// [depth][row] (keys and values in tiles, scores as weights of values) or rows of kQueries scores,
// so that all its addresses are constants away from one pointer.
//
// Forward: all scores of the queries stand in the second cache (200 bytes a key), so the largest is
// known before the first exponential and nothing is rescaled. Gradient: scores again from what the
// forward kept of each row, kKeys keys at a time, each block through all five products while it is
// there. Keys behind a query are left out a tile at a time, half of all work.
//
// Queries of one head add to the same dk and dv, and so do heads that share a key head: each task
// adds to its own, and they are summed in order. Tasks are cut by shape alone, so any number of
// threads gives the same bits.
#pragma once

#include <math.h>

#include "decoder_ops.h"
#include "elements.h"

namespace nibblock {
namespace {

constexpr int64_t kWide = 16;     // columns of a register tile
constexpr int64_t kQueries = 48;  // of a task at a time; lengths are padded to it
constexpr int64_t kKeys = 96;     // keys of a block: 18 KiB of scores, beside as much of values
constexpr int64_t kEnough = 16;   // tasks that a gradient is cut into, if there are fewer heads

// What a call is cut into.
struct AttentionShape {
  int64_t padded, chunks, group;

  explicit AttentionShape(const CausalAttentionParams& p)
      : padded((p.length + kQueries - 1) / kQueries * kQueries), chunks(padded / kQueries),
        group(p.heads / p.kv_heads) {}
};

// acc[kTileRows][kWide] (+)= sum over k of a(row, k) * b[k * b_step ...]. a(row, k) is
// a[k * a_step + row], or with ACROSS a[row * kQueries + k].
template <class O, bool ACROSS>
static __attribute__((noinline)) void attention_tile(const float* a, int64_t a_step, const float* b,
                                                     int64_t b_step, int64_t depth, float* acc,
                                                     int64_t acc_step, bool first) {
  using F = typename O::F;
  constexpr int R = O::kTileRows, C = kWide / O::kLanes;
  F sum[R][C];
  NB_UNROLL
  for (int r = 0; r < R; ++r) {
    NB_UNROLL
    for (int c = 0; c < C; ++c)
      sum[r][c] = first ? O::set1f(0.0f) : O::loadf(acc + r * acc_step + c * O::kLanes);
  }
  NB_UNROLL_DEPTH
  for (int64_t k = 0; k < depth; ++k) {
    F bv[C];
    NB_UNROLL
    for (int c = 0; c < C; ++c) bv[c] = O::loadf(b + c * O::kLanes);
    NB_UNROLL
    for (int r = 0; r < R; ++r) {
      const F av = O::set1f(a[ACROSS ? r * kQueries : r]);
      NB_UNROLL
      for (int c = 0; c < C; ++c) sum[r][c] = O::fmaf(av, bv[c], sum[r][c]);
    }
    a += ACROSS ? 1 : a_step;
    b += b_step;
  }
  NB_UNROLL
  for (int r = 0; r < R; ++r) {
    NB_UNROLL
    for (int c = 0; c < C; ++c) O::storef(acc + r * acc_step + c * O::kLanes, sum[r][c]);
  }
}

// Rows [0, padded) of one head as float32; those behind `length` are zero.
//
// By rows: out[row][dim]. In tiles: out[row / R][dim][R], what a register tile broadcasts from.
// Turned: out[dim][kQueries], multiplied by `by`.
template <class T>
static void head_by_rows(const typename T::Stored* x, int64_t stride, int64_t length,
                         int64_t padded, int64_t dim, float by, float* out) {
  for (int64_t r = 0; r < padded; ++r, out += dim) {
    for (int64_t i = 0; i < dim; i += kLanes)
      store8(out + i, r < length ? T::load8(x + r * stride + i) * by : F8{});
  }
}
template <class T, int R>
static void head_in_tiles(const typename T::Stored* x, int64_t stride, int64_t length,
                          int64_t padded, int64_t dim, float* out) {
  for (int64_t r0 = 0; r0 < padded; r0 += R, out += R * dim) {
    for (int r = 0; r < R; ++r) {
      const typename T::Stored* row = x + (r0 + r) * stride;
      const bool live = r0 + r < length;
      for (int64_t i = 0; i < dim; ++i) out[i * R + r] = live ? T::load(row[i]) : 0.0f;
    }
  }
}
static inline void turn(const float* rows, int64_t dim, float* out) {
  for (int64_t r = 0; r < kQueries; ++r, rows += dim)
    for (int64_t i = 0; i < dim; ++i) out[i * kQueries + r] = rows[i];
}

// scores[keys [k0, k1)][kQueries] = rows of `tiles` times `turned`. Keys behind the last query of
// a panel are left as they are.
template <class O>
static void all_scores(const float* tiles, int64_t dim, const float* turned, int64_t q0, int64_t k0,
                       int64_t k1, float* scores) {
  constexpr int64_t R = O::kTileRows;
  for (int64_t k = k0; k < k1; k += R) {
    for (int64_t at = 0; at < kQueries; at += kWide) {
      if (q0 + at + kWide <= k) continue;
      attention_tile<O, false>(tiles + k * dim, R, turned + at, kQueries, dim,
                               scores + (k - k0) * kQueries + at, kQueries, true);
    }
  }
}

// Lanes [at, at + 8) of queries from q0 that may look at key k, as all ones.
NB_INLINE U8 looks_at(int64_t q0, int64_t at, int64_t k) {
  typedef int32_t I8 __attribute__((vector_size(32)));
  const I8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return (U8)(lane >= static_cast<int32_t>(k - q0 - at));
}
NB_INLINE F8 keep(U8 mask, F8 v) { return (F8)((U8)v & mask); }

// softmax down the keys of scores[keys][kQueries], less its division; sums and largest of each.
static void weights_of(float* scores, int64_t q0, int64_t keys, float* sums, float* largest) {
  for (int64_t at = 0; at < kQueries; at += kLanes) {
    F8 most = F8{} - INFINITY, sum = {};
    float* s = scores + at;
    for (int64_t k = 0; k < keys; ++k) {
      F8 v = load8(s + k * kQueries);
      if (k > q0) v = looks_at(q0, at, k) ? v : F8{} - INFINITY;
      most = v > most ? v : most;
    }
    for (int64_t k = 0; k < keys; ++k) {
      F8 e = exp_clamped(load8(s + k * kQueries) - most);
      if (k > q0) e = keep(looks_at(q0, at, k), e);
      sum += e;
      store8(s + k * kQueries, e);
    }
    store8(sums + at, sum);
    store8(largest + at, most);
  }
}

template <class T>
struct Head {
  const typename T::Stored *q, *k, *v;
  int64_t b, h;

  Head(const CausalAttentionParams& p, int64_t task) : b(task / p.heads), h(task % p.heads) {
    const int64_t kv = h / (p.heads / p.kv_heads);
    using S = typename T::Stored;
    q = static_cast<const S*>(p.q) + b * p.q_stride[0] + h * p.q_stride[2];
    k = static_cast<const S*>(p.k) + b * p.k_stride[0] + kv * p.k_stride[2];
    v = static_cast<const S*>(p.v) + b * p.v_stride[0] + kv * p.v_stride[2];
  }
};

// Runs body(task, scratch) over all tasks, with so many floats of scratch. False: no memory.
template <class Body>
static bool with_scratch(const Parallel& parallel, int64_t tasks, int64_t floats, Body body) {
  int failed = 0;
  auto run = [&](int64_t begin, int64_t end) {
    float* scratch = static_cast<float*>(aligned_malloc(floats * 4));
    if (!scratch) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t task = begin; task < end; ++task) body(task, scratch);
    free(scratch);
  };
  parallel_for(parallel, tasks, run);
  return !failed;
}

static inline const Parallel& attention_threads(const CausalAttentionParams& p) {
  constexpr int64_t kWorthThreads = 1 << 17;  // multiply-adds
  return p.batch * p.heads * p.length * p.length * p.dim < kWorthThreads ? kSerial : *p.parallel;
}

template <class O, class T>
static Status attention_forward(const CausalAttentionParams& p) {
  using S = typename T::Stored;
  constexpr int R = O::kTileRows;
  const AttentionShape shape(p);
  const int64_t dim = p.dim, head = shape.padded * dim, kv_heads = p.batch * p.kv_heads;
  const Parallel& parallel = attention_threads(p);
  float* keys = static_cast<float*>(aligned_malloc(2 * kv_heads * head * 4));
  if (!keys) return kOutOfMemory;
  float* values = keys + kv_heads * head;
  auto lay_out = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Head<T> from(p, i / p.kv_heads * p.heads + i % p.kv_heads * shape.group);
      head_in_tiles<T, R>(from.k, p.k_stride[1], p.length, shape.padded, dim, keys + i * head);
      head_by_rows<T>(from.v, p.v_stride[1], p.length, shape.padded, dim, 1.0f, values + i * head);
    }
  };
  parallel_for(parallel, kv_heads, lay_out);
  const int64_t floats = kQueries * (3 * dim + 3 + shape.padded);
  const bool done = with_scratch(
      parallel, p.batch * p.heads * shape.chunks, floats, [&](int64_t task, float* scratch) {
        // The longest first: what is left at the end is short.
        const int64_t q0 = (shape.chunks - 1 - task / (p.batch * p.heads)) * kQueries;
        const int64_t row = task % (p.batch * p.heads), end = q0 + kQueries;
        const Head<T> from(p, row);
        const int64_t kv = (from.b * p.kv_heads + from.h / shape.group) * head;
        const int64_t live = min64(kQueries, p.length - q0);
        float *rows = scratch, *turned = rows + kQueries * dim, *out = turned + kQueries * dim;
        float *sums = out + kQueries * dim, *largest = sums + kQueries;
        float* scores = largest + kQueries;
        head_by_rows<T>(from.q + q0 * p.q_stride[1], p.q_stride[1], live, kQueries, dim, p.scale,
                        rows);
        turn(rows, dim, turned);
        all_scores<O>(keys + kv, dim, turned, q0, 0, end, scores);
        weights_of(scores, q0, end, sums, largest);
        for (int64_t k0 = 0; k0 < end; k0 += kKeys) {
          for (int64_t i = 0; i < dim; i += kWide) {
            for (int64_t r = 0; r < kQueries; r += R) {
              const int64_t depth = min64(min64(kKeys, end - k0), q0 + r + R - k0);
              if (depth <= 0) continue;
              attention_tile<O, false>(scores + k0 * kQueries + r, kQueries,
                                       values + kv + k0 * dim + i, dim, depth, out + r * dim + i,
                                       dim, k0 == 0);
            }
          }
        }
        for (int64_t r = 0; r < live; ++r) {
          const float by = 1.0f / sums[r];
          S* y = static_cast<S*>(p.y) + ((from.b * p.length + q0 + r) * p.heads + from.h) * dim;
          for (int64_t i = 0; i < dim; i += kLanes) T::store8(y + i, load8(out + r * dim + i) * by);
          p.lse[row * p.length + q0 + r] = largest[r] + logf(sums[r]);
        }
      });
  free(keys);
  return done ? kOk : kOutOfMemory;
}

// --- gradient ------------------------------------------------------------------------------------

// scores -> p = exp(scores - lse), and outer -> ds = p (outer - dots); zero for keys behind.
NB_INLINE void score_gradients(float* scores, float* outer, int64_t q0, int64_t k0, int64_t keys,
                               const float* lse, const float* dots) {
  for (int64_t k = 0; k < keys; ++k, scores += kQueries, outer += kQueries) {
    for (int64_t at = 0; at < kQueries; at += kLanes) {
      F8 e = exp_clamped(load8(scores + at) - load8(lse + at));
      F8 ds = e * (load8(outer + at) - load8(dots + at));
      if (k0 + k > q0) {
        const U8 mask = looks_at(q0, at, k0 + k);
        e = keep(mask, e);
        ds = keep(mask, ds);
      }
      store8(scores + at, e);
      store8(outer + at, ds);
    }
  }
}

// Chunks [first, last) of span i of `spans`: about equally many pairs of a query and a key each.
static inline int64_t span_start(int64_t chunks, int64_t spans, int64_t i) {
  int64_t c = 0;
  while (c < chunks && c * (c + 1) * spans < i * chunks * (chunks + 1)) ++c;
  return c;
}

template <class O, class T>
static Status attention_gradient(const CausalAttentionGradParams& g) {
  using S = typename T::Stored;
  const CausalAttentionParams& p = g.forward;
  constexpr int R = O::kTileRows;
  const AttentionShape shape(p);
  const int64_t dim = p.dim, head = shape.padded * dim, kv_heads = p.batch * p.kv_heads;
  const int64_t all = p.batch * p.heads;
  const int64_t spans = max64(1, min64(shape.chunks, (kEnough + all - 1) / all));
  const Parallel& parallel = attention_threads(p);
  float* memory = static_cast<float*>(aligned_malloc((3 * kv_heads + 2 * all * spans) * head * 4));
  if (!memory) return kOutOfMemory;
  float *key_rows = memory, *key_tiles = key_rows + kv_heads * head;
  float *value_tiles = key_tiles + kv_heads * head, *sums = value_tiles + kv_heads * head;
  auto lay_out = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Head<T> from(p, i / p.kv_heads * p.heads + i % p.kv_heads * shape.group);
      const int64_t at = i * head, k_step = p.k_stride[1];
      head_by_rows<T>(from.k, k_step, p.length, shape.padded, dim, 1.0f, key_rows + at);
      head_in_tiles<T, R>(from.k, k_step, p.length, shape.padded, dim, key_tiles + at);
      head_in_tiles<T, R>(from.v, p.v_stride[1], p.length, shape.padded, dim, value_tiles + at);
    }
  };
  parallel_for(parallel, kv_heads, lay_out);

  const int64_t floats = kQueries * (5 * dim + 2 * kKeys + 2);
  bool done = with_scratch(parallel, all * spans, floats, [&](int64_t task, float* scratch) {
    const int64_t row = task / spans, first = span_start(shape.chunks, spans, task % spans);
    const int64_t last = span_start(shape.chunks, spans, task % spans + 1);
    const Head<T> from(p, row);
    const int64_t kv = (from.b * p.kv_heads + from.h / shape.group) * head;
    float *q_rows = scratch, *q_turned = q_rows + kQueries * dim;
    float *dy_rows = q_turned + kQueries * dim, *dy_turned = dy_rows + kQueries * dim;
    float *dq = dy_turned + kQueries * dim, *scores = dq + kQueries * dim;
    float *outer = scores + kQueries * kKeys, *lse = outer + kQueries * kKeys;
    float* dots = lse + kQueries;
    float *dk = sums + 2 * task * head, *dv = dk + head;
    memset(dk, 0, static_cast<size_t>(last * kQueries * dim) * 4);
    memset(dv, 0, static_cast<size_t>(last * kQueries * dim) * 4);
    for (int64_t q0 = first * kQueries; q0 < last * kQueries; q0 += kQueries) {
      const int64_t live = min64(kQueries, p.length - q0), end = q0 + kQueries;
      const int64_t y_step = p.heads * dim;
      const int64_t y_at = (from.b * p.length + q0) * y_step + from.h * dim;
      const S* y = static_cast<const S*>(g.y) + y_at;
      const S* dy = static_cast<const S*>(g.dy) + y_at;
      head_by_rows<T>(from.q + q0 * p.q_stride[1], p.q_stride[1], live, kQueries, dim, p.scale,
                      q_rows);
      head_by_rows<T>(dy, y_step, live, kQueries, dim, 1.0f, dy_rows);
      turn(q_rows, dim, q_turned);
      turn(dy_rows, dim, dy_turned);
      for (int64_t r = 0; r < kQueries; ++r) {
        F8 dot = {};
        for (int64_t i = 0; r < live && i < dim; i += kLanes)
          dot += load8(dy_rows + r * dim + i) * T::load8(y + r * y_step + i);
        dots[r] = total(dot);
        lse[r] = r < live ? g.lse[row * p.length + q0 + r] : 0.0f;
      }
      for (int64_t k0 = 0; k0 < end; k0 += kKeys) {
        const int64_t keys = min64(kKeys, end - k0);
        all_scores<O>(key_tiles + kv, dim, q_turned, q0, k0, k0 + keys, scores);
        all_scores<O>(value_tiles + kv, dim, dy_turned, q0, k0, k0 + keys, outer);
        score_gradients(scores, outer, q0, k0, keys, lse, dots);
        for (int64_t i = 0; i < dim; i += kWide) {
          for (int64_t k = 0; k < keys; k += R) {
            // (queries before the keys do not look at them)
            const int64_t skip = max64(0, k0 + k - q0), to = (k0 + k) * dim + i;
            const int64_t a = k * kQueries + skip, b = skip * dim + i;
            attention_tile<O, true>(scores + a, 0, dy_rows + b, dim, kQueries - skip, dv + to, dim,
                                    false);
            attention_tile<O, true>(outer + a, 0, q_rows + b, dim, kQueries - skip, dk + to, dim,
                                    false);
          }
          for (int64_t r = 0; r < kQueries; r += R) {
            const int64_t depth = min64(keys, q0 + r + R - k0);
            if (depth <= 0) continue;
            attention_tile<O, false>(outer + r, kQueries, key_rows + kv + k0 * dim + i, dim, depth,
                                     dq + r * dim + i, dim, k0 == 0);
          }
        }
      }
      S* to = static_cast<S*>(g.dq) + y_at;
      for (int64_t r = 0; r < live; ++r) {
        for (int64_t i = 0; i < dim; i += kLanes)
          T::store8(to + r * y_step + i, load8(dq + r * dim + i) * p.scale);
      }
    }
  });

  auto add_up = [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {  // a key head's row
      const int64_t kv = at / p.length, k = at % p.length, b = kv / p.kv_heads;
      const int64_t h0 = kv % p.kv_heads * shape.group;
      const int64_t to = ((b * p.length + k) * p.kv_heads + kv % p.kv_heads) * dim;
      int64_t s0 = 0;  // spans before it end before this key
      while (span_start(shape.chunks, spans, s0 + 1) * kQueries <= k) ++s0;
      for (int64_t i = 0; i < dim; i += kLanes) {
        F8 dk = {}, dv = {};
        for (int64_t h = h0; h < h0 + shape.group; ++h) {
          for (int64_t s = s0; s < spans; ++s) {
            const float* from = sums + 2 * ((b * p.heads + h) * spans + s) * head + k * dim + i;
            dk += load8(from);
            dv += load8(from + head);
          }
        }
        T::store8(static_cast<S*>(g.dk) + to + i, dk);
        T::store8(static_cast<S*>(g.dv) + to + i, dv);
      }
    }
  };
  if (done) parallel_for(parallel, kv_heads * p.length, add_up);
  free(memory);
  return done ? kOk : kOutOfMemory;
}

template <class O>
Status causal_attention_with(const CausalAttentionParams& p) {
  return by_type(p, attention_forward<O, F32>, attention_forward<O, BF16>,
                 attention_forward<O, F16>);
}
template <class O>
Status causal_attention_grad_with(const CausalAttentionGradParams& g) {
  if (g.forward.type == Dtype::kF32) return attention_gradient<O, F32>(g);
  if (g.forward.type == Dtype::kBF16) return attention_gradient<O, BF16>(g);
  return attention_gradient<O, F16>(g);
}

}  // namespace
}  // namespace nibblock
