// int4_linear with compute="int8" on AMX int8 tiles, from 5 rows up.
//
// Activations are quantised per row and flush block of min(group, 128) elements (activations.h).
// Codes are unpacked to signed bytes, code - zero, once per chunk of rows, so the int32 sum of a
// block needs no correction: it is flushed to float32 as
//     sum * scale[n] * xscale[m]  (+ offset'[n] * xsum[m]).
//
// The flush decides the speed, not the tiles. Per 16 x 16 sums and block: TILESTORED, then for each
// of 16 rows a convert with a load, a multiply by the 16 scales and a fused multiply-add with x's
// scale, broadcast from memory (affine: one more). So the sums of a tile stay in 16 registers over
// a pass of 512 k instead of in memory, and the tiles of the next block are multiplied while this
// one is flushed: two accumulators in turn, TDP before flush in program order.
// Cycles of one core per 16 x 16 sums and block, group 128 / 64 / 32 (32-byte tile rows):
//   TDPBSSD      32 / 16 / 16   where the peak takes 32 / 16 / 8
//   tile loads   32 / 16 / 8    of A and B, from L1
//   flush loads  16             sums and broadcasts, on the same ports
//   TILESTORED   16             the store port has nothing else to do
//   flush ALU    24 (32 affine)
// Measured on an AVX-512 core with the TDPs left out and tile loads and stores as vector ones:
// 71 cycles for one tile at group 128 in L1; 110 at group 128 and 68 at 64 for M = 256, K = 4096;
// quantising x 0.9..1.1 cycles an element, which 2048 columns spread to 14 (10 at 64). With the
// TDPs overlapped wholly or not at all that is 20..26 % of the int8 peak at group 128, 17..21 % at
// 64, and by the same flush 9..12 % at 32. At M = 16 unpacking takes about as long as memory.
// L1 (48 KiB): weights of 32 columns x 512 k, 16 KiB; x of 32 rows x 512 k, 16 KiB; 4 KiB of sums.
// L2: x of a chunk, 256 rows, when that is below 1 MiB; else 512 k of it and a group's sums,
// 768 KiB.
#include "activations.h"
#include "cpu_amx_tiles.h"

namespace nibblock {
namespace {

constexpr int64_t kPassK = 512;
constexpr int64_t kTileK = 64;  // int8 elements in a tile row
constexpr int64_t kChunkRows = 256;
constexpr int64_t kUnit = 32;
constexpr int64_t kSumBytes = 4 * amx::kTileBytes;
constexpr int64_t kWeightBytes = kUnit * kPassK;
constexpr int64_t kResidentX = 1 << 20;
constexpr int64_t kGroupSums = 768 << 10;
constexpr int64_t kQuantizedX = 16 << 20;  // bytes of quantised x held at a time

static inline int64_t cut(int64_t total, int64_t parts, int64_t i) { return total * i / parts; }

struct HalfLoader {
  static inline void load_f16(const uint16_t* h, float* out) {
    _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h))));
  }
};

struct Problem {
  const Int4LinearParams* p;
  Int4Geometry g;
  QuantizedRows x;  // rows [first, first + rows) of x, padded to a multiple of 16
  int64_t first, rows;
  int64_t units, passes, chunks, groups;
  int group_shift;  // flush block -> group
};

// 512 k (or what is left) of one panel as signed bytes in tile order: 16 rows of 64 bytes for each
// 64 k.
static void unpack_panel(const Problem& q, int64_t panel, int64_t k0, int64_t k1, uint8_t* out) {
  const bool eight = int4_stored_bits(q.p->w) == 8;
  const uint8_t* in = q.p->packed + panel * q.g.panel_stride + k0 * (eight ? 16 : 8);
  if (eight) {
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    for (int64_t i = 0; i < (k1 - k0) / 4; ++i) {
      _mm512_store_si512(out + 64 * i, _mm512_xor_si512(_mm512_loadu_si512(in + 64 * i), sign));
    }
    return;
  }
  // The code of each place, less zero; without a palette a place is a code.
  const __m128i values =
      q.p->w.palette ? _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(
                                         q.p->packed + panel * q.g.panel_stride + q.g.palette_at)),
                                     _mm_set1_epi8(static_cast<char>(0x80)))
                     : _mm_setr_epi8(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i mask = _mm512_set1_epi8(15), table = _mm512_broadcast_i32x4(values);
  for (int64_t i = 0; i < (k1 - k0) / 8; ++i) {
    const __m512i line = _mm512_loadu_si512(in + 64 * i);
    const __m512i low = _mm512_and_si512(line, mask);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(line, 4), mask);
    _mm512_store_si512(out + 128 * i, _mm512_shuffle_epi8(table, low));
    _mm512_store_si512(out + 128 * i + 64, _mm512_shuffle_epi8(table, high));
  }
}

