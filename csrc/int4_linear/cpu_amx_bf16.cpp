// int4_linear and its input gradient on AMX bfloat16 tiles: bfloat16 x (or dy), from 5 rows up.
//
// Both directions are one loop. An output unit is 32 columns wide (32 n forward, 32 k for dx), a
// step sums over 32 (k forward, n for dx), and a step of a unit needs two weight tiles, made from
// 32 n x 32 k packed codes, and two tiles of x (32 rows): four TDPBF16PS into a 2 x 2 block of
// accumulators.
//   forward  weights are operand A (a tile row is one n), x is operand B in pairs of k. A block
//            holds C^T [n][m] and is transposed on the way out. Dequantised rows are tile rows as
//            they come (cpu_amx_tiles.h).
//   dx       dy is operand A, plain rows; weights are operand B in pairs of n: two dequantised rows
//            interleaved by VPUNPCKLWD/HWD. The columns of a tile come out in a fixed order of k,
//            put right by VPERMT2PS in the epilogue.
// The result equals that of dequantising the weight to bfloat16 (rounded once) and multiplying in
// bfloat16 with float32 sums in the order of the steps: the same for any tile shape, chunk or
// thread.
//
// Budgets, in cycles of one core, per unit and step (32 x 32 weights) and 32 rows. A TDP takes 16,
// a tile load from L1 8, a tile store 16; L2 gives about 43 bytes a cycle.
//   TDP         64 for 2 x 2 tiles, 32 for 2 x 1 (at most 16 rows)
//   tile loads  4 x 8 = 32 on the load ports, under the TDPs
//   dequantise  120 / 145 / 160..190 at group 128 / 64 / 32, 8 bits 270, once per chunk of rows,
//               between the TDPs of the chunk's first 32 rows
//   sums        a block (4 KiB) is loaded and stored once a pass: 30 at 6 steps a pass, 3 at 64
//   x, y        packing x and writing y move 6 and 2..4 bytes an element through L3: 15 at 2048
// How the work is cut into passes, chunks and groups: cpu_amx_bf16_plan.h.
// Measured on an AVX-512 core with the TDPs left out and tile loads and stores as 16 vector loads
// and stores, N = K = 2048, group 128: 165 cycles a step at M = 16, 190 at 32, 180 at 64, 150 at
// 128, 145..160 at 256 and 512. The TDPs (32 at M = 16, else 64) overlap with that wholly at best,
// not at all at worst, which gives these shares of the tile peak at 4096 x 4096, group 128 (32):
//   M = 16         16..19 % (13..16 %): at 20 GB/s memory takes as long
//   M = 64         26..35 % (22..30 %)
//   M = 256, 1024  31..44 % (29..41 %)
// Fetching x or sums into L1 a block ahead, and passes of 4, 8, 10 or 12 steps, were slower or
// equal there.
#include "cpu_amx_bf16_plan.h"
#include "cpu_amx_tiles.h"

