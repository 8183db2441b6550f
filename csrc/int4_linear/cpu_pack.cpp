// Canonical <-> packed weights, and dequantised rows. Baseline code: this runs once per load, and
// its clarity is worth more than its speed. The layout is drawn in int4_linear.h.
#include "int4_linear.h"

namespace nibblock {
namespace {

inline uint8_t canonical_code(const uint8_t* row, int bits, int64_t k) {
  if (bits == 8) return row[k];
  return (row[k >> 1] >> (4 * (k & 1))) & 15;
}

// unit and multiples with values[i] == unit * multiples[i] for all i; false where there are none.
// The largest value tells: for each multiple it might be, the unit follows.
bool factor_run(const float* values, int64_t count, int8_t* multiples, uint16_t* unit) {
  float top = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    if (!(values[i] - values[i] == 0.0f)) return false;  // infinite or NaN
    if ((values[i] < 0 ? -values[i] : values[i]) > (top < 0 ? -top : top)) top = values[i];
  }
  *unit = 0;
  for (int64_t i = 0; i < count; ++i) multiples[i] = 0;
  if (top == 0.0f) return true;
  // 63 first: the largest of ggml's 6 bits is nearly always that. -128 is the one without a twin.
  for (int step = 0; step <= 128; ++step) {
    const int most = step == 0 ? 63 : step == 1 ? -128 : 129 - step;
    const uint16_t half = f32_to_f16(top / static_cast<float>(most));
    const float u = f16_to_f32(half);
    if (u * static_cast<float>(most) != top) continue;
    int64_t i = 0;
    for (; i < count; ++i) {
      const float ratio = values[i] / u;  // at most 128 in magnitude
      const int m = static_cast<int>(ratio < 0 ? ratio - 0.5f : ratio + 0.5f);
      if (m < -128 || m > 127 || u * static_cast<float>(m) != values[i]) break;
      multiples[i] = static_cast<int8_t>(m);
    }
    *unit = half;
    if (i == count) return true;
  }
  return false;
}

// Canonical scales (or offsets) of row n into lane r of a panel's section, and back.
void pack_scales(const Int4Format& f, const Int4Geometry& g, const char* values, int64_t n, int r,
                 uint8_t* section) {
  if (f.scale_type == Dtype::kI8) {
    const int64_t each = int64_t{1} << g.run_shift;
    for (int64_t gi = 0; gi < g.groups; gi += each) {
      float run[16];
      int8_t multiples[16];
      uint16_t unit;
      memcpy(run, values + (n * g.groups + gi) * 4, static_cast<size_t>(each) * 4);
      factor_run(run, each, multiples, &unit);
      for (int64_t i = 0; i < each; ++i) {
        section[(gi + i) * kPanelRows + r] = static_cast<uint8_t>(multiples[i]);
      }
      memcpy(section + g.units_at + ((gi >> g.run_shift) * kPanelRows + r) * 2, &unit, 2);
    }
    return;
  }
  const int64_t es = dtype_size(f.scale_type);
  for (int64_t gi = 0; gi < g.groups; ++gi) {
    memcpy(section + (gi * kPanelRows + r) * es, values + (n * g.groups + gi) * es, es);
  }
}

void unpack_scales(const Int4Format& f, const Int4Geometry& g, const uint8_t* section, int64_t n,
                   int r, char* values) {
  const int64_t es = f.scale_type == Dtype::kI8 ? 4 : dtype_size(f.scale_type);
  for (int64_t gi = 0; gi < g.groups; ++gi) {
    char* out = values + (n * g.groups + gi) * es;
    if (f.scale_type == Dtype::kI8) {
      const float value = int4_scale(f, g, section, gi, r);
      memcpy(out, &value, 4);
    } else {
      memcpy(out, section + (gi * kPanelRows + r) * es, es);
    }
  }
}

// A palette and the place of each of its codes.
struct Palette {
  uint8_t values[16];
  uint8_t place[256];
};

void pack_panel(const Int4Format& f, const Int4Geometry& g, const Palette& palette, int64_t panel,
                const uint8_t* qweight, const char* scales, const char* offsets, uint8_t* out) {
  const int64_t row_bytes = f.bits == 8 ? f.k : (f.k + 1) / 2;
  memset(out, 0, static_cast<size_t>(g.panel_stride));
  const bool eight = int4_stored_bits(f) == 8;
  const int zero = f.palette ? palette.place[128] * 0x11 : eight ? 0x80 : 0x88;
  memset(out, zero, static_cast<size_t>(g.scales_at));
  if (f.palette) memcpy(out + g.palette_at, palette.values, sizeof palette.values);
  for (int r = 0; r < kPanelRows; ++r) {
    const int64_t n = panel * kPanelRows + r;
    if (n >= f.n) break;
    const uint8_t* row = qweight + n * row_bytes;
    for (int64_t k = 0; k < f.k; ++k) {
      const CodePlace at = code_place(int4_stored_bits(f), k, r);
      uint8_t code = canonical_code(row, f.bits, k);
      if (f.palette) code = palette.place[code];
      if (eight) {
        out[at.byte] = code;
      } else {
        out[at.byte] =
            static_cast<uint8_t>((out[at.byte] & ~(15 << at.shift)) | (code << at.shift));
      }
    }
    pack_scales(f, g, scales, n, r, out + g.scales_at);
    if (f.affine) pack_scales(f, g, offsets, n, r, out + g.offsets_at);
  }
}

void unpack_panel(const Int4Format& f, const Int4Geometry& g, int64_t panel, const uint8_t* in,
                  uint8_t* qweight, char* scales, char* offsets) {
  const int64_t row_bytes = f.bits == 8 ? f.k : (f.k + 1) / 2;
  for (int r = 0; r < kPanelRows; ++r) {
    const int64_t n = panel * kPanelRows + r;
    if (n >= f.n) break;
    uint8_t* row = qweight + n * row_bytes;
    if (row_bytes) memset(row, 0, static_cast<size_t>(row_bytes));
    for (int64_t k = 0; k < f.k; ++k) {
      const int code = int4_code(f, g, in, k, r);
      if (f.bits == 8) {
        row[k] = static_cast<uint8_t>(code);
      } else {
        row[k >> 1] = static_cast<uint8_t>(row[k >> 1] | code << (4 * (k & 1)));
      }
    }
    unpack_scales(f, g, in + g.scales_at, n, r, scales);
    if (f.affine) unpack_scales(f, g, in + g.offsets_at, n, r, offsets);
  }
}

}  // namespace