// One 16 x 16 tile of sums over the flush blocks of one pass.
struct TileJob {
  const uint8_t* x;        // in tile order, first k of the pass
  const uint8_t* weights;  // unpacked, first k of the pass
  const uint8_t* panel;
  int64_t k0, k1;  // k1 is a multiple of 64, at most k_pad
  int64_t row;     // of q.x
};

// Multiplies flush block b into accumulator Acc. Half: blocks of 32, tiles 2 and 3 have rows of 32
// bytes.
template <int Acc, bool Half>
NB_AMX_INLINE void multiply_block(const TileJob& t, int64_t k, int64_t length) {
  const int64_t half = Half ? k & 32 : 0;  // the second 32 of 64 k
  const uint8_t* x = t.x + (k - half - t.k0) * 16 + half;
  const uint8_t* w = t.weights + (k - t.k0) * 16;
  amx::zero<Acc>();
  amx::load<2>(x, kTileK);
  amx::load<4>(w, 64);
  amx::dot_int8<Acc, 2, 4>();
  if (!Half && length > kTileK) {
    amx::load<3>(x + amx::kTileBytes, kTileK);
    amx::load<5>(w + amx::kTileBytes, 64);
    amx::dot_int8<Acc, 3, 5>();
  }
}

template <int Acc, bool Affine>
NB_AMX_INLINE void flush_sums(const Problem& q, const TileJob& t, int64_t b, int32_t* parking,
                              __m512 sums[16]) {
  amx::store<Acc>(parking, 64);
  const int64_t group = b >> q.group_shift;
  const __m512 scale = load_scales(q.p->w, q.g, t.panel + q.g.scales_at, group);
  __m512 offset = _mm512_setzero_ps();
  if (Affine) {
    offset = _mm512_fmadd_ps(_mm512_set1_ps(q.p->w.bits == 8 ? 128.0f : 8.0f), scale,
                             load_scales(q.p->w, q.g, t.panel + q.g.offsets_at, group));
  }
  const float* x_scale = q.x.scale + b * q.x.rows + t.row;
  const float* x_sum = q.x.sum + b * q.x.rows + t.row;
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {
    const __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(parking + 16 * r)), scale);
    sums[r] = _mm512_fmadd_ps(v, _mm512_set1_ps(x_scale[r]), sums[r]);
    if (Affine) sums[r] = _mm512_fmadd_ps(offset, _mm512_set1_ps(x_sum[r]), sums[r]);
  }
}

