// The CUDA tile kernel's body over the software model of csrc/common/cuda_emulation_sm90a.h, and
// its maps, as a library that tests/test_cuda_tile.py compiles and calls.
#define NIBBLOCK_EMULATE_CUDA
#include "../../csrc/int4_linear/cuda_tile_body.cuh"
#include "../../csrc/int4_linear/cuda_weight.h"
#include "../../csrc/int4_linear/int4_linear.h"

using namespace nibblock;
using namespace nibblock::cuda;

namespace {

struct Call {
  TileParams p;
  const int32_t* order;  // in which `asked` blocks run; those that found no unit are left out
  int asked;
};

template <class T, class Shape>
void run(const Call& call) {
  for (int i = 0; i < call.asked; ++i) {
    const int block = call.order[i];
    if (block >= call.p.schedule.blocks) continue;
    emulation::run_block_sm90a(kTileThreads, Shape::shared_bytes, [&](int thread) {
      tile_body<T, Shape>(call.p, emulation::machine().shared, block, thread);
    });
  }
}

// Calls f with the TileShape.
template <class F>
void with_shape(int tokens, int bits, bool affine, const F& f) {
  const auto wide = [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    if (bits == 4) {
      affine ? f(TileShape<kCount, 4, true>()) : f(TileShape<kCount, 4, false>());
    } else {
      affine ? f(TileShape<kCount, 8, true>()) : f(TileShape<kCount, 8, false>());
    }
  };
  tokens == 64 ? wide(std::integral_constant<int, 64>()) : wide(std::integral_constant<int, 128>());
}

void allow(const void* p, int64_t bytes) {
  const uint8_t* at = static_cast<const uint8_t*>(p);
  emulation::machine().ranges.push_back({at, at + bytes});
}

void fill_map(TensorMap* to, const BoxMap& map) {
  EmulatedMap e = {};
  e.address = map.address;
  e.size[0] = map.size[0];
  e.size[1] = map.size[1];
  e.row_bytes = map.row_bytes;
  e.box[0] = map.box[0];
  e.box[1] = map.box[1];
  e.element = map.element;
  e.swizzle = map.swizzle;
  memcpy(to->bytes, &e, sizeof(e));
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// One launch, with the kernel that sums x before it. type: 1 bfloat16, 2 float16. found[0..2]:
// warp-wide loads from shared memory, their extra wavefronts, products. Returns the number of
// units, -1 if counters were not left at zero, -2 where no tensor map of x exists.
EXPORT int64_t cuda_tile_run(int64_t n, int64_t k, int64_t group, int bits, int affine,
                             int scale_type, const uint8_t* packed, int64_t m, const uint16_t* x,
                             int64_t x_stride, uint16_t* y, int64_t y_stride, int type,
                             const void* bias, int bias_type, int tokens, int blocks,
                             const int32_t* order, int64_t* found) {
  const Int4Format f = {n, k, group, bits, affine, static_cast<Dtype>(scale_type)};
  const Int4Geometry g = int4_geometry(f);
  if (!tile_map_exists(x, m, k, x_stride)) return -2;
  Call call = {};
  call.order = order;
  call.asked = blocks;
  TileParams& p = call.p;
  fill_map(&p.x, tile_map(x, m, k, x_stride, tokens, type == 1));
  p.packed = packed;
  p.y = y;
  p.bias = bias;
  set_weight(f, &p);
  p.y_stride = y_stride;
  p.m = static_cast<int32_t>(m);
  p.bias_type = bias_type;
  p.y_aligned = reinterpret_cast<uintptr_t>(y) % 4 == 0 && y_stride % 2 == 0;
  Schedule& s = p.schedule;
  s.chunks = static_cast<int32_t>(ceil_div(g.k_pad, kStageK));
  s.token_tiles = static_cast<int32_t>(ceil_div(m, tokens));
  s.tiles = static_cast<int32_t>(ceil_div(n, kTileRows)) * s.token_tiles;
  s.blocks = blocks < units(s) ? blocks : static_cast<int>(units(s));
  p.m_pad = s.token_tiles * tokens;
  std::vector<int32_t> counters(2 * s.tiles, 0);
  std::vector<Floats4> partials(2 * static_cast<size_t>(s.blocks) * kTileRows * tokens / 4,
                                Floats4{{NAN, NAN, NAN, NAN}});
  const int64_t slots = x_sum_slots(s.chunks, p.shift);
  std::vector<Floats4> x_sums(slots * p.m_pad / 4, Floats4{{NAN, NAN, NAN, NAN}});
  p.counters = counters.data();
  p.partials = partials.data();
  p.x_sums = x_sums.data()->f;
  emulation::Machine& machine = emulation::machine();
  machine.ranges.clear();
  machine.loads = machine.extra_wavefronts = machine.products = 0;
  allow(packed, g.bytes);
  for (int64_t i = 0; i < m; ++i) allow(x + i * x_stride, 2 * k);
  for (int64_t i = 0; i < m; ++i) allow(y + i * y_stride, 2 * n);
  if (bias) allow(bias, n * (bias_type == 0 ? 4 : 2));
  allow(counters.data(), 8 * s.tiles);
  allow(partials.data(), 16 * static_cast<int64_t>(partials.size()));
  allow(x_sums.data(), 16 * static_cast<int64_t>(x_sums.size()));
  if (affine) {
    const XSumParams q = {x,
                          x_sums.data()->f,
                          x_stride,
                          p.m,
                          p.k,
                          p.m_pad,
                          static_cast<int>(slots),
                          x_sum_shift(p.shift)};
    for (int64_t i = 0; i < slots * p.m_pad + 9; ++i) {
      type == 1 ? x_sum_body<BFloat16>(q, i) : x_sum_body<Float16>(q, i);
    }
  }
  with_shape(tokens, bits, affine != 0, [&](auto shape) {
    type == 1 ? run<BFloat16, decltype(shape)>(call) : run<Float16, decltype(shape)>(call);
  });
  found[0] = machine.loads;
  found[1] = machine.extra_wavefronts;
  found[2] = machine.products;
  for (int32_t c : counters) {
    if (c != 0) return -1;
  }
  return units(s);
}

// --- the maps ------------------------------------------------------------------------------------

EXPORT int cuda_tile_slot_row(int slot) { return tile_slot_row(slot); }
// Bit of a panel's codes in a stage where lane (g, t) finds its pair of line `line`; row 0 or 1.
EXPORT int cuda_tile_code_bit(int bits, int line, int g, int t, int row) {
  return (tile_code_byte(bits / 4, line, {g, t}) + 4 * row) * 8 + tile_code_shift(bits, {g, t});
}
EXPORT int cuda_code_bit(int bits, int k, int row) {
  const CodePlace c = code_place(bits, k, row);
  return static_cast<int>(c.byte) * 8 + c.shift;
}
EXPORT uint64_t cuda_tile_descriptor(uint32_t address) { return tile_descriptor(address); }
EXPORT int cuda_tile_product_byte(int tokens, int product) {
  return tile_product_byte(tokens, product);
}
// stage_bytes, stages, shared memory of a launch, registers of a lane for part and sums.
EXPORT void cuda_tile_shape(int tokens, int bits, int affine, int32_t* out) {
  with_shape(tokens, bits, affine != 0, [&](auto shape) {
    using Shape = decltype(shape);
    out[0] = Shape::stage_bytes;
    out[1] = Shape::stages;
    out[2] = Shape::launch_bytes;
    out[3] = 2 * Shape::sums;
  });
}
// What the model reads for element (column, k) of an operand, from shared memory at 0.
EXPORT int cuda_operand_place(uint64_t descriptor, int column, int k) {
  emulation::machine().shared_bytes = 1 << 17;
  return emulation::operand_place(descriptor, column, k);
}
// The arguments of the driver's call for x at `address`: size, row_bytes, box, element, swizzle.
EXPORT void cuda_tile_map(uint64_t address, int64_t m, int64_t k, int64_t x_stride, int tokens,
                          int is_bf16, int64_t* out) {
  const BoxMap map =
      tile_map(reinterpret_cast<const void*>(address), m, k, x_stride, tokens, is_bf16 != 0);
  const int64_t all[] = {static_cast<int64_t>(map.size[0]),
                         static_cast<int64_t>(map.size[1]),
                         static_cast<int64_t>(map.row_bytes),
                         map.box[0],
                         map.box[1],
                         map.element,
                         map.swizzle};
  memcpy(out, all, sizeof(all));
}

// Misuses, one each, that the model must answer by aborting (run in a child process).
EXPORT void cuda_tile_misuse(int which) {
  alignas(1024) static uint16_t x[128 * 64];
  emulation::machine().ranges.clear();
  allow(x, sizeof(x));
  TensorMap map;
  BoxMap box = tile_map(x, 128, 64, 64, 64, true);
  if (which == 0) box.swizzle = 0;
  if (which == 1) box.row_bytes = 130;
  fill_map(&map, box);
  constexpr int kBytes = 64 * 128;
  emulation::run_block_sm90a(256, 1 << 15, [&](int thread) {
    uint8_t* const shared = emulation::machine().shared;
    uint8_t* const full = shared + (1 << 14);
    uint8_t* const empty = full + 8;
    if (thread == 0) {
      barrier_init(full, 1);
      barrier_init(empty, 4);
      if (which != 2) barrier_init_fence();
    }
    sync_block();
    if (thread >= 128) {
      if (thread != 128) return;
      for (int i = 0; i < 2; ++i) {
        if (i == 0 || which != 3) barrier_wait(empty, static_cast<uint32_t>(i ^ 1));
        if (which == 4) barrier_arrive(full);
        barrier_arrive_expect(full, kBytes + (which == 5 ? 16 : which == 6 ? -16 : 0));
        copy_box(shared, &map, 0, 64 * i, full);
      }
      return;
    }
    float d[32] = {};
    uint32_t a[4] = {1, 2, 3, 4};
    for (int i = 0; i < 2; ++i) {
      if (which != 7) barrier_wait(full, static_cast<uint32_t>(i));
      if (which != 8) product_fence();
      uint64_t b = tile_descriptor(shared_address(shared));
      if (which == 9) b |= uint64_t(1) << 49;
      if (which == 10) b ^= uint64_t(3) << 62;
      if (which == 11 && thread < 32) b += 2;
      if (which == 12) b += uint64_t(1024) << 32;
      begin_product<BFloat16>(d, a, b, 0);
      commit_products();
      if (which == 13) a[0] = 7;
      if (which == 14) d[0] = 1.0f;
      if (which != 15 || i == 0) finish_products(d);
      if (which == 16 && thread == 5) store_shared<uint32_t>(shared, 1);
      if (which != 17) sync_warp();
      // The copy engine may overwrite what other lanes of the warp still load, unless they met.
      if (which == 17) load_shared<uint32_t>(shared + 4 * thread);
      if (which == 18) {
        sync_warp();
        load_shared<uint32_t>(shared + 4 * thread);
      }
      if (thread % 32 == 0) barrier_arrive(empty);
    }
  });
}
