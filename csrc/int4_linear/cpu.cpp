// int4_linear on the CPU: the scalar kernels, which are the oracle in C++, and the table of all
// kernels.
//
// The scalar bodies follow the formula with float64 sums and no blocking beyond one dequantised row
// at a time. Every other kernel is tested against them and against NumPy. They also serve CPUs
// without AVX2.
#include <stdlib.h>

#include "../common/kernel_table.h"
#include "int4_linear.h"

namespace nibblock {
namespace {

constexpr Dtype kF32 = Dtype::kF32;

// out[k] = w[n, k], k < f.k, in float32.
void dequantize_row(const Int4LinearParams& p, int64_t n, float* out) {
  int4_dequantize(p.w, p.packed, &n, 1, out, kF32, kSerial);
}

}  // namespace

Status int4_linear_scalar(const Int4LinearParams& p) {
  const int64_t K = p.w.k;
  Status status = kOk;
  auto body = [&](int64_t begin, int64_t end) {
    float* w = static_cast<float*>(malloc(static_cast<size_t>(K > 0 ? K : 1) * sizeof(float)));
    if (!w) {
      status = kOutOfMemory;
      return;
    }
    for (int64_t n = begin; n < end; ++n) {
      dequantize_row(p, n, w);
      const double bias = p.bias ? load_as_f32(p.bias, p.bias_type, n) : 0.0;
      for (int64_t m = 0; m < p.m; ++m) {
        double sum = bias;
        for (int64_t k = 0; k < K; ++k) {
          sum += static_cast<double>(load_as_f32(p.x, p.xtype, m * p.x_stride + k)) * w[k];
        }
        if (p.add) {
          float tile = 0.0f;  // apart from the float64 sum, so that adding zeros changes no bit
          p.add->add(p.add, m, 1, n, 1, &tile, 1);
          sum += tile;
        }
        store_f32_as(p.y, p.xtype, m * p.y_stride + n, static_cast<float>(sum));
      }
    }
    free(w);
  };
  parallel_for(*p.parallel, p.w.n, body);
  return status;
}

Status int4_linear_dx_scalar(const Int4LinearParams& p) {
  const int64_t N = p.w.n, K = p.w.k;
  // One row of dx at a time would dequantise W for every m; one column block at a time needs all n.
  // The float64 accumulators of a block of rows are kept instead.
  constexpr int64_t kRows = 16;
  Status status = kOk;
  auto body = [&](int64_t begin, int64_t end) {
    float* w = static_cast<float*>(malloc(static_cast<size_t>(K > 0 ? K : 1) * sizeof(float)));
    double* acc =
        static_cast<double*>(malloc(static_cast<size_t>(K > 0 ? K : 1) * kRows * sizeof(double)));
    if (!w || !acc) {
      status = kOutOfMemory;
      free(w);
      free(acc);
      return;
    }
    for (int64_t block = begin; block < end; ++block) {
      const int64_t m0 = block * kRows, rows = p.m - m0 < kRows ? p.m - m0 : kRows;
      for (int64_t i = 0; i < rows * K; ++i) acc[i] = 0.0;
      for (int64_t n = 0; n < N; ++n) {
        dequantize_row(p, n, w);
        for (int64_t i = 0; i < rows; ++i) {
          const double g = load_as_f32(p.x, p.xtype, (m0 + i) * p.x_stride + n);
          for (int64_t k = 0; k < K; ++k) acc[i * K + k] += g * w[k];
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t k = 0; k < K; ++k) {
          float tile = 0.0f;
          if (p.add) p.add->add(p.add, m0 + i, 1, k, 1, &tile, 1);
          store_f32_as(p.y, p.xtype, (m0 + i) * p.y_stride + k,
                       static_cast<float>(acc[i * K + k] + tile));
        }
      }
    }
    free(w);
    free(acc);
  };
  parallel_for(*p.parallel, ceil_div(p.m, kRows), body);
  return status;
}

namespace {

const float kInfinity = bits_to_f32(0x7f800000u);
const float kNaN = bits_to_f32(0x7fc00000u);

// Whether row m of x, `width` long, holds a NaN.
bool row_has_nan(const Int4LinearParams& p, int64_t m, int64_t width) {
  for (int64_t i = 0; i < width; ++i) {
    const float v = load_as_f32(p.x, p.xtype, m * p.x_stride + i);
    if (v != v) return true;
  }
  return false;
}

float weight_at(const Int4LinearParams& p, const Int4Geometry& g, const uint8_t* panel, int64_t n,
                int64_t k) {
  const int64_t group = k / g.group, r = n % kPanelRows;
  const float s = int4_scale(p.w, g, panel + g.scales_at, group, r);
  const float code = static_cast<float>(int4_code(p.w, g, panel, k, r));
  if (p.w.affine) return s * code + int4_scale(p.w, g, panel + g.offsets_at, group, r);
  return s * (code - (p.w.bits == 8 ? 128.0f : 8.0f));
}

}  // namespace

void int4_linear_nonfinite_row(const Int4LinearParams& p, int64_t m) {
  const int64_t N = p.w.n, K = p.w.k;
  const bool nan = row_has_nan(p, m, K);
  const Int4Geometry g = int4_geometry(p.w);
  float tile[kPanelRows];
  for (int64_t n = 0; n < N; ++n) {
    const uint8_t* panel = p.packed + (n / kPanelRows) * g.panel_stride;
    const int64_t r = n % kPanelRows;
    double sum = nan ? kNaN : 0.0;
    for (int64_t k = 0; k < K && !nan; ++k) {
      const float v = load_as_f32(p.x, p.xtype, m * p.x_stride + k);
      if (v != kInfinity && v != -kInfinity) continue;  // finite terms are lost beside an infinity
      sum += static_cast<double>(v) * weight_at(p, g, panel, n, k);
    }
    tile[r] = static_cast<float>(sum);
    if (r + 1 < kPanelRows && n + 1 < N) continue;
    if (p.add) p.add->add(p.add, m, 1, n - r, r + 1, tile, kPanelRows);
    for (int64_t i = 0; i <= r; ++i) {
      const float bias = p.bias ? load_as_f32(p.bias, p.bias_type, n - r + i) : 0.0f;
      store_f32_as(p.y, p.xtype, m * p.y_stride + n - r + i, tile[i] + bias);
    }
  }
}

void int4_linear_dx_nonfinite_row(const Int4LinearParams& p, int64_t m) {
  const int64_t N = p.w.n, K = p.w.k;
  const bool nan = row_has_nan(p, m, N);
  const Int4Geometry g = int4_geometry(p.w);
  for (int64_t k0 = 0; k0 < K; k0 += kPanelRows) {
    const int64_t count = K - k0 < kPanelRows ? K - k0 : kPanelRows;
    float tile[kPanelRows];
    for (int64_t i = 0; i < kPanelRows; ++i) tile[i] = nan ? kNaN : 0.0f;
    for (int64_t n = 0; n < N && !nan; ++n) {
      const float v = load_as_f32(p.x, p.xtype, m * p.x_stride + n);
      if (v != kInfinity && v != -kInfinity) continue;
      const uint8_t* panel = p.packed + (n / kPanelRows) * g.panel_stride;
      for (int64_t i = 0; i < count; ++i) tile[i] += v * weight_at(p, g, panel, n, k0 + i);
    }
    if (p.add) p.add->add(p.add, m, 1, k0, count, tile, kPanelRows);
    for (int64_t i = 0; i < count; ++i) {
      store_f32_as(p.y, p.xtype, m * p.y_stride + k0 + i, tile[i]);
    }
  }
}

// --- the table -----------------------------------------------------------------------------------

namespace {

bool any(const Int4LinearParams&) { return true; }
bool is_int8(const Int4LinearParams& p) { return p.compute == Compute::kInt8; }
// An AMX tile multiplies 16 rows in the time of one: below 5 rows the vector kernels, which run at
// the speed of memory, are as fast and need no tile set-up. float32 and float16 x keep their
// precision, which bfloat16 tiles do not have. (For dx, x is dy.)
bool amx_dx(const Int4LinearParams& p) { return p.m >= 5 && p.xtype == Dtype::kBF16; }
bool amx_bf16(const Int4LinearParams& p) { return amx_dx(p) && p.compute == Compute::kBF16; }
// (A block of 16 fills a quarter of a tile row: VNNI is as fast.)
bool amx_int8(const Int4LinearParams& p) { return p.m >= 5 && is_int8(p) && p.w.group != 16; }
// Fewer rows are bound by memory, and int16 keeps more of x; 8-bit codes would saturate, and a
// block of 16 ends before the 16-bit sums are full.
bool avx2_int8(const Int4LinearParams& p) {
  return p.m >= 3 && is_int8(p) && p.w.bits == 4 && p.w.group != 16;
}

const Int4LinearKernel kForward[] = {
    {"int4_linear.cpu.amx.bf16_panel", Isa::kAmx, "m >= 5, bfloat16 x, compute bf16", amx_bf16,
     int4_linear_amx_bf16},
    {"int4_linear.cpu.amx.int8_tile", Isa::kAmx, "m >= 5, compute int8, groups of 32 and more",
     amx_int8, int4_linear_amx_int8},
    {"int4_linear.cpu.avx512_vnni.int8", Isa::kAvx512Vnni, "compute int8", is_int8,
     int4_linear_avx512_vnni_int8},
    {"int4_linear.cpu.avx512_vnni.int16", Isa::kAvx512Vnni, "any call", any,
     int4_linear_avx512_vnni},
    {"int4_linear.cpu.avx512.int16", Isa::kAvx512, "any call", any, int4_linear_avx512},
    {"int4_linear.cpu.avx2.int8", Isa::kAvx2, "m >= 3, compute int8, 4 bits, groups of 32 and more",
     avx2_int8, int4_linear_avx2_int8},
    {"int4_linear.cpu.avx2.int16", Isa::kAvx2, "any call", any, int4_linear_avx2},
    {"int4_linear.cpu.scalar.reference", Isa::kScalar, "any call", any, int4_linear_scalar},
};

// Below 2 rows taking the codes out of their order costs as much as the product; a group of 16 is
// half of what shares a scaled dy.
bool integer_dx(const Int4LinearParams& p) { return p.m >= 2 && p.w.group != 16; }
bool integer_dx_int8(const Int4LinearParams& p) { return integer_dx(p) && is_int8(p); }
// 8-bit codes would saturate.
bool avx2_dx_int8(const Int4LinearParams& p) { return integer_dx_int8(p) && p.w.bits == 4; }

const Int4LinearKernel kDx[] = {
    {"int4_linear_dx.cpu.amx.bf16_panel", Isa::kAmx, "m >= 5, bfloat16 x", amx_dx,
     int4_linear_dx_amx_bf16},
    {"int4_linear_dx.cpu.avx512_vnni.int8", Isa::kAvx512Vnni,
     "m >= 2, compute int8, groups of 32 and more", integer_dx_int8,
     int4_linear_dx_avx512_vnni_int8},
    {"int4_linear_dx.cpu.avx512_vnni.int16", Isa::kAvx512Vnni, "m >= 2, groups of 32 and more",
     integer_dx, int4_linear_dx_avx512_vnni_int16},
    {"int4_linear_dx.cpu.avx512.panel", Isa::kAvx512, "any call", any, int4_linear_dx_avx512},
    {"int4_linear_dx.cpu.avx2.int8", Isa::kAvx2,
     "m >= 2, compute int8, 4 bits, groups of 32 and more", avx2_dx_int8, int4_linear_dx_avx2_int8},
    {"int4_linear_dx.cpu.avx2.int16", Isa::kAvx2, "m >= 2, groups of 32 and more", integer_dx,
     int4_linear_dx_avx2_int16},
    {"int4_linear_dx.cpu.avx2.panel", Isa::kAvx2, "any call", any, int4_linear_dx_avx2},
    {"int4_linear_dx.cpu.scalar.reference", Isa::kScalar, "any call", any, int4_linear_dx_scalar},
};

}  // namespace

Int4LinearTable int4_linear_table() {
  return {kForward, static_cast<int>(sizeof kForward / sizeof *kForward)};
}
Int4LinearTable int4_linear_dx_table() { return {kDx, static_cast<int>(sizeof kDx / sizeof *kDx)}; }

const Int4LinearKernel* int4_linear_select(const Int4LinearTable& t, const Int4LinearParams& p) {
  return select_row(t, p);
}

Status int4_linear_run(const Int4LinearTable& t, const Int4LinearParams& p, const char* forced_id) {
  return run_row(t, p, forced_id, p.m == 0);
}

}  // namespace nibblock