namespace nibblock {
namespace {

// The table gives these kernels no other p.xtype.
constexpr Dtype kXType = Dtype::kBF16;

template <bool Dx>
static inline const uint8_t* codes_at(const Problem& q, int64_t unit, int64_t step, int half) {
  const int64_t panel = 2 * (Dx ? step : unit) + half, k_step = Dx ? unit : step;
  if (panel >= q.g.panels) return nullptr;
  return q.p->packed + panel * q.g.panel_stride + k_step * q.code_bytes;
}

// Where a task keeps what it makes; one per running task.
struct Scratch {
  uint8_t* weights;  // [kPair][plan's block_steps, or kRing][2 tiles]
  uint8_t* sums;     // [unit of the group][block of the chunk][4 tiles]
  // Forward: of the unit's two panels. dx: of all panels of a pass, because the units of a group of
  // k follow each other there.
  PanelScales scales[2 * kBlockSteps];
  int64_t scales_of[2 * kBlockSteps];  // panel * groups + group in `scales`, or -1
};

template <bool Dx, int Bits>
static inline void dequantize_step(const Problem& q, Scratch& s, int64_t unit, int64_t step,
                                   uint8_t* out) {
  const int64_t group = (Dx ? unit : step) * kStepK / q.g.group;
  for (int half = 0; half < 2; ++half) {
    const uint8_t* codes = codes_at<Dx>(q, unit, step, half);
    if (!codes) {  // an odd number of panels: the last unit or step has only one
      for (int r = 0; r < 16; ++r) {
        uint8_t* row = Dx ? out + (r & 1) * amx::kTileBytes + (8 + (r >> 1)) * 64
                          : out + amx::kTileBytes + r * 64;
        _mm512_store_si512(row, _mm512_setzero_si512());
      }
      continue;
    }
    const int64_t panel = 2 * (Dx ? step : unit) + half;
    const int64_t slot = 2 * ((Dx ? step : unit) % kBlockSteps) + half;
    PanelScales& scales = s.scales[slot];
    if (s.scales_of[slot] != panel * q.g.groups + group) {
      s.scales_of[slot] = panel * q.g.groups + group;
      load_panel_scales(q.p->w, q.g, q.p->packed + panel * q.g.panel_stride, group, &scales);
    }
    RowReader<Bits> reader;
    reader.prepare(codes);
    if (Dx) {
      uint8_t* low = out + 8 * half * 64;
      uint8_t* high = low + amx::kTileBytes;
#pragma GCC unroll 8
      for (int r = 0; r < 16; r += 2) {
        const __m512i even = reader.row(scales, r), odd = reader.row(scales, r + 1);
        _mm512_store_si512(low + 32 * r, _mm512_unpacklo_epi16(even, odd));
        _mm512_store_si512(high + 32 * r, _mm512_unpackhi_epi16(even, odd));
      }
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        _mm512_store_si512(out + half * amx::kTileBytes + 64 * r, reader.row(scales, r));
      }
    }
  }
}

// Tiles 0..3 are sums (weight tile i, x tile j at 2i + j), 4 and 5 weights, 6 and 7 x.
template <bool Dx, int C, int W, int X>
NB_AMX_INLINE void multiply() {
  if (Dx) {
    amx::dot_bf16<C, X, W>();
  } else {
    amx::dot_bf16<C, W, X>();
  }
}

template <bool Dx, int Tiles>
NB_AMX_INLINE void tile_step(const uint8_t* w, const uint8_t* x) {
  amx::load<4>(w, 64);
  amx::load<6>(x, 64);
  multiply<Dx, 0, 4, 6>();
  amx::load<5>(w + amx::kTileBytes, 64);
  multiply<Dx, 2, 5, 6>();
  if (Tiles == 2) {
    amx::load<7>(x + amx::kTileBytes, 64);
    multiply<Dx, 1, 4, 7>();
    multiply<Dx, 3, 5, 7>();
  }
}

// What to fetch while a block is computed. Fetching never faults, so the last block may name
// anything.
struct Ahead {
  const uint8_t*
      x;  // this block's share of the next pass's x, from L3 to L2: `lines` for each step
  int64_t lines;
  int64_t unit, step;  // where the next weights to dequantise start
};

template <bool Dx>
NB_AMX_INLINE void fetch_codes(const Problem& q, const Ahead& next, int64_t step) {
  for (int half = 0; half < 2; ++half) {
    const uint8_t* codes = codes_at<Dx>(q, next.unit, next.step + step, half);
    for (int64_t at = 0; codes && at < q.code_bytes; at += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + at), _MM_HINT_T1);
    }
  }
}

