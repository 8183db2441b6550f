// The masked updates, one vector of entries at a time. O holds the instructions, R the rule, P and
// W the types of the parameter and of the weight it is written through to.
//
// A dense float32 step moves 28 bytes an entry and costs one square root and one division, which
// take a core about as long as its share of the memory takes. So nothing else may wait: one pass,
// every scalar prepared, scattered lines fetched ahead.
#pragma once

#include "../common/flush_denormals.h"
#include "../common/kernel.h"
#include "masked_update.h"

namespace nibblock {
namespace {

constexpr int64_t kAheadEntries = 512;  // scattered entries fetched ahead, into the second cache

// --- rules: the new value of a vector of entries -------------------------------------------------

template <class O>
struct AdamWRule {
  using F = typename O::F;
  static constexpr bool kFirst = true, kSecond = true;
  F multiplier, decay, blend, beta2, rest2, root, step, eps;
  bool near;

  explicit AdamWRule(const UpdateScalars& s)
      : multiplier(O::set1f(s.multiplier)), decay(O::set1f(s.decay)), blend(O::set1f(s.blend)),
        beta2(O::set1f(s.beta2)), rest2(O::set1f(s.rest2)), root(O::set1f(s.root)),
        step(O::set1f(s.step)), eps(O::set1f(s.eps)), near(s.near) {}

  inline __attribute__((always_inline)) F operator()(F p, F g, F& m, F& v) const {
    g = O::mulf(g, multiplier);
    m = O::addf(near ? m : g, O::mulf(blend, O::subf(g, m)));
    v = O::addf(O::mulf(v, beta2), O::mulf(O::mulf(g, g), rest2));
    const F denominator = O::addf(O::mulf(O::sqrtf(v), root), eps);
    return O::subf(O::mulf(p, decay), O::divf(O::mulf(m, step), denominator));
  }
};

template <class O, bool MOMENTUM>
struct SgdRule {
  using F = typename O::F;
  static constexpr bool kFirst = MOMENTUM, kSecond = false;
  F multiplier, decay, momentum, rest, lr;
  bool decays, fresh, nesterov;

  explicit SgdRule(const UpdateScalars& s)
      : multiplier(O::set1f(s.multiplier)), decay(O::set1f(s.decay)),
        momentum(O::set1f(s.momentum)), rest(O::set1f(s.rest)), lr(O::set1f(s.lr)),
        decays(s.decays), fresh(s.fresh), nesterov(s.nesterov) {}

