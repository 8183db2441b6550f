// int4_linear on CUDA devices: which kernel, how many blocks, how much workspace, launch.
#include "cuda.h"

#include <cuda_runtime_api.h>
#include <string.h>

#include <atomic>

#include "cuda_decode_body.cuh"
#include "cuda_kernels.cuh"
#include "cuda_tile_launch.h"
#include "cuda_weight.h"

namespace nibblock {
namespace {

using namespace cuda;

constexpr int kDevices = 64;
constexpr int kVariants = 4;  // type x bits
constexpr int kTiles = 4;

constexpr const char* kTileServes =
    "any m, bfloat16 or float16, x and its rows at multiples of 16 bytes, no adapter, compute "
    "capability 9.0";

constexpr Int4CudaKernel kRows[] = {
    {"int4_linear.cuda.sm80.m8", "m <= 8, bfloat16 or float16", 1, false, false},
    {"int4_linear.cuda.sm80.m16", "m <= 16, bfloat16 or float16", 2, false, false},
    {"int4_linear.cuda.sm80.m32", "m <= 128 (up to 4 passes of 32), bfloat16 or float16", 4, false,
     false},
    {"int4_linear.cuda.sm80.m64", "m <= 128 (up to 2 passes of 64), bfloat16 or float16", 8, false,
     false},
    {"int4_linear.cuda.sm90a.m64", kTileServes, 8, false, true},
    {"int4_linear.cuda.sm90a.m128", kTileServes, 16, false, true},
};

DecodeKernels kernels_of(int variant) {
  switch (variant) {
  case 0:
    return decode_kernels_bf16_4();
  case 1:
    return decode_kernels_bf16_8();
  case 2:
    return decode_kernels_f16_4();
  default:
    return decode_kernels_f16_8();
  }
}

// Facts of a device, asked for once. Zero means not asked yet; threads that ask at the same time
// write the same answers.
struct Device {
  std::atomic<int> multiprocessors, capability, shared_limit;
  std::atomic<int> blocks[kVariants][2][2][kTiles];  // of a kernel on one multiprocessor; -1: none
  std::atomic<int> tile_blocks[kVariants][2][2];     // of the tile kernels
};
Device devices[kDevices];

cudaError_t ask(int device, Device& d) {
  if (d.shared_limit.load(std::memory_order_acquire)) return cudaSuccess;
  int count = 0, major = 0, minor = 0, shared = 0;
  cudaError_t e = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (!e) e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!e) e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (!e) e = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (e) return e;
  d.multiprocessors.store(count, std::memory_order_relaxed);
  d.capability.store(10 * major + minor, std::memory_order_relaxed);
  d.shared_limit.store(shared, std::memory_order_release);
  return cudaSuccess;
}

// Blocks of a kernel that fit one multiprocessor, 0 with an error. Lets the kernel have its shared
// memory, which is more than the 48 KiB that need no permission.
cudaError_t resident_blocks(const void* function, int shared_bytes, int threads,
                            std::atomic<int>& known, int* blocks) {
  int b = known.load(std::memory_order_acquire);
  if (b == 0) {
    cudaError_t e =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (!e) e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&b, function, threads, shared_bytes);
    if (e) {
      (void)cudaGetLastError();  // ours to report; the next caller's check must not see it
      return e;
    }
    known.store(b > 0 ? b : -1, std::memory_order_release);
  }
  *blocks = b > 0 ? b : 0;
  return cudaSuccess;
}

bool fits_int32(int64_t v) { return v >= 0 && v < (int64_t(1) << 31) - kStageK; }