// One 32-column unit x one block of rows x steps [begin, end). Dequantises as it goes when Fused:
// one step ahead of the tiles, so that the stores have left when the tile loads come.
template <bool Dx, int Bits, int Tiles, bool Fused>
static void run_block(const Problem& q, Scratch& s, uint8_t* weights, int64_t ring,
                      const uint8_t* x, uint8_t* sums, int64_t unit, int64_t begin, int64_t end,
                      const Ahead& next) {
  const int64_t steps = end - begin;
  if (begin == 0) {
    amx::zero<0>(), amx::zero<2>();
    if (Tiles == 2) amx::zero<1>(), amx::zero<3>();
  } else {
    amx::load<0>(sums, 64), amx::load<2>(sums + 2 * amx::kTileBytes, 64);
    if (Tiles == 2)
      amx::load<1>(sums + amx::kTileBytes, 64), amx::load<3>(sums + 3 * amx::kTileBytes, 64);
  }
  if (Fused && steps > 0) dequantize_step<Dx, Bits>(q, s, unit, begin, weights);
  for (int64_t i = 0; i < steps; ++i) {
    if (Fused) {
      if (i + 1 < steps) {
        dequantize_step<Dx, Bits>(q, s, unit, begin + i + 1,
                                  weights + ((i + 1) & ring) * kStepBytes);
      }
      fetch_codes<Dx>(q, next, i);
    }
    tile_step<Dx, Tiles>(weights + (i & ring) * kStepBytes, x + i * kStepBytes);
    for (int64_t line = i * next.lines; line < (i + 1) * next.lines; ++line) {
      _mm_prefetch(reinterpret_cast<const char*>(next.x + 64 * line), _MM_HINT_T1);
    }
  }
  amx::store<0>(sums, 64), amx::store<2>(sums + 2 * amx::kTileBytes, 64);
  if (Tiles == 2)
    amx::store<1>(sums + amx::kTileBytes, 64), amx::store<3>(sums + 3 * amx::kTileBytes, 64);
}

// The same with p.add between: the tile of 16 rows m x 32 n is laid out as that wants it.
static void write_forward_added(const Problem& q, int64_t unit, int64_t block,
                                const uint8_t* sums) {
  const Int4LinearParams& p = *q.p;
  const int64_t n = unit * kUnit;
  alignas(64) float tile[16 * kUnit];
  for (int j = 0; j < block_tiles(q, block); ++j) {
    const int64_t m = block * kRows + 16 * j, rows = min64(16, p.m - m);
    for (int i = 0; i < 2; ++i) {
      __m512i v[16];
      transpose16(sums + (2 * i + j) * amx::kTileBytes, 64, v);
      for (int r = 0; r < 16; ++r) _mm512_store_si512(tile + r * kUnit + 16 * i, v[r]);
    }
    p.add->add(p.add, m, rows, n, min64(kUnit, p.w.n - n), tile, kUnit);
    for (int i = 0; i < 2; ++i) {
      const __mmask16 mask = mask_below(n + 16 * i, p.w.n);
      const __m512 bias = load_bias(p.bias, p.bias_type, n + 16 * i, mask);
      for (int64_t r = 0; r < rows; ++r) {
        store_outputs(p.y, kXType, (m + r) * p.y_stride + n + 16 * i,
                      _mm512_add_ps(_mm512_load_ps(tile + r * kUnit + 16 * i), bias), mask);
      }
    }
  }
}

// C^T [n][m] -> y.
static void write_forward(const Problem& q, int64_t unit, int64_t block, const uint8_t* sums) {
  const Int4LinearParams& p = *q.p;
  if (p.add) return write_forward_added(q, unit, block, sums);
  for (int i = 0; i < 2; ++i) {
    const int64_t n = unit * kUnit + 16 * i;
    const __mmask16 mask = mask_below(n, p.w.n);
    if (!mask) continue;
    const __m512 bias = load_bias(p.bias, p.bias_type, n, mask);
    for (int j = 0; j < block_tiles(q, block); ++j) {
      const int64_t m = block * kRows + 16 * j;
      const int rows = static_cast<int>(min64(16, p.m - m));
      __m512i v[16];
      transpose16(sums + (2 * i + j) * amx::kTileBytes, 64, v);
      for (int r = 0; r < rows; ++r) {
        store_outputs(p.y, kXType, (m + r) * p.y_stride + n,
                      _mm512_add_ps(_mm512_castsi512_ps(v[r]), bias), mask);
      }
    }
  }
}

