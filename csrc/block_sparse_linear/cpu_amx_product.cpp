// block_sparse_linear and its input gradient on AMX bfloat16 tiles (amx_blocks.h), for bfloat16 x
// from 5 rows up. float32 x keeps its precision and goes to the AVX-512 kernel.
#include "amx_blocks.h"

namespace nibblock {
namespace {

// A panel of output columns for all rows of a chunk. acc has room for whole pairs of tiles.
template <int B>
static void panel_rows(const Walk& walk, const PackedRows& x, const uint8_t* blocks, int64_t u,
                       int64_t panel, int64_t r0, int64_t rows, float* acc) {
  using S = AmxShape<B>;
  const int64_t begin = walk.ptr[u], end = walk.ptr[u + 1];
  AmxJob t;
  t.step_bytes = x.tiles * 2 * S::kTile;
  t.acc_stride = kStoreColumns * 4;
  for (int64_t e = begin; e < end; e += S::kPass) {
    t.in = walk.in + e;
    t.count = min64(S::kPass, end - e);
    t.w = blocks + e * S::kBlockBytes + panel * S::kPanelBytes;
    t.first = e == begin;
    for (int64_t r = 0; r < rows; r += S::kRows) {
      t.x = static_cast<const uint8_t*>(x.data) + (r0 + r) / S::kRows * 2 * S::kTile;
      t.acc = acc + r * kStoreColumns;
      if (rows - r > 16) {
        multiply_pair<B, false>(t);
      } else {
        multiply_pair<B, true>(t);
      }
    }
  }
}

template <int B>
static void multiply_tiles(const BlockSparseParams& p, const Walk& walk, const PackedRows& x,
                           const uint8_t* blocks, int64_t r0, int64_t rows, int64_t u0, int64_t u1,
                           float* acc) {
  using S = AmxShape<B>;
  const int64_t end = min64(walk.out_size, u1 * B);
  for (int64_t at = u0 * B; at < end; at += kStoreColumns) {
    const int64_t count = min64(kStoreColumns, end - at);
    for (int64_t c = 0; c < count; c += S::kCols) {
      const int64_t u = (at + c) / B;
      if (walk.ptr[u] != walk.ptr[u + 1]) {
        panel_rows<B>(walk, x, blocks, u, (at + c) % B / S::kCols, r0, rows, acc + c);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        memset(acc + r * kStoreColumns + c, 0, S::kCols * sizeof(float));
      }
    }
    alignas(64) float wide[kStoreColumns];
    const float* bias = widen_bias<Floats512>(p, at, count, wide);
    store_rows<Floats512>(p, x.m0 + r0, rows, at, count, acc, kStoreColumns, bias);
  }
}

template <int B>
static Status amx_product_of(const BlockSparseParams& p, bool dx) {
  using S = AmxShape<B>;
  const Walk walk = make_walk(p.s, dx);
  const Parallel& parallel = worth_threads(p, walk);
  uint8_t* blocks = static_cast<uint8_t*>(aligned_malloc(p.s.count * S::kBlockBytes));
  if (!blocks) return kOutOfMemory;
  constexpr int64_t kShare = 16;  // blocks to a task
  auto lay = [&](int64_t begin, int64_t end) {
    lay_out_all<B>(walk, p.values, p.vtype, begin * kShare, min64(p.s.count, end * kShare), blocks);
  };
  parallel_for(parallel, ceil_div(p.s.count, kShare), lay);
  const Status status = run_chunks(
      p, parallel, walk, S::kRows, walk.ins * S::kSteps * 2 * S::kTile, 0,
      [&](const PackedRows& x, int64_t t) { pack_pair<B>(walk, p.x, p.xtype, p.x_stride, x, t); },
      [&](const PackedRows& x, int64_t r0, int64_t rows, int64_t u0, int64_t u1, void* scratch) {
        amx::configure(block_tiles<B>());
        multiply_tiles<B>(p, walk, x, blocks, r0, rows, u0, u1, static_cast<float*>(scratch));
        amx::release();
      });
  free(blocks);
  return status;
}

static Status amx_product(const BlockSparseParams& p, bool dx) {
  switch (p.s.block) {
  case 16:
    return amx_product_of<16>(p, dx);
  case 32:
    return amx_product_of<32>(p, dx);
  case 64:
    return amx_product_of<64>(p, dx);
  default:
    return amx_product_of<128>(p, dx);
  }
}

}  // namespace

Status block_sparse_linear_amx(const BlockSparseParams& p) { return amx_product(p, false); }
Status block_sparse_linear_dx_amx(const BlockSparseParams& p) { return amx_product(p, true); }

}  // namespace nibblock
