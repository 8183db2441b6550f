// The masked optimiser step of packed blocks, one thread's view. cuda_block.h says which thread
// moves what; the operations and their order are those of cpu_update.h.
#pragma once

#include "cuda_arithmetic.cuh"
#include "cuda_block.h"

namespace nibblock {
namespace cuda {

// What an update multiplies with, beyond what StepParams holds.
struct StepScalars {
  float multiplier, one, two;  // AdamW: step and root; SGD: one is 0 at a block's first update
};

struct AdamWStep {
  static constexpr bool kFirst = true, kSecond = true;
  static constexpr int kWords = 2;  // coefficients of a block

  // Coefficient `which` of an update that `age` updates went before.
  static NB_DEVICE float coefficient(const StepParams& p, int which, int32_t age) {
    const double t = static_cast<double>(age) + 1.0;
    const double left = 1.0 - power(which ? p.beta2 : p.beta1, t);
    return static_cast<float>(which ? 1.0 / root(left) : p.lr / left);
  }
  static NB_DEVICE float move(const StepParams& p, const StepScalars& s, float x, float g, float& m,
                              float& v) {
    g = mul_flush(g, s.multiplier);
    m = add_flush(p.near ? m : g, mul_flush(p.blend, sub_flush(g, m)));
    v = add_flush(mul_flush(v, p.beta2_rounded), mul_flush(mul_flush(g, g), p.rest2));
    const float denominator = add_flush(mul_flush(sqrt_flush(v), s.two), p.eps);
    return sub_flush(mul_flush(x, p.decay), div_flush(mul_flush(m, s.one), denominator));
  }
};

template <bool kMomentum>
struct SgdStep {
  static constexpr bool kFirst = kMomentum, kSecond = false;
  static constexpr int kWords = 1;

  static NB_DEVICE float coefficient(const StepParams&, int, int32_t age) {
    return age == 0 ? 0.0f : 1.0f;
  }
  static NB_DEVICE float move(const StepParams& p, const StepScalars& s, float x, float g, float& m,
                              float&) {
    g = mul_flush(g, s.multiplier);
    if (p.decays) g = add_flush(g, mul_flush(x, p.decay));
    float direction = g;
    if constexpr (kMomentum) {
      m = s.one == 0.0f ? g : add_flush(mul_flush(m, p.momentum), mul_flush(g, p.rest));
      direction = p.nesterov ? add_flush(g, mul_flush(m, p.momentum)) : m;
    }
    return sub_flush(x, mul_flush(direction, p.lr_rounded));
  }
};

// --- 8 entries -----------------------------------------------------------------------------------

struct Float32 {};  // beside BFloat16

NB_DEVICE void load_entries(Float32, const void* from, int64_t at, bool aligned, float (&x)[8]) {
  const float* const f = static_cast<const float*>(from) + at;
  if (aligned) {
    const Floats4 low = load_global(reinterpret_cast<const Floats4*>(f));
    const Floats4 high = load_global(reinterpret_cast<const Floats4*>(f) + 1);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = i < 4 ? low.f[i & 3] : high.f[i & 3];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = load_global(f + i);
  }
}
NB_DEVICE void load_entries(BFloat16, const void* from, int64_t at, bool aligned, float (&x)[8]) {
  const uint16_t* const h = static_cast<const uint16_t*>(from) + at;
  if (aligned) {
    const Words4 v = load_global(reinterpret_cast<const Words4*>(h));
#pragma unroll
    for (int i = 0; i < 8; ++i)
      x[i] = widen<BFloat16>(static_cast<uint16_t>(v.w[i / 2] >> (16 * (i & 1))));
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = widen<BFloat16>(load_global(h + i));
  }
}

// The first `count` of 8 entries.
NB_DEVICE void store_entries(Float32, void* to, int64_t at, bool aligned, int count,
                             const float (&x)[8]) {
  float* const f = static_cast<float*>(to) + at;
  if (aligned && count == 8) {
    store_global(reinterpret_cast<Floats4*>(f), Floats4{{x[0], x[1], x[2], x[3]}});
    store_global(reinterpret_cast<Floats4*>(f) + 1, Floats4{{x[4], x[5], x[6], x[7]}});
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) store_global(f + i, x[i]);
    }
  }
}
NB_DEVICE void store_entries(BFloat16, void* to, int64_t at, bool aligned, int count,
                             const float (&x)[8]) {
  uint16_t* const h = static_cast<uint16_t*>(to) + at;
  if (aligned && count == 8) {
    Words4 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v.w[i] = round_to<BFloat16>(x[2 * i]) |
               static_cast<uint32_t>(round_to<BFloat16>(x[2 * i + 1])) << 16;
    }
    store_global(reinterpret_cast<Words4*>(h), v);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) store_global(h + i, round_to<BFloat16>(x[i]));
    }
  }
}