// Column c of the low and high tile of a unit holds k: 8 bits take them as VPUNPCK leaves the order
// of k, 4 bits as it leaves the order of a dequantised row.
template <int Bits>
static constexpr int dx_source(int k) {
  return Bits == 4 ? (k & 16) + 4 * ((k >> 1) & 3) + 2 * ((k >> 3) & 1) + (k & 1)
                   : ((k & 4) ? 16 : 0) + 4 * (k >> 3) + (k & 3);
}

template <int Bits>
static void write_dx(const Problem& q, int64_t unit, int64_t block, const uint8_t* sums) {
  const Int4LinearParams& p = *q.p;
  alignas(64) int32_t from[32];
  for (int k = 0; k < 32; ++k) from[k] = dx_source<Bits>(k);
  const __m512i first = _mm512_load_si512(from), second = _mm512_load_si512(from + 16);
  const int64_t k = unit * kUnit;
  for (int j = 0; j < block_tiles(q, block); ++j) {
    const int64_t m = block * kRows + 16 * j, rows = min64(16, p.m - m);
    alignas(64) float tile[16 * kUnit];
    for (int64_t r = 0; r < rows; ++r) {
      const __m512 low = _mm512_load_ps(sums + j * amx::kTileBytes + 64 * r);
      const __m512 high = _mm512_load_ps(sums + (2 + j) * amx::kTileBytes + 64 * r);
      const int64_t at = (m + r) * p.y_stride + k;
      const __m512 left = _mm512_permutex2var_ps(low, first, high);
      const __m512 right = _mm512_permutex2var_ps(low, second, high);
      if (p.add) {
        _mm512_store_ps(tile + r * kUnit, left), _mm512_store_ps(tile + r * kUnit + 16, right);
        continue;
      }
      store_outputs(p.y, kXType, at, left, mask_below(k, p.w.k));
      store_outputs(p.y, kXType, at + 16, right, mask_below(k + 16, p.w.k));
    }
    if (!p.add) continue;
    p.add->add(p.add, m, rows, k, min64(kUnit, p.w.k - k), tile, kUnit);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (m + r) * p.y_stride + k;
      store_outputs(p.y, kXType, at, _mm512_load_ps(tile + r * kUnit), mask_below(k, p.w.k));
      store_outputs(p.y, kXType, at + 16, _mm512_load_ps(tile + r * kUnit + 16),
                    mask_below(k + 16, p.w.k));
    }
  }
}

