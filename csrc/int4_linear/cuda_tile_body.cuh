// The tile kernel's body for compute capability 9.0a, one thread's view. cuda_tile.h draws it;
// cuda_sm90a.cuh holds the instructions, for the GPU or for the software model of the tests.
#pragma once

#include "../common/cuda_sm90a.cuh"
#include "cuda_codes.cuh"
#include "cuda_tile.h"

namespace nibblock {
namespace cuda {

struct TileParams {
  TensorMap x;                                  // of tile_map(), element = the kernel's type
  const uint8_t* packed;                        // multiple of 16
  uint16_t* y;                                  // [m, n], the kernel's type
  const void* bias;                             // [n] or null
  Floats4* partials;                            // 2 * blocks slots of slot_floats
  const float* x_sums;                          // affine: [slots][m_pad], multiple of 16
  int32_t* counters;                            // two for each tile, zero before and after
  int64_t panel_stride, scales_at, offsets_at;  // bytes
  int64_t y_stride;                             // elements
  int32_t m, n, k, k_pad, panels, groups, shift;
  int32_t m_pad;       // m in whole tiles
  int32_t bias_type;   // 0 float32, 1 bfloat16, 2 float16
  int32_t wide_scale;  // scales are float32, else float16
  int32_t y_aligned;   // y and its row stride are multiples of 4 bytes
  Schedule schedule;
};

template <class T, class Shape>
struct Tile {
  static constexpr int kSums = Shape::sums;

  const TileParams& p;
  uint8_t* shared;  // multiple of kSwizzleBytes
  int block, thread;

  NB_DEVICE uint8_t* stage_base(int stage) const { return shared + stage * Shape::stage_bytes; }
  NB_DEVICE uint8_t* full(int stage) const { return shared + Shape::barriers_at + 16 * stage; }
  NB_DEVICE uint8_t* empty(int stage) const { return full(stage) + 8; }

  // Groups of a stage that exist.
  NB_DEVICE int slots_of(int chunk) const {
    const int left = p.groups - ((chunk * kStageK) >> p.shift);
    const int all = stage_groups(p.shift);
    return left < all ? left : all;
  }

  NB_DEVICE void set_up() const {
    if (thread == 0) {
      for (int stage = 0; stage < Shape::stages; ++stage) {
        barrier_init(full(stage), 1);
        barrier_init(empty(stage), kTileWarps);
      }
      barrier_init_fence();
    }
    sync_block();
  }

  // --- copies: one warp, a lane for each piece ---------------------------------------------------

  // A panel's codes of one stage. Where K ends in the middle of it, its first half stands in for
  // the second: those codes meet zeros of x, and are numbers that way.
  NB_DEVICE void copy_codes(uint8_t* to, const uint8_t* codes, int chunk, uint8_t* barrier,
                            uint64_t policy) const {
    const uint8_t* const from = codes + static_cast<int64_t>(chunk) * Shape::panel_bytes;
    constexpr int kHalf = Shape::panel_bytes / 2;
    if (p.k_pad - chunk * kStageK >= kStageK) {
      copy_bulk(to, from, 2 * kHalf, barrier, policy);
    } else {
      copy_bulk(to, from, kHalf, barrier, policy);
      copy_bulk(to + kHalf, from, kHalf, barrier, policy);
    }
  }