// What the parameter holds once it is stored: a wider weight must not get back what was rounded.
NB_DEVICE float as_stored(Float32, float x) { return x; }
NB_DEVICE float as_stored(BFloat16, float x) { return widen<BFloat16>(round_to<BFloat16>(x)); }

// --- a thread block ------------------------------------------------------------------------------

template <class P, class R>
NB_DEVICE void step_body(const StepParams& p, uint8_t* shared, int task, int thread) {
  const StepTensor& t = p.tensor[step_tensor(p, task)];
  const int first = (task - t.first_task) * step_blocks(p.shift);
  float x[8], g[8], m[8] = {}, v[8] = {};
  const auto load = [&](int64_t at) {
    load_entries(P{}, t.param, at, t.aligned, x);
    load_entries(P{}, t.grad, at, t.aligned, g);
    if constexpr (R::kFirst) load_entries(Float32{}, t.first, at, t.aligned, m);
    if constexpr (R::kSecond) load_entries(Float32{}, t.second, at, t.aligned, v);
  };
  // The first warp works out the coefficients of all, and only then asks for its own entries: over
  // a power, they would not fit the registers. The other warps' are on their way meanwhile.
  int32_t age = 0;
  const int mine = first + thread / R::kWords, which = thread % R::kWords;
  const bool keeper = thread < step_blocks(p.shift) * R::kWords && mine < t.count;
  if (keeper) {
    age = load_global(t.age + mine);
    store_shared(shared + 4 * thread, R::coefficient(p, which, age));
  }
  Spot spot = step_spot(p.shift, thread, 0);
  const int z = first + spot.local;
  const bool there = z < t.count;
  const int64_t begin = static_cast<int64_t>(there ? z : 0) << (2 * p.shift);
  if (there) load(begin + spot.entry);
  int64_t row0 = 0, column0 = 0;
  if (there && t.weight) {
    row0 = static_cast<int64_t>(load_global(t.blocks + 2 * z)) << p.shift;
    column0 = static_cast<int64_t>(load_global(t.blocks + 2 * z + 1)) << p.shift;
  }
  if (p.found_inf && !(load_global(p.found_inf) == 0.0f)) return;  // the whole thread block
  sync_block();
  if (keeper && which == 0) store_global(t.age + mine, age + 1);
  if (!there) return;
  StepScalars s;
  s.multiplier = p.multiplier ? mul_flush(load_global(p.multiplier), p.sign) : p.sign;
  s.one = load_shared<float>(shared + 4 * R::kWords * spot.local);
  s.two = R::kWords > 1 ? load_shared<float>(shared + 4 * (2 * spot.local + 1)) : 0.0f;
  const int passes = step_passes(p.shift);
  for (int pass = 0; pass < passes; ++pass) {
    if (pass > 0) {
      spot = step_spot(p.shift, thread, pass);
      load(begin + spot.entry);
    }
    const int64_t at = begin + spot.entry;
    const int64_t row = row0 + (spot.entry >> p.shift);
    const int64_t column = column0 + (spot.entry & ((1 << p.shift) - 1));
    int count = 8;
    if (t.weight) {
      // Blocks were checked where the list was built. One that lies elsewhere moves nothing.
      const bool inside = row >= 0 && row < t.n && column >= 0 && column < t.k;
      count = !inside ? 0 : t.k - column < 8 ? static_cast<int>(t.k - column) : 8;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = R::move(p, s, x[i], g[i], m[i], v[i]);
    store_entries(P{}, t.param, at, t.aligned, count, x);
    if constexpr (R::kFirst) store_entries(Float32{}, t.first, at, t.aligned, count, m);
    if constexpr (R::kSecond) store_entries(Float32{}, t.second, at, t.aligned, count, v);
    if (t.weight) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = as_stored(P{}, x[i]);
      const int64_t to = row * t.weight_stride + column;
      if (t.weight_bf16) {
        store_entries(BFloat16{}, t.weight, to, t.weight_aligned, count, x);
      } else {
        store_entries(Float32{}, t.weight, to, t.weight_aligned, count, x);
      }
    }
  }
}

}  // namespace cuda
}  // namespace nibblock
