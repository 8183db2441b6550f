// int4_block_sparse_linear and its input gradient on AMX: bfloat16 x, compute bf16, from 5 rows up.
//
// The int4 kernel hands over tiles of 16 rows x 32 columns of float32 sums; while it does, all
// eight tile registers are free, so the adapter's blocks are multiplied onto them by TDPBF16PS
// (amx_blocks.h): per call two accumulators in, two TDPs a step, two out. Blocks are laid out once
// a call, x is copied into tile order once a chunk. The low-rank pair stays in float32 FMA.
#include "amx_blocks.h"

#include "cpu_low_rank.h"

namespace nibblock {
namespace {

constexpr int64_t kFusedRows = 512;  // x packed at a time; the int4 kernel's own chunk

struct AmxAdapter {
  TileAdd base;  // first: the callback gets its address
  Walk walk;
  const uint8_t* blocks;
  PackedRows x;
  LowRank low_rank;
};

// Columns [c0, c0 + kCols) of output block u onto 16 rows of acc.
template <int B>
static void add_panel(const AmxAdapter& a, int64_t u, int64_t c0, int64_t m0, float* acc,
                      int64_t acc_stride) {
  using S = AmxShape<B>;
  const int64_t begin = a.walk.ptr[u];
  AmxJob t;
  t.x = static_cast<const uint8_t*>(a.x.data) + m0 / 16 * S::kTile;
  t.step_bytes = a.x.tiles * 2 * S::kTile;
  t.in = a.walk.in + begin;
  t.count = a.walk.ptr[u + 1] - begin;
  if (t.count == 0) return;
  t.w = a.blocks + begin * S::kBlockBytes + c0 / S::kCols * S::kPanelBytes;
  t.acc = acc;
  t.acc_stride = acc_stride * 4;
  t.first = false;
  multiply_pair<B, true>(t);
}

// TileAdd::add for tiles that start at a multiple of 16 rows and 32 columns, 16 x 32 with room.
template <int B>
static void add_tiles(const TileAdd* self, int64_t m0, int64_t rows, int64_t n0, int64_t cols,
                      float* acc, int64_t acc_stride) {
  const AmxAdapter& a = *reinterpret_cast<const AmxAdapter*>(self);
  for (int64_t n = n0; n < n0 + cols; n += AmxShape<B>::kCols) {
    add_panel<B>(a, n / B, n % B, m0, acc + (n - n0), acc_stride);
  }
  a.low_rank.add<Floats512>(m0, rows, n0, cols, acc, acc_stride);
}

// Blocks of 16 fill tiles of another shape than the int4 kernel's, so theirs is restored.
static void add_tiles_16(const TileAdd* self, int64_t m0, int64_t rows, int64_t n0, int64_t cols,
                         float* acc, int64_t acc_stride) {
  amx::configure(block_tiles<16>());
  add_tiles<16>(self, m0, rows, n0, cols, acc, acc_stride);
  amx::configure(amx::full_tiles());
}

template <int B>
static Status amx_fused_of(const Int4BlockSparseParams& p, bool dx) {
  using S = AmxShape<B>;
  const Int4LinearParams& base = p.base;
  AmxAdapter a;
  a.base.add = B == 16 ? add_tiles_16 : add_tiles<B>;
  a.walk = make_walk(p.s, dx);
  const int64_t pairs = ceil_div(min64(kFusedRows, base.m), S::kRows);
  const int64_t block_bytes = p.s.count * S::kBlockBytes;
  const int64_t x_bytes = a.walk.ins * S::kSteps * pairs * 2 * S::kTile;
  uint8_t* memory = static_cast<uint8_t*>(aligned_malloc(block_bytes + x_bytes));
  const bool ready = memory && a.low_rank.make<Floats512>(p, dx);
  if (ready) {
    auto lay = [&](int64_t begin, int64_t end) {
      lay_out_all<B>(a.walk, p.values, p.vtype, begin, end, memory);
    };
    parallel_for(*base.parallel, p.s.count, lay);
  }
  a.blocks = memory;
  Status status = ready ? kOk : kOutOfMemory;
  for (int64_t m0 = 0; m0 < base.m && status == kOk; m0 += kFusedRows) {
    Int4LinearParams part = base;
    part.m = min64(kFusedRows, base.m - m0);
    part.x = static_cast<const char*>(base.x) + m0 * base.x_stride * dtype_size(base.xtype);
    part.y = static_cast<char*>(base.y) + m0 * base.y_stride * dtype_size(base.xtype);
    part.add = &a.base;
    a.x = {memory + block_bytes, 0, part.m, pairs};
    auto pack = [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        pack_pair<B>(a.walk, part.x, base.xtype, base.x_stride, a.x, t);
      }
    };
    if (p.s.count) parallel_for(*base.parallel, ceil_div(part.m, S::kRows), pack);
    status = dx ? int4_linear_dx_amx_bf16(part) : int4_linear_amx_bf16(part);
    a.low_rank.t += part.m * p.rank;
  }
  a.low_rank.release();
  free(memory);
  return status;
}

static Status amx_fused(const Int4BlockSparseParams& p, bool dx) {
  switch (p.s.block) {
  case 16:
    return amx_fused_of<16>(p, dx);
  case 32:
    return amx_fused_of<32>(p, dx);
  case 64:
    return amx_fused_of<64>(p, dx);
  default:
    return amx_fused_of<128>(p, dx);
  }
}

}  // namespace

Status int4_block_sparse_linear_amx(const Int4BlockSparseParams& p) { return amx_fused(p, false); }
Status int4_block_sparse_linear_dx_amx(const Int4BlockSparseParams& p) {
  return amx_fused(p, true);
}

}  // namespace nibblock