  NB_DEVICE void produce() const {
    const int lane = thread & 31;
    const uint64_t policy = p.schedule.token_tiles == 1 ? once_policy() : shared_policy();
    const int64_t begin = first_unit(p.schedule, block);
    const int count = static_cast<int>(first_unit(p.schedule, block + 1) - begin);
    const int scale_size = p.wide_scale ? 4 : 2;
    Cursor c = cursor_at(p.schedule, begin);
    int stage = 0;
    uint32_t parity = 1;
    for (int i = 0; i < count; ++i) {
      const int row_tile = c.tile / p.schedule.token_tiles;
      const int token = (c.tile - row_tile * p.schedule.token_tiles) * Shape::tokens;
      const int group = (c.chunk * kStageK) >> p.shift;
      const int scales = slots_of(c.chunk) * kPanel * scale_size;
      uint8_t* const base = stage_base(stage);
      uint8_t* const barrier = full(stage);
      // A lane's panel; behind the last one the last again, whose products nobody stores.
      const int panel_of_tile = lane & (kTilePanels - 1);
      const int wanted = row_tile * kTilePanels + panel_of_tile;
      const int panel = wanted < p.panels ? wanted : p.panels - 1;
      const uint8_t* const codes = p.packed + panel * p.panel_stride;
      const int64_t scale = static_cast<int64_t>(group) * kPanel * scale_size;
      barrier_wait(empty(stage), parity);
      if (lane == 0) {
        const int each = Shape::panel_bytes + (Shape::affine ? 2 : 1) * scales;
        const int sums = Shape::affine ? stage_groups(p.shift) * Shape::tokens * 4 : 0;
        barrier_arrive_expect(barrier, kBoxes * Shape::box_bytes + kTilePanels * each + sums);
      }
      sync_warp();  // the barrier expects the bytes before any of them comes
      if (lane < kBoxes) {
        copy_box(base + lane * Shape::box_bytes, &p.x, c.chunk * kStageK + lane * kBoxK, token,
                 barrier);
      } else if (lane >= 8 && lane < 16) {
        copy_codes(base + Shape::codes_at + panel_of_tile * Shape::panel_bytes, codes, c.chunk,
                   barrier, policy);
      } else if (lane >= 16 && lane < 24) {
        copy_bulk(base + Shape::scales_at + panel_of_tile * Shape::scale_pitch,
                  codes + p.scales_at + scale, scales, barrier, policy);
      } else if (Shape::affine && lane >= 24) {
        copy_bulk(base + Shape::offsets_at + panel_of_tile * Shape::scale_pitch,
                  codes + p.offsets_at + scale, scales, barrier, policy);
      } else if (Shape::affine && lane >= 4 && lane - 4 < stage_groups(p.shift)) {
        const int64_t slot = static_cast<int64_t>(c.chunk) * stage_groups(p.shift) + lane - 4;
        copy_bulk(base + Shape::x_sums_at + (lane - 4) * Shape::tokens * 4,
                  p.x_sums + slot * p.m_pad + token, Shape::tokens * 4, barrier, policy);
      }
      sync_warp();
      advance(c, p.schedule.chunks);
      if (++stage == Shape::stages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }

  // --- products: two warpgroups ------------------------------------------------------------------

  // Fragments of step `step` (32 k, two products) of the warp's panel.
  NB_DEVICE void convert(const uint8_t* base, int step, uint32_t (&a)[2][4]) const {
    const int panel = (thread >> 5) & (kTilePanels - 1);
    const Lane at = lane_of(thread);
    const uint8_t* const codes = base + Shape::codes_at + panel * Shape::panel_bytes;
    const int shift = tile_code_shift(Shape::bits, at);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Words2 w =
            load_shared<Words2>(codes + tile_code_byte(Shape::halves, 4 * step + 2 * i + half, at));
        a[i][2 * half] = pair<T, Shape::bits>(w.w[0] >> shift);
        a[i][2 * half + 1] = pair<T, Shape::bits>(w.w[1] >> shift);
      }
    }
  }

  NB_DEVICE Floats2 load_two(const uint8_t* section, int slot) const {
    const int panel = (thread >> 5) & (kTilePanels - 1), g = lane_of(thread).g;
    const uint8_t* const from = section + panel * Shape::scale_pitch;
    if (p.wide_scale) return load_shared<Floats2>(from + (slot * kPanel + 2 * g) * 4);
    const uint32_t v = load_shared<uint32_t>(from + (slot * kPanel + 2 * g) * 2);
    return Floats2{
        {widen<Float16>(static_cast<uint16_t>(v)), widen<Float16>(static_cast<uint16_t>(v >> 16))}};
  }

  // Adds the k since the last call: scale * sum of codes and x, and offset * sum of x.
  NB_DEVICE void scale(const uint8_t* base, int slot, int slots, const float (&part)[kSums],
                       float (&sums)[kSums]) const {
    const int there = slot < slots ? slot : slots - 1;  // behind K: part and x_sums are zeros
    const Floats2 s = load_two(base + Shape::scales_at, there);
    Floats2 o = {};
    if constexpr (Shape::affine) {
      o = load_two(base + Shape::offsets_at, there);
      constexpr float kCentre = Shape::bits == 4 ? 8.0f : 128.0f;
#pragma unroll
      for (int i = 0; i < 2; ++i) o.f[i] = fma_float(kCentre, s.f[i], o.f[i]);
    }
    const uint8_t* const x_sums =
        base + Shape::x_sums_at + (slot * Shape::tokens + 2 * lane_of(thread).t) * 4;
#pragma unroll
    for (int j = 0; j < kSums / 4; ++j) {
      Floats2 x = {};
      if constexpr (Shape::affine) x = load_shared<Floats2>(x_sums + 8 * j * 4);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float v = fma_float(s.f[e >> 1], part[4 * j + e], sums[4 * j + e]);
        if constexpr (Shape::affine) v = fma_float(o.f[e >> 1], x.f[e & 1], v);
        sums[4 * j + e] = v;
      }
    }
  }