// Rows of x that one pass of a row's kernel takes, and how many passes it may need.
bool serves(const Int4CudaKernel& row, const Int4CudaParams& p) {
  if (p.w.group == 16) return false;  // a stage has room for the scales of groups of 32
  if (p.w.scale_type == Dtype::kI8) return false;  // and copies them as they are multiplied
  if (p.w.palette) return false;
  if (row.sm90a) {
    return fits_int32(p.m) && p.w.n >= 1 && p.xtype != Dtype::kF32 && fits_int32(p.w.n) &&
           fits_int32(p.w.k) && reinterpret_cast<uintptr_t>(p.packed) % 16 == 0 && !p.values &&
           tile_map_exists(p.x, p.m, p.w.k, p.x_stride);
  }
  const int64_t tokens = kTokens * row.token_tiles;
  return p.m >= 1 && p.m <= (row.token_tiles >= 4 ? kMaxRowsOfX : tokens) && p.w.n >= 1 &&
         p.xtype != Dtype::kF32 && fits_int32(p.w.n) && fits_int32(p.w.k) &&
         reinterpret_cast<uintptr_t>(p.packed) % 16 == 0 &&
         (!p.values || (p.w.bits == 4 && row.token_tiles <= 4 &&
                        (p.block == 32 || p.block == 64 || p.block == 128) &&
                        reinterpret_cast<uintptr_t>(p.values) % 16 == 0));
}

int variant_of(const Int4CudaParams& p) {
  return (p.xtype == Dtype::kBF16 ? 0 : 2) + (p.w.bits == 4 ? 0 : 1);
}

TileKernels tile_kernels_of(int variant) {
  switch (variant) {
  case 0:
    return tile_kernels_bf16_4();
  case 1:
    return tile_kernels_bf16_8();
  case 2:
    return tile_kernels_f16_4();
  default:
    return tile_kernels_f16_8();
  }
}

// Blocks, tiles and workspace of a tile kernel; false where it does not fit the device.
bool plan_tile(const Int4CudaParams& p, Device& d, Int4CudaPlan* plan, cudaError_t* e) {
  const int variant = variant_of(p), affine = p.w.affine != 0, wide = plan->kernel->token_tiles > 8;
  const TileKernel k = tile_kernels_of(variant).row[affine][wide];
  int blocks = 0;
  if (k.shared_bytes > d.shared_limit) return false;
  *e = resident_blocks(k.function, k.shared_bytes, kTileThreads,
                       d.tile_blocks[variant][affine][wide], &blocks);
  const int64_t token_tiles = ceil_div(p.m, k.tokens);
  const int64_t tiles = ceil_div(p.w.n, kTileRows) * token_tiles;
  if (*e || blocks == 0 || !fits_int32(2 * tiles)) return false;
  Schedule& s = plan->schedule;
  s.chunks = static_cast<int32_t>(ceil_div(int4_geometry(p.w).k_pad, kStageK));
  s.token_tiles = static_cast<int32_t>(token_tiles);
  s.tiles = static_cast<int32_t>(tiles);
  const int64_t resident = static_cast<int64_t>(blocks) * d.multiprocessors;
  s.blocks = static_cast<int32_t>(units(s) < resident ? units(s) : resident);
  plan->x_sums_at = 2 * static_cast<int64_t>(s.blocks) * k.slot_floats * 4;
  plan->partial_bytes = plan->x_sums_at;
  if (affine) {
    const int64_t slots = x_sum_slots(s.chunks, group_shift(p.w.group));
    plan->partial_bytes += slots * token_tiles * k.tokens * 4;
  }
  plan->counters = 2 * tiles;
  return true;
}

int tile_index(int token_tiles) {
  for (int i = 0; i < kTiles; ++i) {
    if (kTokenTiles[i] == token_tiles) return i;
  }
  return 0;
}

}  // namespace

Int4CudaTable int4_linear_cuda_table() {
  return {kRows, static_cast<int>(sizeof(kRows) / sizeof(kRows[0]))};
}