template <bool Dx, int Bits>
static void run_task(const Problem& q, const Plan& plan, int64_t task, Scratch& s) {
  const int64_t chunk = task / plan.groups, group = task % plan.groups;
  const int64_t b0 = cut(plan.blocks, plan.chunks, chunk),
                b1 = cut(plan.blocks, plan.chunks, chunk + 1);
  const int64_t pairs = ceil_div(q.units, kPair);
  const int64_t u0 = kPair * cut(pairs, plan.groups, group);
  const int64_t u1 = min64(q.units, kPair * cut(pairs, plan.groups, group + 1));
  const bool sole = b1 - b0 == 1;
  const int64_t ring = sole ? kRing - 1 : -1;
  // The next pass's x is as many lines for each step as all units of the group fetch in their
  // steps.
  const bool resident = (b1 - b0) * q.steps * kStepBytes <= kResidentX;
  const int64_t x_lines = resident ? 0 : ceil_div(kStepBytes / 64, max64(1, u1 - u0));
  for (int64_t pass = 0; pass < plan.passes; ++pass) {
    const int64_t begin = cut(q.steps, plan.passes, pass),
                  end = cut(q.steps, plan.passes, pass + 1);
    const int64_t slice = (end - begin) * kStepBytes;
    const uint8_t* x = plan.x + (b0 * q.steps + begin * (b1 - b0)) * kStepBytes;
    const bool last = pass + 1 == plan.passes;
    for (int64_t pair = u0; pair < u1; pair += kPair) {
      // After the group's last weights come the next pass's first, or the next task's.
      const bool wraps = pair + kPair >= u1;
      for (int64_t b = b0; b < b1; ++b) {
        for (int64_t u = pair; u < min64(pair + kPair, u1); ++u) {
          const int64_t at = plan.passes == 1 ? 0 : (u - u0) * (b1 - b0) + b - b0;
          uint8_t* sums = s.sums + at * kSumBytes;
          uint8_t* weights =
              s.weights + (u - pair) * (sole ? kRing : plan.block_steps) * kStepBytes;
          const uint8_t* xs = x + (b - b0) * slice;
          Ahead next;
          next.x = x + (b1 - b0) * slice +
                   ((u - u0) * (b1 - b0) + b - b0) * (end - begin) * x_lines * 64;
          next.lines = x_lines;
          next.unit = (wraps && !last ? u0 : pair + kPair) + (u - pair);
          next.step = !wraps ? begin : last ? 0 : end;
          const int64_t absolute = plan.first + b;
          const bool two = block_tiles(q, absolute) == 2;
          auto run = two ? b == b0 ? run_block<Dx, Bits, 2, true> : run_block<Dx, Bits, 2, false>
                     : b == b0 ? run_block<Dx, Bits, 1, true>
                               : run_block<Dx, Bits, 1, false>;
          run(q, s, weights, ring, xs, sums, u, begin, end, next);
          if (!last) continue;
          if (Dx) {
            write_dx<Bits>(q, u, absolute, sums);
          } else {
            write_forward(q, u, absolute, sums);
          }
        }
      }
    }
  }
}

// Block `block` of a plan x its steps of one pass, in tile order, zeros behind the last row and
// element.
template <bool Dx, int Bits>
static void pack_x(const Problem& q, const Plan& plan, int64_t block, int64_t pass) {
  const Int4LinearParams& p = *q.p;
  const int64_t chunk = ((block + 1) * plan.chunks - 1) / plan.blocks;
  const int64_t b0 = cut(plan.blocks, plan.chunks, chunk),
                b1 = cut(plan.blocks, plan.chunks, chunk + 1);
  const int64_t begin = cut(q.steps, plan.passes, pass), end = cut(q.steps, plan.passes, pass + 1);
  uint8_t* out =
      plan.x + (b0 * q.steps + begin * (b1 - b0) + (block - b0) * (end - begin)) * kStepBytes;
  const int64_t absolute = plan.first + block;
  const int64_t tiles = block_tiles(q, absolute);
  // Row by row over a few steps at a time: 64 bytes of 16 rows in turn would leave the prefetchers
  // idle.
  constexpr int64_t kSteps = 8;
  alignas(64) uint8_t rows[kSteps * amx::kTileBytes];
  for (int64_t s0 = begin; s0 < end; s0 += kSteps, out += kSteps * kStepBytes) {
    const int64_t steps = min64(kSteps, end - s0);
    for (int64_t j = 0; j < tiles; ++j) {
      const int64_t m = absolute * kRows + 16 * j;
      uint8_t* tile = out + j * amx::kTileBytes;
      uint8_t* to = Dx ? tile : rows;
      const int64_t to_step = Dx ? kStepBytes : amx::kTileBytes;
      for (int r = 0; r < 16; ++r) {
        for (int64_t i = 0; i < steps; ++i) {
          const int64_t at = (s0 + i) * kStepK;
          const __m512i v =
              m + r < p.m ? load_row_bf16(p.x, kXType, (m + r) * p.x_stride + at, q.summed - at)
                          : _mm512_setzero_si512();
          _mm512_store_si512(to + i * to_step + 64 * r, v);
        }
      }
      if (Dx) continue;
      compiler_barrier();
      for (int64_t i = 0; i < steps; ++i) {
        __m512i pairs[16];
        transpose16(rows + i * amx::kTileBytes, 64, pairs);
        for (int c = 0; c < 16; ++c) {
          _mm512_store_si512(tile + i * kStepBytes + 64 * pair_row<Bits>(c), pairs[c]);
        }
      }
    }
  }
}