  // Element 4j + e of the sums: row 2g + (e >> 1) of the panel, token 8j + 2t + (e & 1).
  NB_DEVICE void store(int tile, const float (&sums)[kSums]) const {
    const int row_tile = tile / p.schedule.token_tiles;
    const Lane at = lane_of(thread);
    const int n = row_tile * kTileRows + (thread >> 5) * kPanel + 2 * at.g;
    if (n >= p.n) return;
    const bool two = n + 1 < p.n;
    float bias[2] = {};
    if (p.bias) {
      bias[0] = load_bias(p.bias, p.bias_type, n);
      if (two) bias[1] = load_bias(p.bias, p.bias_type, n + 1);
    }
    const int first = (tile - row_tile * p.schedule.token_tiles) * Shape::tokens + 2 * at.t;
#pragma unroll
    for (int j = 0; j < kSums / 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int m = first + 8 * j + e;
        if (m >= p.m) continue;
        uint16_t* const to = p.y + m * p.y_stride + n;
        const uint16_t low = round_to<T>(sums[4 * j + e] + bias[0]);
        const uint16_t high = round_to<T>(sums[4 * j + 2 + e] + bias[1]);
        if (p.y_aligned && two) {
          store_global(reinterpret_cast<uint32_t*>(to), low | static_cast<uint32_t>(high) << 16);
        } else {
          store_global(to, low);
          if (two) store_global(to + 1, high);
        }
      }
    }
  }

  // The end of this block's part of a tile, each warpgroup for its 64 rows: alone it stores y;
  // otherwise it leaves its sums behind, and whoever comes last adds all of them, first k first.
  NB_DEVICE void finish(int tile, float (&sums)[kSums]) const {
    const Sharers who = sharers(p.schedule, tile);
    if (who.first != who.last && !collect(tile, who, sums)) return;
    store(tile, sums);
  }

  // Leaves the sums behind; the last to come gets everybody's, and true.
  NB_DEVICE bool collect(int tile, const Sharers& who, float (&sums)[kSums]) const {
    const int half = thread >> 7;
    constexpr int kSlot = Shape::slot_floats / 4;
    const int place = half * (kSlot / 2) + (thread & 127);
    Floats4* const own = p.partials + partial_slot(p.schedule, block, tile) * kSlot + place;
#pragma unroll
    for (int j = 0; j < kSums / 4; ++j) {
      store_global(own + j * 128,
                   Floats4{{sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]}});
    }
    fence();
    sync_threads(1 + half, 128);
    uint8_t* const flag = shared + Shape::flags_at + 4 * half;
    if ((thread & 127) == 0) {
      int32_t* const counter = p.counters + 2 * tile + half;
      const int before = count_arrival(counter);
      const uint32_t last = before == who.last - who.first;
      if (last) store_global(counter, 0);  // ready for the next launch
      store_shared(flag, last);
    }
    sync_threads(1 + half, 128);
    if (!load_shared<uint32_t>(flag)) return false;
    fence();
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
    for (int b = who.first; b <= who.last; ++b) {
      const Floats4* const from = p.partials + partial_slot(p.schedule, b, tile) * kSlot + place;
#pragma unroll
      for (int j = 0; j < kSums / 4; ++j) {
        const Floats4 v = load_others(from + j * 128);
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[4 * j + e] += v.f[e];
      }
    }
    return true;
  }

  // One stage. Two buffers of fragments: while the tensor cores multiply one step, the next one is
  // converted. a[0] holds the first step's fragments, and in the end those of the next stage, if
  // there is one. The group is the compiler's to know (128 stands for everything wider): a branch
  // between products would make it wait for each.
  template <int kShift>
  NB_DEVICE void multiply(const uint8_t* base, int slots, bool more, int next_stage,
                          uint32_t next_parity, uint32_t (&a)[2][2][4], float (&part)[kSums],
                          float (&sums)[kSums]) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      product_fence();