Status int4_linear_cuda_plan(const Int4CudaParams& p, const char* forced_id, Int4CudaPlan* plan) {
  *plan = Int4CudaPlan{};
  cudaError_t e = cudaGetDevice(&plan->device);
  if (!e && plan->device >= kDevices) return kNotServed;
  Device& d = devices[e ? 0 : plan->device];
  if (!e) e = ask(plan->device, d);
  if (e) {
    plan->device_error = e;
    return kDeviceError;
  }
  plan->capability = d.capability;
  if (d.capability < 80) return kDeviceTooOld;
  const int variant = variant_of(p);
  const DecodeKernels all = kernels_of(variant);
  bool known = !forced_id;
  for (const Int4CudaKernel& row : kRows) {
    if (forced_id && strcmp(forced_id, row.id) != 0) continue;
    known = true;
    if (row.sm90a && !forced_id) continue;
    if (row.sm90a && d.capability != 90) return kOtherDevice;
    if (!serves(row, p)) continue;
    if (row.sm90a) {
      plan->kernel = &row;
      if (plan_tile(p, d, plan, &e)) return kOk;
      plan->device_error = e;
      return e ? kDeviceError : kNotServed;
    }
    // 32 rows at a time fill the tensor cores' columns better than 64 up to there; beyond, 64 reads
    // the weights half as often.
    if (!forced_id && row.token_tiles == 4 && p.m > 32 && !p.values &&
        d.shared_limit >= all.row[0][p.w.affine != 0][3].shared_bytes) {
      continue;
    }
    const int tile = tile_index(row.token_tiles);
    const DecodeKernel& k = all.row[p.values != nullptr][p.w.affine != 0][tile];
    if (k.shared_bytes > d.shared_limit) continue;
    int blocks = 0;
    e = resident_blocks(k.function, k.shared_bytes, k.threads,
                        d.blocks[variant][p.values != nullptr][p.w.affine != 0][tile], &blocks);
    if (e) {
      plan->device_error = e;
      return kDeviceError;
    }
    if (blocks == 0) continue;
    const Int4Geometry g = int4_geometry(p.w);
    Schedule& s = plan->schedule;
    s.chunks = static_cast<int32_t>(g.k_pad > 0 ? ceil_div(g.k_pad, kStageK) : 1);
    s.token_tiles = static_cast<int32_t>(ceil_div(p.m, k.tokens));
    s.tiles = static_cast<int32_t>(ceil_div(p.w.n, k.rows)) * s.token_tiles;
    const int64_t resident = static_cast<int64_t>(blocks) * d.multiprocessors;
    s.blocks = static_cast<int32_t>(units(s) < resident ? units(s) : resident);
    plan->kernel = &row;
    plan->partial_bytes = 2 * static_cast<int64_t>(s.blocks) * k.slot_floats * 4;
    plan->counters = s.tiles;
    return kOk;
  }
  return known ? kNotServed : kUnknownKernel;
}

Status int4_linear_cuda_run(const Int4CudaParams& p, Int4CudaPlan* plan, void* partials,
                            int32_t* counters, void* stream) {
  if (plan->kernel->sm90a) {
    const TileKernels all = tile_kernels_of(variant_of(p));
    const TileKernel& k = all.row[p.w.affine != 0][plan->kernel->token_tiles > 8];
    plan->device_error = launch_tile(p, *plan, k, all.x_sums, partials, counters, stream);
    return plan->device_error ? kDeviceError : kOk;
  }
  const DecodeKernels all = kernels_of(variant_of(p));
  const DecodeKernel& k =
      all.row[p.values != nullptr][p.w.affine != 0][tile_index(plan->kernel->token_tiles)];
  DecodeParams q = {};
  q.packed = p.packed;
  q.x = static_cast<const uint16_t*>(p.x);
  q.y = static_cast<uint16_t*>(p.y);
  q.bias = p.bias;
  q.partials = static_cast<Floats4*>(partials);
  q.counters = counters;
  set_weight(p.w, &q);
  q.x_stride = p.x_stride;
  q.y_stride = p.y_stride;
  q.m = static_cast<int32_t>(p.m);
  q.bias_type = static_cast<int32_t>(p.bias_type);
  // One row needs no stride.
  q.x_aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && (p.x_stride % 8 == 0 || p.m == 1);
  q.y_aligned = reinterpret_cast<uintptr_t>(p.y) % 8 == 0 && (p.y_stride % 4 == 0 || p.m == 1);
  q.schedule = plan->schedule;
  q.values = p.values;
  q.row_ptr = p.row_ptr;
  q.col = p.col;
  q.block_shift = p.block == 128 ? 7 : p.block == 64 ? 6 : 5;
  q.value_type = static_cast<int32_t>(p.value_type);
  void* arguments[] = {&q};
  const cudaError_t e =
      cudaLaunchKernel(k.function, dim3(q.schedule.blocks), dim3(k.threads), arguments,
                       k.shared_bytes, static_cast<cudaStream_t>(stream));
  if (e) {
    (void)cudaGetLastError();
    plan->device_error = e;
    return kDeviceError;
  }
  return kOk;
}

