// Canonical <-> packed weights, and dequantised rows. Baseline code: this runs once per load, and
// its clarity is worth more than its speed. The layout is drawn in int4_linear.h.
#include "int4_linear.h"

namespace nibblock {
namespace {

inline uint8_t canonical_code(const uint8_t* row, int bits, int64_t k) {
  if (bits == 8) return row[k];
  return (row[k >> 1] >> (4 * (k & 1))) & 15;
}

void pack_panel(const Int4Format& f, const Int4Geometry& g, int64_t panel, const uint8_t* qweight,
                const char* scales, const char* offsets, uint8_t* out) {
  const int64_t row_bytes = f.bits == 8 ? f.k : (f.k + 1) / 2;
  const int64_t es = dtype_size(f.scale_type);
  memset(out, 0, static_cast<size_t>(g.panel_stride));
  memset(out, f.bits == 8 ? 0x80 : 0x88, static_cast<size_t>(g.scales_at));
  for (int r = 0; r < kPanelRows; ++r) {
    const int64_t n = panel * kPanelRows + r;
    if (n >= f.n) break;
    const uint8_t* row = qweight + n * row_bytes;
    for (int64_t k = 0; k < f.k; ++k) {
      const CodePlace at = code_place(f.bits, k, r);
      const uint8_t code = canonical_code(row, f.bits, k);
      if (f.bits == 8) {
        out[at.byte] = code;
      } else {
        out[at.byte] =
            static_cast<uint8_t>((out[at.byte] & ~(15 << at.shift)) | (code << at.shift));
      }
    }
    for (int64_t gi = 0; gi < g.groups; ++gi) {
      memcpy(out + g.scales_at + (gi * kPanelRows + r) * es, scales + (n * g.groups + gi) * es, es);
      if (f.affine) {
        memcpy(out + g.offsets_at + (gi * kPanelRows + r) * es, offsets + (n * g.groups + gi) * es,
               es);
      }
    }
  }
}

void unpack_panel(const Int4Format& f, const Int4Geometry& g, int64_t panel, const uint8_t* in,
                  uint8_t* qweight, char* scales, char* offsets) {
  const int64_t row_bytes = f.bits == 8 ? f.k : (f.k + 1) / 2;
  const int64_t es = dtype_size(f.scale_type);
  for (int r = 0; r < kPanelRows; ++r) {
    const int64_t n = panel * kPanelRows + r;
    if (n >= f.n) break;
    uint8_t* row = qweight + n * row_bytes;
    if (row_bytes) memset(row, 0, static_cast<size_t>(row_bytes));
    for (int64_t k = 0; k < f.k; ++k) {
      const CodePlace at = code_place(f.bits, k, r);
      if (f.bits == 8) {
        row[k] = in[at.byte];
      } else {
        row[k >> 1] =
            static_cast<uint8_t>(row[k >> 1] | (((in[at.byte] >> at.shift) & 15) << (4 * (k & 1))));
      }
    }
    for (int64_t gi = 0; gi < g.groups; ++gi) {
      memcpy(scales + (n * g.groups + gi) * es, in + g.scales_at + (gi * kPanelRows + r) * es, es);
      if (f.affine) {
        memcpy(offsets + (n * g.groups + gi) * es, in + g.offsets_at + (gi * kPanelRows + r) * es,
               es);
      }
    }
  }
}

}  // namespace

void int4_pack(const Int4Format& f, const uint8_t* qweight, const void* scales, const void* offsets,
               uint8_t* packed, const Parallel& parallel) {
  const Int4Geometry g = int4_geometry(f);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      pack_panel(f, g, p, qweight, static_cast<const char*>(scales),
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
        const float s = load_as_f32(panel + g.scales_at, f.scale_type, gi * kPanelRows + r);
        const float o =
            f.affine ? load_as_f32(panel + g.offsets_at, f.scale_type, gi * kPanelRows + r) : 0.0f;
        const int64_t k1 = (gi + 1) * g.group < f.k ? (gi + 1) * g.group : f.k;
        for (int64_t k = gi * g.group; k < k1; ++k) {
          const CodePlace at = code_place(f.bits, k, r);
          const float code =
              static_cast<float>((panel[at.byte] >> at.shift) & (f.bits == 8 ? 255 : 15));
          store_f32_as(out, type, i * f.k + k, f.affine ? s * code + o : s * (code - zero));
        }
      }
    }
  };
  parallel_for(parallel, count, body);
}

}  // namespace nibblock