void int4_pack(const Int4Format& f, const uint8_t* qweight, const void* scales, const void* offsets,
               uint8_t* packed, const Parallel& parallel) {
  const Int4Geometry g = int4_geometry(f);
  Palette palette = {};
  if (f.palette) {
    const int count = int4_palette(qweight, f.n * f.k, palette.values);
    for (int i = 0; i < count; ++i) palette.place[palette.values[i]] = static_cast<uint8_t>(i);
  }
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      pack_panel(f, g, palette, p, qweight, static_cast<const char*>(scales),
                 static_cast<const char*>(offsets), packed + p * g.panel_stride);
    }
  };
  parallel_for(parallel, g.panels, body);
}

void int4_unpack(const Int4Format& f, const uint8_t* packed, uint8_t* qweight, void* scales,
                 void* offsets, const Parallel& parallel) {
  const Int4Geometry g = int4_geometry(f);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      unpack_panel(f, g, p, packed + p * g.panel_stride, qweight, static_cast<char*>(scales),
                   static_cast<char*>(offsets));
    }
  };
  parallel_for(parallel, g.panels, body);
}

int int4_palette(const uint8_t* codes, int64_t count, uint8_t* values) {
  bool seen[256] = {};
  for (int64_t i = 0; i < count; ++i) seen[codes[i]] = true;
  int found = 0;
  for (int code = 0; code < 256; ++code) {
    if (!seen[code]) continue;
    if (found == 16) return 17;
    values[found++] = static_cast<uint8_t>(code);
  }
  for (int i = found; i < 16; ++i) values[i] = found ? values[found - 1] : 128;
  return found;
}

int64_t int4_unfit_run(const float* scales, int64_t n, int64_t groups, int64_t group,
                       const Parallel& parallel) {
  const int64_t each = kRunK / group, runs = n * groups / each;
  int64_t first = runs;
  auto body = [&](int64_t begin, int64_t end) {
    int8_t multiples[16];
    uint16_t unit;
    for (int64_t run = begin; run < end; ++run) {
      int64_t known = __atomic_load_n(&first, __ATOMIC_RELAXED);
      if (known <= run) return;
      if (factor_run(scales + run * each, each, multiples, &unit)) continue;
      while (run < known && !__atomic_compare_exchange_n(&first, &known, run, true,
                                                         __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
      }
      return;
    }
  };
  parallel_for(parallel, runs, body);
  return first < runs ? first : -1;
}

void int4_factor_scales(const float* scales, int64_t n, int64_t groups, int64_t group,
                        int8_t* multiples, uint16_t* units) {
  const int64_t each = kRunK / group;
  for (int64_t run = 0; run < n * groups / each; ++run) {
    factor_run(scales + run * each, each, multiples + run * each, units + run);
  }
}

void int4_dequantize(const Int4Format& f, const uint8_t* packed, const int64_t* rows, int64_t count,
                     void* out, Dtype type, const Parallel& parallel) {
  const Int4Geometry g = int4_geometry(f);
  const float zero = f.bits == 8 ? 128.0f : 8.0f;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = rows ? rows[i] : i;
      const uint8_t* panel = packed + (n / kPanelRows) * g.panel_stride;
      const int r = static_cast<int>(n % kPanelRows);
      for (int64_t gi = 0; gi < g.groups; ++gi) {
        const float s = int4_scale(f, g, panel + g.scales_at, gi, r);
        const float o = f.affine ? int4_scale(f, g, panel + g.offsets_at, gi, r) : 0.0f;
        const int64_t k1 = (gi + 1) * g.group < f.k ? (gi + 1) * g.group : f.k;
        for (int64_t k = gi * g.group; k < k1; ++k) {
          const float code = static_cast<float>(int4_code(f, g, panel, k, r));
          store_f32_as(out, type, i * f.k + k, f.affine ? s * code + o : s * (code - zero));
        }
      }
    }
  };
  parallel_for(parallel, count, body);
}

}  // namespace nibblock