// Continues from `carry` unless it is the first pass. Ends in `carry`, or in y after the last pass.
template <bool Half, bool Affine>
static void run_tile(const Problem& q, const TileJob& t, float* carry, int64_t n, bool last) {
  alignas(64) int32_t parking[2][256];
  const int64_t block = q.x.block;
  const int64_t b0 = block ? t.k0 / block : 0;
  // Blocks that hold data; a block of 128 may reach past k1 and is cut there.
  const int64_t b1 = block ? min64(q.x.blocks, ceil_div(t.k1, block)) : 0;
  auto length = [&](int64_t b) { return min64(block, t.k1 - b * block); };
  __m512 sums[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r)
    sums[r] = t.k0 ? _mm512_load_ps(carry + 16 * r) : _mm512_setzero_ps();
  if (b0 < b1) multiply_block<0, Half>(t, b0 * block, length(b0));
  for (int64_t b = b0; b < b1; b += 2) {
    if (b + 1 < b1) multiply_block<1, Half>(t, (b + 1) * block, length(b + 1));
    flush_sums<0, Affine>(q, t, b, parking[0], sums);
    if (b + 1 >= b1) break;
    if (b + 2 < b1) multiply_block<0, Half>(t, (b + 2) * block, length(b + 2));
    flush_sums<1, Affine>(q, t, b + 1, parking[1], sums);
  }
  if (!last) {
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) _mm512_store_ps(carry + 16 * r, sums[r]);
    return;
  }
  const Int4LinearParams& p = *q.p;
  const __mmask16 mask = mask_below(n, p.w.n);
  const int64_t rows = min64(16, q.rows - t.row);
  if (p.add && mask && rows > 0) {
    float* tile = reinterpret_cast<float*>(parking);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) _mm512_store_ps(tile + 16 * r, sums[r]);
    compiler_barrier();
    p.add->add(p.add, q.first + t.row, rows, n, min64(16, p.w.n - n), tile, 16);
    compiler_barrier();
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) sums[r] = _mm512_load_ps(tile + 16 * r);
  }
  const __m512 bias = load_bias(p.bias, p.bias_type, n, mask);
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {
    if (t.row + r >= q.rows) break;
    store_outputs(p.y, p.xtype, (q.first + t.row + r) * p.y_stride + n,
                  _mm512_add_ps(sums[r], bias), mask);
  }
}

template <bool Half, bool Affine>
static void run_task(const Problem& q, int64_t task, uint8_t* weights, uint8_t* carry) {
  const int64_t chunk = task / q.groups, group = task % q.groups;
  const int64_t tiles = ceil_div(q.rows, 16);
  const int64_t t0 = cut(tiles, q.chunks, chunk), t1 = cut(tiles, q.chunks, chunk + 1);
  const int64_t u0 = cut(q.units, q.groups, group), u1 = cut(q.units, q.groups, group + 1);
  for (int64_t pass = 0; pass < q.passes; ++pass) {
    const int64_t k0 = pass * kPassK, k1 = min64(q.g.k_pad, k0 + kPassK);
    for (int64_t u = u0; u < u1; ++u) {
      const int64_t panels = min64(2, q.g.panels - 2 * u);
      for (int64_t i = 0; i < panels; ++i) {
        unpack_panel(q, 2 * u + i, k0, k1, weights + i * kWeightBytes / 2);
      }
      compiler_barrier();
      for (int64_t j = t0; j < t1; j += 2) {  // 32 rows x 32 columns stay in L1
        for (int64_t tile = j; tile < min64(j + 2, t1); ++tile) {
          for (int64_t i = 0; i < panels; ++i) {
            TileJob t;
            t.row = tile * 16;
            t.x = q.x.q + t.row * q.g.k_pad + 16 * k0;
            t.weights = weights + i * kWeightBytes / 2;
            t.panel = q.p->packed + (2 * u + i) * q.g.panel_stride;
            t.k0 = k0;
            t.k1 = k1;
            uint8_t* sums = carry + (((u - u0) * (t1 - t0) + tile - t0) * 2 + i) * amx::kTileBytes;
            run_tile<Half, Affine>(q, t, reinterpret_cast<float*>(sums), u * kUnit + 16 * i,
                                   pass + 1 == q.passes);
          }
        }
      }
    }
  }
}

// Tiles 0 and 1 are sums, 2 and 3 x, 4 and 5 weights.
static amx::TileConfig tile_config(bool half) {
  amx::TileConfig c = amx::full_tiles();
  for (int t = 2; half && t < 4; ++t) {
    c.row_bytes[t] = 32;
    c.rows[t + 2] = 8;
  }
  return c;
}

template <bool Half, bool Affine>
static Status run_rows(const Problem& q) {
  const int64_t tiles = ceil_div(ceil_div(q.rows, 16), q.chunks);
  const int64_t carry_bytes = ceil_div(q.units, q.groups) * tiles * 2 * amx::kTileBytes;
  int failed = 0;
  auto body = [&](int64_t begin, int64_t end) {
    uint8_t* memory = static_cast<uint8_t*>(allocate(kWeightBytes + carry_bytes));
    if (!memory) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    amx::configure(tile_config(Half));
    for (int64_t t = begin; t < end; ++t)
      run_task<Half, Affine>(q, t, memory, memory + kWeightBytes);
    amx::release();
    free(memory);
  };
  parallel_for(*q.p->parallel, q.chunks * q.groups, body);
  return failed ? kOutOfMemory : kOk;
}