bool int4_linear_cuda_capture(void* stream, unsigned long long* id, int* device_error) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  *id = 0;
  const cudaError_t e = cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, id);
  if (e) (void)cudaGetLastError();
  if (status != cudaStreamCaptureStatusActive) *id = 0;
  *device_error = e;
  return !e;
}

const char* int4_linear_cuda_error_text(int device_error) {
  return cudaGetErrorString(static_cast<cudaError_t>(device_error));
}

bool int4_linear_cuda_facts(int index, Int4CudaKernelFacts* facts) {
  constexpr int kDecode = kVariants * 4 * kTiles;
  if (index < 0 || index >= kDecode + kVariants * 4) return false;
  const bool is_tile = index >= kDecode;
  const int variant = is_tile ? (index - kDecode) / 4 : index / (4 * kTiles);
  const int adapter = is_tile ? 0 : index / (2 * kTiles) % 2;
  const int affine = is_tile ? index / 2 % 2 : index / kTiles % 2;
  const int tile = is_tile ? index % 2 : index % kTiles;
  const DecodeKernel decode = kernels_of(variant).row[adapter][affine][is_tile ? 0 : tile];
  const TileKernel wide = tile_kernels_of(variant).row[affine][tile & 1];
  const void* const function = is_tile ? wide.function : decode.function;
  const int shared = is_tile ? wide.shared_bytes : decode.shared_bytes;
  const int threads = is_tile ? kTileThreads : decode.threads;
  if (!function) return false;
  cudaFuncAttributes a = {};
  int blocks = 0, device = 0;
  if (cudaGetDevice(&device) || device >= kDevices) return false;
  Device& d = devices[device];
  std::atomic<int>& known =
      is_tile ? d.tile_blocks[variant][affine][tile] : d.blocks[variant][adapter][affine][tile];
  if (cudaFuncGetAttributes(&a, function) ||
      resident_blocks(function, shared, threads, known, &blocks)) {
    (void)cudaGetLastError();
    return false;
  }
  *facts = {variant < 2 ? "bfloat16" : "float16",
            variant % 2 ? 8 : 4,
            affine,
            adapter,
            is_tile ? wide.tokens / kTokens : kTokenTiles[tile],
            a.numRegs,
            static_cast<int>(a.localSizeBytes),
            shared,
            threads,
            blocks};
  return true;
}

}  // namespace nibblock

// The rows for Python, which reads them without torch: false behind the last one.
extern "C" NB_API bool nibblock_cuda_int4_row(int index, const char** id, const char** serves,
                                              int* proven) {
  const nibblock::Int4CudaTable t = nibblock::int4_linear_cuda_table();
  if (index < 0 || index >= t.count) return false;
  *id = t.rows[index].id;
  *serves = t.rows[index].serves_text;
  *proven = t.rows[index].proven;
  return true;
}