template <bool Dx, int Bits>
static Status run_plan(const Problem& q, const Plan& plan) {
  auto pack = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      pack_x<Dx, Bits>(q, plan, t / plan.passes, t % plan.passes);
  };
  const int64_t packs = plan.blocks * plan.passes;
  if (plan.blocks * kRows * q.summed <= kSerialPack) {
    pack(0, packs);
  } else {
    parallel_for(*q.p->parallel, packs, pack);
  }

  const int64_t chunk_blocks = ceil_div(plan.blocks, plan.chunks);
  const int64_t group_units = kPair * ceil_div(ceil_div(q.units, kPair), plan.groups);
  const int64_t weight_bytes = kPair * (chunk_blocks == 1 ? kRing : plan.block_steps) * kStepBytes;
  const int64_t sum_bytes = (plan.passes == 1 ? 1 : group_units * chunk_blocks) * kSumBytes;
  int failed = 0;
  auto multiply_tasks = [&](int64_t begin, int64_t end) {
    uint8_t* memory = static_cast<uint8_t*>(allocate(weight_bytes + sum_bytes));
    if (!memory) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    Scratch s;
    s.weights = memory;
    s.sums = memory + weight_bytes;
    for (int64_t& of : s.scales_of) of = -1;
    amx::configure(amx::full_tiles());
    for (int64_t t = begin; t < end; ++t) run_task<Dx, Bits>(q, plan, t, s);
    amx::release();
    free(memory);
  };
  parallel_for(*q.p->parallel, plan.chunks * plan.groups, multiply_tasks);
  return failed ? kOutOfMemory : kOk;
}

template <bool Dx, int Bits>
static Status run_all(const Int4LinearParams& p) {
  Problem q;
  q.p = &p;
  q.g = int4_geometry(p.w);
  q.columns = Dx ? p.w.k : p.w.n;
  q.summed = Dx ? p.w.n : p.w.k;
  q.units = ceil_div(q.columns, kUnit);
  q.steps = ceil_div(q.summed, kStepK);
  q.code_bytes = kStepK * kPanelRows * Bits / 8;
  if (p.m <= 0 || q.columns <= 0) return kOk;

  const int64_t blocks = ceil_div(p.m, kRows);
  const int64_t most =
      max64(kChunkBlocks, kPackedX / max64(1, q.steps * kStepBytes) / kChunkBlocks * kChunkBlocks);
  uint8_t* x = static_cast<uint8_t*>(allocate(min64(blocks, most) * q.steps * kStepBytes));
  if (!x) return kOutOfMemory;
  Status status = kOk;
  for (int64_t first = 0; first < blocks && status == kOk; first += most) {
    Plan plan = make_plan(q, first, min64(most, blocks - first));
    plan.x = x;
    status = run_plan<Dx, Bits>(q, plan);
  }
  free(x);
  return status;
}

}  // namespace

Status int4_linear_amx_bf16(const Int4LinearParams& p) {
  return int4_stored_bits(p.w) == 8 ? run_all<false, 8>(p) : run_all<false, 4>(p);
}

Status int4_linear_dx_amx_bf16(const Int4LinearParams& p) {
  return int4_stored_bits(p.w) == 8 ? run_all<true, 8>(p) : run_all<true, 4>(p);
}

}  // namespace nibblock