static void make_plan(Problem* q) {
  const int64_t threads = max64(1, q->p->parallel->threads);
  const int64_t tiles = ceil_div(q->rows, 16);
  q->chunks = ceil_div(q->rows, kChunkRows);
  while (q->chunks * q->units < threads && 4 * q->chunks <= tiles) ++q->chunks;
  const int64_t chunk_rows = 16 * ceil_div(tiles, q->chunks);
  const int64_t wide =
      chunk_rows * q->g.k_pad <= kResidentX ? 2 : kGroupSums / (chunk_rows * kUnit * 4);
  q->groups = ceil_div(q->units, max64(1, min64(16, wide)));
  int64_t multiple = threads;  // the same number of tasks for every thread
  for (int64_t d = 2; d <= q->chunks; ++d) {
    if (q->chunks % d == 0 && threads % d == 0) multiple = threads / d;
  }
  q->groups = min64(q->units, round_up(q->groups, multiple));
  q->passes = max64(1, ceil_div(q->g.k_pad, kPassK));
}

// Rows of x to int8 in tile order: [16 rows][64 k], 1 KiB each, one after the other along k. (As
// rows of k_pad bytes they would crowd into a few cache sets.) False when memory is short.
static bool quantize_rows(const Problem& q) {
  const int64_t k_pad = q.g.k_pad;
  int failed = 0;
  auto body = [&](int64_t begin, int64_t end) {
    QuantizedRows one = q.x;  // writes every row to the same place
    one.stride = 0;
    one.block_stride = one.block;
    one.padded_k = k_pad;
    one.q = static_cast<uint8_t*>(allocate(k_pad));
    if (!one.q) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t r = begin; r < end; ++r) {
      if (r < q.rows) {
        quantize_row<HalfLoader, 8>(*q.p, q.first + r, r, one);
      } else {
        memset(one.q, 0, static_cast<size_t>(k_pad));
        for (int64_t b = 0; b < q.x.blocks; ++b) {
          q.x.scale[b * q.x.rows + r] = 0.0f;
          q.x.sum[b * q.x.rows + r] = 0.0f;
        }
      }
      uint8_t* out = q.x.q + (r & ~15) * k_pad + (r & 15) * kTileK;
      for (int64_t k = 0; k < k_pad; k += kTileK) {
        _mm512_store_si512(out + 16 * k, _mm512_load_si512(one.q + k));
      }
    }
    free(one.q);
  };
  parallel_for(*q.p->parallel, round_up(q.rows, 16), body);
  return !failed;
}

}  // namespace

Status int4_linear_amx_int8(const Int4LinearParams& p) {
  if (p.m <= 0 || p.w.n <= 0) return kOk;
  Problem q;
  q.p = &p;
  q.g = int4_geometry(p.w);
  q.units = ceil_div(q.g.panels, 2);
  const int64_t most = max64(1, kQuantizedX / max64(1, q.g.k_pad) / kChunkRows) * kChunkRows;
  if (!quantized_rows_alloc(&q.x, q.g, p.w.k, round_up(min64(p.m, most), 16), 8))
    return kOutOfMemory;
  // Groups are powers of two, or the whole row.
  q.group_shift = 0;
  while (q.group_shift < 62 && (q.x.block << q.group_shift) < q.g.group) ++q.group_shift;
  Status status = kOk;
  for (q.first = 0; q.first < p.m && status == kOk; q.first += most) {
    q.rows = min64(most, p.m - q.first);
    make_plan(&q);
    if (!quantize_rows(q)) {
      status = kOutOfMemory;
      break;
    }
    const bool half = q.x.block == 32;
    status = half ? (p.w.affine ? run_rows<true, true>(q) : run_rows<true, false>(q))
                  : (p.w.affine ? run_rows<false, true>(q) : run_rows<false, false>(q));
    for (int64_t r = 0; r < q.rows && status == kOk; ++r) {
      if (q.x.nonfinite[r]) int4_linear_nonfinite_row(p, q.first + r);
    }
  }
  free(q.x.memory);
  return status;
}

}  // namespace nibblock