  inline __attribute__((always_inline)) F operator()(F p, F g, F& m, F&) const {
    g = O::mulf(g, multiplier);
    if (decays) g = O::addf(g, O::mulf(p, decay));
    F direction = g;
    if (MOMENTUM) {
      m = fresh ? g : O::addf(O::mulf(m, momentum), O::mulf(g, rest));
      direction = nesterov ? O::addf(g, O::mulf(m, momentum)) : m;
    }
    return O::subf(p, O::mulf(direction, lr));
  }
};

// --- entries side by side ------------------------------------------------------------------------

template <class T>
constexpr int size_of(T) {
  return 4;
}
template <>
constexpr int size_of(FloatBits::BF16) {
  return 2;
}
struct NoWeight {};
template <class P, class W>
constexpr bool same_type(P, W) {
  return false;
}
template <class P>
constexpr bool same_type(P, P) {
  return true;
}

// Moves the entries of one vector; returns their values as the parameter stores them.
template <class O, class R, class P>
NB_INLINE typename O::F move(const R& rule, P type, void* param, typename O::F p, typename O::F g,
                             float* first, float* second) {
  typename O::F m = g, v = g;
  if (R::kFirst) m = O::loadf(first);
  if (R::kSecond) v = O::loadf(second);
  p = rule(p, g, m, v);
  if (R::kFirst) O::storef(first, m);
  if (R::kSecond) O::storef(second, v);
  O::store_as(type, param, p);
  return p;
}

// The last entries, fewer than a vector: through buffers, so that nothing behind them is touched.
template <class O, class R, class P, class W>
static __attribute__((noinline)) void move_tail(const R& rule, P type, W weight_type, char* param,
                                                const char* grad, float* first, float* second,
                                                char* weight, int64_t count) {
  constexpr int size = size_of(P{});
  alignas(64) char p[O::kLanes * 4] = {}, g[O::kLanes * 4] = {}, w[O::kLanes * 4];
  alignas(64) float m[O::kLanes] = {}, v[O::kLanes] = {};
  const size_t bytes = static_cast<size_t>(count) * size, states = static_cast<size_t>(count) * 4;
  memcpy(p, param, bytes);
  memcpy(g, grad, bytes);
  if (R::kFirst) memcpy(m, first, states);
  if (R::kSecond) memcpy(v, second, states);
  move<O>(rule, type, p, O::load_as(type, p), O::load_as(type, g), m, v);
  memcpy(param, p, bytes);
  if (R::kFirst) memcpy(first, m, states);
  if (R::kSecond) memcpy(second, v, states);
  if constexpr (!same_type(W{}, NoWeight{})) {
    O::store_as(weight_type, w, O::load_as(type, p));
    memcpy(weight, w, static_cast<size_t>(count) * size_of(W{}));
  }
}

template <class O, class R, class P, class W, bool STREAM>
NB_INLINE void move_span(const R& rule, P type, W weight_type, char* param, const char* grad,
                         float* first, float* second, char* weight, int64_t count) {
  constexpr int size = size_of(P{});
  int64_t i = 0;
  for (; i + O::kLanes <= count; i += O::kLanes) {
    typename O::F p = move<O>(rule, type, param + i * size, O::load_as(type, param + i * size),
                              O::load_as(type, grad + i * size), R::kFirst ? first + i : nullptr,
                              R::kSecond ? second + i : nullptr);
    if constexpr (!same_type(W{}, NoWeight{})) {
      char* to = weight + i * size_of(W{});
      // What bfloat16 rounded away must not come back in a float32 weight.
      if (!same_type(type, weight_type)) p = O::load_as(type, param + i * size);
      if (STREAM) {
        O::stream_as(weight_type, to, p);
      } else {
        O::store_as(weight_type, to, p);
      }
    }
  }
  if (i < count) {
    move_tail<O>(rule, type, weight_type, param + i * size, grad + i * size,
                 R::kFirst ? first + i : nullptr, R::kSecond ? second + i : nullptr,
                 weight + i * size_of(W{}), count - i);
  }
}

// --- blocks --------------------------------------------------------------------------------------

// Where a block and its part of the weight lie.
struct Place {
  const char *param, *grad, *first, *second, *weight;
  int64_t row_bytes, state_bytes, weight_step, weight_bytes, rows;
};

static inline Place place_of(const UpdateParams& u, const UpdateTensor& t, int64_t z) {
  const int64_t B = u.block, size = dtype_size(t.type), wide = dtype_size(t.weight_type);
  const int64_t n0 = t.blocks[2 * z] * B, k0 = t.blocks[2 * z + 1] * B, at = z * B * B;
  Place p;
  p.param = static_cast<const char*>(t.param) + at * size;
  p.grad = static_cast<const char*>(t.grad) + at * size;
  p.first = t.first ? reinterpret_cast<const char*>(t.first + at) : nullptr;
  p.second = t.second ? reinterpret_cast<const char*>(t.second + at) : nullptr;
  p.weight = static_cast<const char*>(t.weight) + (n0 * t.weight_stride + k0) * wide;
  p.row_bytes = B * size;
  p.state_bytes = B * 4;
  p.weight_step = t.weight_stride * wide;
  p.weight_bytes = min64(B, t.k - k0) * wide;
  p.rows = min64(B, t.n - n0);
  return p;
}

template <class O>
NB_INLINE void fetch_row(const Place& p, int64_t i, bool weight) {
  if (i >= p.rows) return;
  for (int64_t b = 0; b < p.row_bytes; b += 64) {
    O::prefetch(p.param + i * p.row_bytes + b);
    O::prefetch(p.grad + i * p.row_bytes + b);
  }
  for (int64_t b = 0; b < p.state_bytes; b += 64) {
    if (p.first) O::prefetch(p.first + i * p.state_bytes + b);
    if (p.second) O::prefetch(p.second + i * p.state_bytes + b);
  }
  if (!weight) return;
  for (int64_t b = 0; b < p.weight_bytes; b += 64) O::prefetch(p.weight + i * p.weight_step + b);
}

// Moves block z and writes it to the weight. `next` is the block to fetch meanwhile, or null: the
// processor's own prefetchers stop at the end of a page, which a block of 32 fills in each of its
// streams, and each row of the weight lies on another.
template <class O, class R, class P, class W>
static void write_block(const R& rule, P type, W weight_type, const UpdateParams& u,
                        const UpdateTensor& t, int64_t z, const Place* next) {
  constexpr int size = size_of(P{}), wide = size_of(W{});
  const int64_t B = u.block, ahead = min64(B, 1024 / B);
  const Place place = place_of(u, t, z);
  const int64_t cols = place.weight_bytes / wide;
  char* weight = const_cast<char*>(place.weight);
  // Whole lines only: a line of which a part is streamed costs more than one that is stored.
  const bool stream = u.stream && place.weight_bytes % 64 == 0 && place.weight_step % 64 == 0 &&
                      reinterpret_cast<uintptr_t>(weight) % 64 == 0;
  for (int64_t i = 0; i < place.rows; ++i) {
    if (i + ahead < B) {
      fetch_row<O>(place, i + ahead, !stream);
    } else if (next) {
      fetch_row<O>(*next, i + ahead - B, !stream);
    }
    const int64_t at = (z * B + i) * B;
    char* param = static_cast<char*>(t.param) + at * size;
    const char* grad = static_cast<const char*>(t.grad) + at * size;
    float* first = R::kFirst ? t.first + at : nullptr;
    float* second = R::kSecond ? t.second + at : nullptr;
    char* to = weight + i * place.weight_step;
    if (stream) {
      move_span<O, R, P, W, true>(rule, type, weight_type, param, grad, first, second, to, cols);
    } else {
      move_span<O, R, P, W, false>(rule, type, weight_type, param, grad, first, second, to, cols);
    }
  }
}

template <class O, class R, class P>
static void block_task(const UpdateParams& u, const UpdateTensor& t, P type, int64_t task) {
  constexpr int size = size_of(P{});
  const int64_t per = update_task_blocks(u.block), end = min64(t.count, (task + 1) * per);
  const int64_t area = u.block * u.block;
  int64_t age = t.age[task * per];
  R rule(update_scalars(u, age));
  const UpdateTensor* last = u.tensors + u.tensor_count - 1;
  for (int64_t z = task * per; z < end; ++z) {
    if (t.age[z] != age) {
      age = t.age[z];
      rule = R(update_scalars(u, age));
    }
    if (!t.weight) {
      char* param = static_cast<char*>(t.param) + z * area * size;
      move_span<O, R, P, NoWeight, false>(
          rule, type, NoWeight{}, param, static_cast<const char*>(t.grad) + z * area * size,
          R::kFirst ? t.first + z * area : nullptr, R::kSecond ? t.second + z * area : nullptr,
          nullptr, area);
      continue;
    }
    Place place;
    const Place* next = nullptr;
    if (z + 1 < t.count) {
      place = place_of(u, t, z + 1);
      next = &place;
    } else if (&t < last && (&t)[1].count > 0) {
      place = place_of(u, (&t)[1], 0);
      next = &place;
    }
    if (t.weight_type == Dtype::kF32) {
      write_block<O>(rule, type, FloatBits::F32{}, u, t, z, next);
    } else {
      write_block<O>(rule, type, FloatBits::BF16{}, u, t, z, next);
    }
  }
}

// --- scattered entries ---------------------------------------------------------------------------

// Moves param[index[i]]; the gradient is packed as the states are, or lies as param does.
template <class O, class R, class P, class I>
static void move_list(const R& rule, P type, char* param, const char* grad, bool packed,
                      const I* index, int64_t count, float* first, float* second) {
  constexpr int size = size_of(P{});
  // Into the second cache, which can wait for several times as many lines as the first.
  const auto fetch = [&](int64_t from) {
    NB_UNROLL
    for (int l = 0; l < O::kLanes; ++l) {
      const int64_t at = index[from + l];
      _mm_prefetch(param + at * size, _MM_HINT_T1);
      if (!packed) _mm_prefetch(grad + at * size, _MM_HINT_T1);
    }
  };
  int64_t i = 0;
  for (; i + O::kLanes <= min64(count, kAheadEntries); i += O::kLanes) fetch(i);
  for (i = 0; i + O::kLanes <= count; i += O::kLanes) {
    if (i + kAheadEntries + O::kLanes <= count) fetch(i + kAheadEntries);
    typename O::F m = O::set1f(0.0f), v = m;
    if (R::kFirst) m = O::loadf(first + i);
    if (R::kSecond) v = O::loadf(second + i);
    const typename O::F g =
        packed ? O::load_as(type, grad + i * size) : O::gather(type, grad, index + i);
    const typename O::F p = rule(O::gather(type, param, index + i), g, m, v);
    if (R::kFirst) O::storef(first + i, m);
    if (R::kSecond) O::storef(second + i, v);
    O::scatter(type, param, index + i, p);
  }
  if (i == count) return;
  // The rest, gathered into a short array.
  alignas(64) char p[O::kLanes * 4] = {}, g[O::kLanes * 4] = {};
  for (int64_t j = i; j < count; ++j) {
    const int64_t at = index[j];
    memcpy(p + (j - i) * size, param + at * size, size);
    memcpy(g + (j - i) * size, grad + (packed ? j : at) * size, size);
  }
  move_tail<O>(rule, type, NoWeight{}, p, g, R::kFirst ? first + i : nullptr,
               R::kSecond ? second + i : nullptr, nullptr, count - i);
  for (int64_t j = i; j < count; ++j) memcpy(param + index[j] * size, p + (j - i) * size, size);
}

template <class O, class R, class P>
static void flat_task(const UpdateParams& u, const UpdateTensor& t, P type, int64_t task) {
  constexpr int size = size_of(P{});
  const int64_t begin = task * kUpdateTaskEntries;
  const int64_t count = min64(t.count - begin, kUpdateTaskEntries);
  const R rule(update_scalars(u, t.age[0]));
  char* param = static_cast<char*>(t.param);
  const char* grad = static_cast<const char*>(t.grad) + (t.grad_packed ? begin * size : 0);
  float* first = R::kFirst ? t.first + begin : nullptr;
  float* second = R::kSecond ? t.second + begin : nullptr;
  if (t.index64) {
    move_list<O>(rule, type, param, grad, t.grad_packed,
                 static_cast<const int64_t*>(t.index) + begin, count, first, second);
  } else {
    move_list<O>(rule, type, param, grad, t.grad_packed,
                 static_cast<const int32_t*>(t.index) + begin, count, first, second);
  }
}

// --- bool masks ----------------------------------------------------------------------------------

// A chunk of which some entries are active: at most `active`, whatever the mask says.
template <class O, class R, class P>
static void move_some(const R& rule, P type, char* param, const char* grad, const uint8_t* mask,
                      int64_t count, float* first, float* second, int64_t active) {
  constexpr int size = size_of(P{});
  if constexpr (O::kExpand) {
    int64_t done = 0;
    for (int64_t i = 0; i < count; i += O::kLanes) {
      const typename O::Mask k = O::mask_of(mask + i, count - i);
      const int64_t more = O::ones(k);
      if (!more) continue;
      if (done + more > active) return;
      const typename O::F g = O::load_masked(type, k, grad + i * size);
      typename O::F m = g, v = g;
      if (R::kFirst) m = O::expand(k, first + done);
      if (R::kSecond) v = O::expand(k, second + done);
      const typename O::F p = rule(O::load_masked(type, k, param + i * size), g, m, v);
      if (R::kFirst) O::compress(k, first + done, m);
      if (R::kSecond) O::compress(k, second + done, v);
      O::store_masked(type, k, param + i * size, p);
      done += more;
    }
  } else {
    int32_t index[kMaskChunk];
    int64_t found = 0;
    for (int64_t i = 0; i < count; ++i) {
      index[found] = static_cast<int32_t>(i);
      found += mask[i] != 0;
    }
    move_list<O>(rule, type, param, grad, false, index, min64(found, active), first, second);
  }
}

template <class O, class R, class P>
static void bool_task(const UpdateParams& u, const UpdateTensor& t, P type, int64_t task) {
  constexpr int size = size_of(P{});
  const R rule(update_scalars(u, t.age[0]));
  const int64_t begin = task * kUpdateTaskEntries;
  const int64_t end = min64(t.count, begin + kUpdateTaskEntries);
  const auto span = [&](int64_t from, int64_t state, int64_t count) {
    move_span<O, R, P, NoWeight, false>(
        rule, type, NoWeight{}, static_cast<char*>(t.param) + from * size,
        static_cast<const char*>(t.grad) + from * size, R::kFirst ? t.first + state : nullptr,
        R::kSecond ? t.second + state : nullptr, nullptr, count);
  };
  if (!t.mask) return span(begin, begin, end - begin);
  for (int64_t i = begin; i < end; i += kMaskChunk) {
    const int64_t state = t.offsets[i / kMaskChunk];
    const int64_t active = t.offsets[i / kMaskChunk + 1] - state;
    const int64_t count = min64(kMaskChunk, end - i);
    if (active == 0) continue;
    if (active == count) {
      span(i, state, count);
    } else {
      move_some<O>(rule, type, static_cast<char*>(t.param) + i * size,
                   static_cast<const char*>(t.grad) + i * size, t.mask + i, count,
                   R::kFirst ? t.first + state : nullptr, R::kSecond ? t.second + state : nullptr,
                   active);
    }
  }
}

// --- a list of tensors ---------------------------------------------------------------------------

template <class O, class R, class P>
static void update_task(const UpdateParams& u, const UpdateTensor& t, P type, int64_t task) {
  switch (u.kind) {
  case MaskKind::kBlock:
    return block_task<O, R>(u, t, type, task);
  case MaskKind::kFlat:
    return flat_task<O, R>(u, t, type, task);
  default:
    return bool_task<O, R>(u, t, type, task);
  }
}

template <class O, class R>
static Status update_with(const UpdateParams& u) {
  auto body = [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    each_task(u.tensors, u.tensor_count, begin, end, [&](const UpdateTensor& t, int64_t task) {
      if (t.type == Dtype::kF32) {
        update_task<O, R>(u, t, FloatBits::F32{}, task);
      } else {
        update_task<O, R>(u, t, FloatBits::BF16{}, task);
      }
    });
    if (u.stream) _mm_sfence();
  };
  parallel_for(worth_tasks(u.parallel, u.task_count), u.task_count, body);
  return kOk;
}

template <class O>
static Status update(const UpdateParams& u) {
  if (u.rule == UpdateRule::kAdamW) return update_with<O, AdamWRule<O>>(u);
  // Momentum is the same for the whole list, and so is whether there are buffers for it.
  if (u.momentum != 0.0) return update_with<O, SgdRule<O, true>>(u);
  return update_with<O, SgdRule<O, false>>(u);
}

}  // namespace
}  // namespace nibblock