#pragma unroll
      for (int product = 0; product < 2; ++product) {
        const int keep = product || (step && !step_ends_group(kShift, step - 1));
        const int place = tile_product_byte(Shape::tokens, 2 * step + product);
        begin_product<T>(part, a[step & 1][product], tile_descriptor(shared_address(base + place)),
                         keep);
      }
      commit_products();
      wait_products<1>();  // the step before has read its fragments
      if (step + 1 < kSteps) {
        convert(base, step + 1, a[(step + 1) & 1]);
      } else if (more) {
        barrier_wait(full(next_stage), next_parity);
        convert(stage_base(next_stage), 0, a[0]);
      }
      if (step_ends_group(kShift, step)) {
        finish_products(part);
        scale(base, step_slot(kShift, step), slots, part, sums);
      }
    }
  }

  NB_DEVICE void consume() const {
    const int64_t begin = first_unit(p.schedule, block);
    const int count = static_cast<int>(first_unit(p.schedule, block + 1) - begin);
    Cursor now = cursor_at(p.schedule, begin);
    float sums[kSums] = {}, part[kSums] = {};
    uint32_t a[2][2][4];
    int stage = 0;
    uint32_t parity = 0;
    barrier_wait(full(0), 0);
    convert(stage_base(0), 0, a[0]);
    for (int i = 0; i < count; ++i) {
      const uint8_t* const base = stage_base(stage);
      const int slots = slots_of(now.chunk);
      const bool more = i + 1 < count;
      int next_stage = stage + 1;
      uint32_t next_parity = parity;
      if (next_stage == Shape::stages) {
        next_stage = 0;
        next_parity ^= 1;
      }
      if (p.shift >= 7) {
        multiply<7>(base, slots, more, next_stage, next_parity, a, part, sums);
      } else if (p.shift == 6) {
        multiply<6>(base, slots, more, next_stage, next_parity, a, part, sums);
      } else {
        multiply<5>(base, slots, more, next_stage, next_parity, a, part, sums);
      }
      sync_warp();
      if ((thread & 31) == 0) barrier_arrive(empty(stage));
      if (now.chunk == p.schedule.chunks - 1 || !more) {
        finish(now.tile, sums);
#pragma unroll
        for (int s = 0; s < kSums; ++s) sums[s] = 0.0f;
      }
      advance(now, p.schedule.chunks);
      stage = next_stage;
      parity = next_parity;
    }
  }
};

template <class T, class Shape>
NB_DEVICE void tile_body(const TileParams& p, uint8_t* shared, int block, int thread) {
  const Tile<T, Shape> tile{p, shared, block, thread};
  tile.set_up();
  if (same_in_warp(thread >> 7) == kConsumers >> 7) {
    fewer_registers<24>();
    if (thread < kConsumers + 32) tile.produce();
  } else {
    more_registers<240>();
    tile.consume();
  }
}

// --- sums of x -----------------------------------------------------------------------------------

struct XSumParams {
  const uint16_t* x;  // multiple of 16, as its row stride
  float* out;         // [slots][m_pad]
  int64_t x_stride;
  int32_t m, k, m_pad, slots, shift;  // a slot is 1 << shift values of k
};

// One sum, in the order of k; neighbouring threads have neighbouring tokens.
template <class T>
NB_DEVICE void x_sum_body(const XSumParams& p, int64_t index) {
  if (index >= static_cast<int64_t>(p.slots) * p.m_pad) return;
  const int slot = static_cast<int>(index / p.m_pad);
  const int token = static_cast<int>(index - static_cast<int64_t>(slot) * p.m_pad);
  const int begin = slot << p.shift, all = begin + (1 << p.shift);
  const int end = token >= p.m ? begin : all < p.k ? all : p.k;
  const uint16_t* const row = p.x + token * p.x_stride;
  float sum = 0.0f;
  int k = begin;
  for (; k + 8 <= end; k += 8) {
    const Words4 v = load_global(reinterpret_cast<const Words4*>(row + k));
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      sum += widen<T>(static_cast<uint16_t>(v.w[w]));
      sum += widen<T>(static_cast<uint16_t>(v.w[w] >> 16));
    }
  }
  for (; k < end; ++k) sum += widen<T>(load_global(row + k));
  store_global(p.out + index, sum);
}

}  // namespace cuda
}  // namespace nibblock
