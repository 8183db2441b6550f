// int4_linear: y = x dequant(W)^T + bias for weights of 4 or 8 bits, and its input gradient. C
// interface.
//
//     w[n, k] = scale[n, g(k)] * code[n, k] + offset[n, g(k)]          g(k) = k / group
//     y[m, n] = sum_k x[m, k] * w[n, k] + bias[n]
//     dx[m, k] = sum_n dy[m, n] * w[n, k]
//
// code is 0..15 (bits = 4) or 0..255 (bits = 8). A symmetric weight stores no offsets: its offset
// is -8 * scale, or -128 * scale for 8 bits.
//
// Packed layout, one for every ISA (csrc/README.md draws it). The N rows are cut into panels of 16,
// K is padded to a multiple of 64. A panel is one run of memory:
//
//     codes    [k_pad / 8] lines of 64 bytes (bits = 4, or a palette), [k_pad / 4] (bits = 8)
//     scales   [groups][16] float16, float32 or int8, section padded to 64 bytes; behind int8, in
//              the same section, [k / 256][16] float16 units: a scale is its int8 times the unit of
//              its run of 256 k, which float32 holds exactly
//     offsets  the same, only if affine
//     padding  so that panel_stride is an odd multiple of 64 bytes: panels read side by side then
//              never fall into the same cache set
//     palette  only with a palette: a line of padding and, the last of a panel, one of 16 codes
//              (two lines, so that the size goes on telling how scales are stored)
//
// 4 bits: line j holds k = 8j .. 8j+7 of all 16 rows. Its 32-bit lane r belongs to row r. The
// lane's low 16-bit word holds the even k in its four nibbles, the high word the odd k, lowest
// nibble first:
//
//     lane = k0 | k2 << 4 | k4 << 8 | k6 << 12 | k1 << 16 | k3 << 20 | k5 << 24 | k7 << 28
//
// so (line >> 4p) & 0x000f000f is the pair (k 2p, k 2p+1) of every row: an operand of VPDPWSSD and
// VPMADDWD, and through one VPERMW table a row of an AMX bfloat16 tile. line & 0x0f0f0f0f and
// (line >> 4) & 0x0f0f0f0f are the byte quadruples (k0 k4 k1 k5) and (k2 k6 k3 k7): operands of
// VPDPBUSD and rows of an AMX int8 tile.
//
// 8 bits: two lines for each 8 k, which hold exactly those two byte quadruples.
//
// 8 bits with a palette: codes of at most 16 values, in the lines of 4 bits as places in the
// palette (ascending; behind the last the table repeats it). Two VPSHUFB make of a line the two
// that 8 bits have, so that 4-bit floats and GGUF's IQ types take half of the memory.
//
// Padding rows and padding k hold the code of zero (8 or 128; the first of a palette without it)
// and scale 0, offset 0.
//
// int8 scales are those of GGUF's K-quants: 6 or 8 bits for 16 or 32 weights and a float16 for 256,
// where the products would take a float32 each (Q4_K: 4.6 bits a weight instead of 6).
//
// Sources: the VNNI tile order of Intel's AMX documentation; group scales kept outside the code
// stream as in ggml's repacked formats; everything else is ours.
#pragma once

#include "../common/cpu_features.h"
#include "../common/parallel.h"
#include "../common/status.h"
#include "../common/types.h"

namespace nibblock {

constexpr int64_t kPanelRows = 16;  // n per panel
constexpr int64_t kGranuleK = 64;   // k_pad is a multiple of this
constexpr int64_t kFlushK = 128;    // integer sums are turned into float at least this often
constexpr int64_t kRunK = 256;      // k that share a unit of int8 scales

enum class Compute : int32_t {
  kBF16 =
      0,  // activations keep at least the precision of bfloat16 (int16 or bf16 inside), exact codes
  kInt8 = 1,  // activations quantised to int8 per row and block of min(group, 128)
};

// How a weight is stored. Plain data, filled by the caller.
struct Int4Format {
  int64_t n;            // out_features
  int64_t k;            // in_features
  int64_t group;        // 16 (8 bits or int8 scales), 32, 64, 128, 256, or -1 for the whole row
  int32_t bits;         // 4 or 8
  int32_t affine;       // 1: offsets are stored
  Dtype scale_type;     // kF16, kF32 or kI8, of scales and offsets
  int32_t palette = 0;  // 1: bits is 8, and codes stand in 4 as places in a table
};

// The bits a code takes in the packed layout.
static inline int int4_stored_bits(const Int4Format& f) { return f.palette ? 4 : f.bits; }
// BITS of a kernel's body: 4, 8 or, for 8 with a palette, this.
constexpr int kPalette = 84;
constexpr int64_t line_bytes(int BITS) { return BITS == 8 ? 128 : 64; }  // of 8 k

// Groups of 16 have 8-bit codes (GGUF's Q6_K, NVFP4) or int8 scales (Q2_K, Q3_K): other scales
// alone would take half of what 4-bit codes are meant to save.
static inline bool int4_has_group(int64_t group, int64_t bits, Dtype scale_type) {
  return group == 32 || group == 64 || group == 128 || group == 256 || group == -1 ||
         (group == 16 && (bits == 8 || scale_type == Dtype::kI8));
}
// What an error says the group has to be.
static inline const char* int4_groups_text(int64_t bits) {
  return bits == 8 ? "16, 32, 64, 128, 256 or -1 (whole row)"
                   : "32, 64, 128, 256 or -1 (whole row)";
}

// Whether int8 scales exist for this group and k: whole runs of groups for which they save memory.
static inline bool int4_has_int8_scales(int64_t group, int64_t k) {
  return (group == 16 || group == 32) && k % kRunK == 0;
}

static inline const char* int4_int8_scales_text() {
  return "group_size 16 or 32 and in_features a multiple of 256 for int8 scales";
}

// Sizes that follow from a format.
struct Int4Geometry {
  int64_t k_pad;
  int64_t panels;        // ceil(n / 16)
  int64_t group;         // resolved: k_pad when the format says -1
  int64_t groups;        // ceil(k / group), the groups that hold data
  int64_t scales_at;     // byte offset of the scales inside a panel (= bytes of codes)
  int64_t offsets_at;    // byte offset of the offsets; equals panel_end when there are none
  int64_t units_at;      // byte offset of the units of int8 scales (offsets) inside their section
  int run_shift;         // group >> run_shift: its run
  int64_t palette_at;    // byte offset of the palette inside a panel
  int64_t panel_stride;  // bytes
  int64_t bytes;         // panels * panel_stride
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Where code (k, r) of a panel stands: byte of the panel and shift inside it.
struct CodePlace {
  int64_t byte;
  int shift;
};
static inline CodePlace code_place(int bits, int64_t k, int r) {
  const int j = static_cast<int>(k & 7);
  if (bits == 4) {
    // nibble j/2 of the even (low) or odd (high) 16-bit word of lane r
    return {(k >> 3) * 64 + 4 * r + 2 * (j & 1) + (j >> 2), 4 * ((j >> 1) & 1)};
  }
  return {(k >> 3) * 128 + 64 * ((j >> 1) & 1) + 4 * r + 2 * (j & 1) + (j >> 2), 0};
}

static inline Int4Geometry int4_geometry(const Int4Format& f) {
  Int4Geometry g;
  g.k_pad = round_up(f.k, kGranuleK);
  g.panels = ceil_div(f.n, kPanelRows);
  g.group = f.group < 0 ? g.k_pad : f.group;
  g.groups = g.group > 0 ? ceil_div(f.k, g.group) : 0;
  g.scales_at = g.k_pad * kPanelRows * int4_stored_bits(f) / 8;
  g.units_at = g.groups * kPanelRows;
  g.run_shift = g.group == 16 ? 4 : 3;
  const int64_t units = f.scale_type == Dtype::kI8 ? f.k / kRunK * kPanelRows * 2 : 0;
  const int64_t section = round_up(g.groups * kPanelRows * dtype_size(f.scale_type) + units, 64);
  g.offsets_at = g.scales_at + section;
  const int64_t lines = (g.offsets_at + (f.affine ? section : 0)) / 64;
  g.panel_stride = ((lines | 1) + (f.palette ? 2 : 0)) * 64;
  g.palette_at = g.panel_stride - 64;
  g.bytes = g.panels * g.panel_stride;
  return g;
}

// Gives the format a palette if that is what so many packed bytes mean. With one a weight is always
// smaller: the size of `packed` is all that a caller has to say.
static inline void int4_take_palette(Int4Format* f, int64_t bytes) {
  if (f->bits != 8 || int4_geometry(*f).bytes == bytes) return;
  f->palette = 1;
  f->palette = int4_geometry(*f).bytes == bytes;
}

// The code (k, r) of a panel.
static inline int int4_code(const Int4Format& f, const Int4Geometry& g, const uint8_t* panel,
                            int64_t k, int64_t r) {
  const CodePlace at = code_place(int4_stored_bits(f), k, static_cast<int>(r));
  const int stored = panel[at.byte] >> at.shift & (int4_stored_bits(f) == 8 ? 255 : 15);
  return f.palette ? panel[g.palette_at + stored] : stored;
}

// The scale (or offset) of row r of a panel for a group; `section` is where the panel's start.
static inline float int4_scale(const Int4Format& f, const Int4Geometry& g, const uint8_t* section,
                               int64_t group, int64_t r) {
  const int64_t at = group * kPanelRows + r;
  if (f.scale_type != Dtype::kI8) return load_as_f32(section, f.scale_type, at);
  const int64_t run = (group >> g.run_shift) * kPanelRows + r;
  return static_cast<float>(static_cast<int8_t>(section[at])) *
         load_as_f32(section + g.units_at, Dtype::kF16, run);
}

// Rows m0 .. m0 + rows of x as int16 in blocks along k, each block of a row with its scale. Block b
// of row m stands at q + b * block_stride + (m - m0) * stride, its scale at scale[b * rows + m -
// m0]. It can be read up to the next 16th element behind k. Rows with a NaN or an infinity hold
// anything.
struct IntegerRows {
  const uint8_t* q;
  const float* scale;
  int64_t m0, rows, block, stride, block_stride;  // block: 32, 64 or 128; strides in bytes
};

// Adds a further term to float32 sums, before bias, rounding and the store: how an adapter rides on
// the int4 product without y being written twice. acc[i * acc_stride + j] is output (m0 + i, n0 +
// j). n0 is a multiple of 16 and a row of acc has room for cols rounded up to 16; only the scalar
// kernels call it with any n0 and one column.
//
// A kernel calls `add` once, with finished sums; or, where it walks along k, holds x as integers
// and finds an `add_part`, that for each stretch (k0, k1] while these integers are in its cache,
// and then `add_rest`.
struct TileAdd {
  void (*add)(const TileAdd* self, int64_t m0, int64_t rows, int64_t n0, int64_t cols, float* acc,
              int64_t acc_stride);
  void (*add_part)(const TileAdd* self, const IntegerRows& x, int64_t n0, int64_t cols, int64_t k0,
                   int64_t k1, float* acc, int64_t acc_stride);
  void (*add_rest)(const TileAdd* self, int64_t m0, int64_t rows, int64_t n0, int64_t cols,
                   float* acc, int64_t acc_stride);
};

// One call. For the forward, x is [m, k] and y [m, n]; for the input gradient (dx), x is dy [m, n]
// and y is dx [m, k], and bias is null. Rows are contiguous along their last dimension; nothing is
// assumed about the alignment of any pointer. y does not overlap any input.
struct Int4LinearParams {
  Int4Format w;
  const uint8_t* packed;  // int4_geometry(w).bytes
  int64_t m;
  const void* x;  // xtype, row stride x_stride elements
  int64_t x_stride;
  void* y;  // xtype, row stride y_stride elements
  int64_t y_stride;
  Dtype xtype;
  const void* bias;  // [n] bias_type, or null
  Dtype bias_type;
  Compute compute;
  const Parallel* parallel;
  const TileAdd* add;  // or null
};

// A row of the table of kernels. Walked in order; the first row whose level is at most cpu_isa()
// and that serves the call is taken. The same rows feed explain(), the support table in the README
// and the tests.
struct Int4LinearKernel {
  const char* id;  // "int4_linear.cpu.avx512_vnni.tile"
  Isa isa;
  const char* serves_text;  // what `serves` asks for, in words
  bool (*serves)(const Int4LinearParams& p);
  Status (*run)(const Int4LinearParams& p);
};

struct Int4LinearTable {
  const Int4LinearKernel* rows;
  int count;
};

NB_API Int4LinearTable int4_linear_table();     // forward rows
NB_API Int4LinearTable int4_linear_dx_table();  // input-gradient rows

// Picks a row (null when none serves) / runs it. forced_id may be null.
NB_API const Int4LinearKernel* int4_linear_select(const Int4LinearTable& t,
                                                  const Int4LinearParams& p);
NB_API Status int4_linear_run(const Int4LinearTable& t, const Int4LinearParams& p,
                              const char* forced_id);

// Canonical <-> packed. qweight is [n, ceil(k/2)] uint8, two codes a byte, low nibble = even k
// (bits = 4), or [n, k] uint8 (bits = 8); scales and offsets are [n, groups] of f.scale_type, or of
// float32 for int8, where int4_unfit_run has to find none: then nothing is rounded either way.
NB_API void int4_pack(const Int4Format& f, const uint8_t* qweight, const void* scales,
                      const void* offsets, uint8_t* packed, const Parallel& parallel);
NB_API void int4_unpack(const Int4Format& f, const uint8_t* packed, uint8_t* qweight, void* scales,
                        void* offsets, const Parallel& parallel);

// The values of `count` 8-bit codes, ascending; their number, or 17 when there are more than 16.
NB_API int int4_palette(const uint8_t* codes, int64_t count, uint8_t* values);

// The first run of `scales` [n, groups] float32 that is not 256 / group int8 multiples of one
// float16, as row * runs + run; -1 when all are.
NB_API int64_t int4_unfit_run(const float* scales, int64_t n, int64_t groups, int64_t group,
                              const Parallel& parallel);

// `scales` [n, groups] as int8 multiples [n, groups] of float16 units [n, groups * group / 256];
// int4_unfit_run has to find no run.
NB_API void int4_factor_scales(const float* scales, int64_t n, int64_t groups, int64_t group,
                               int8_t* multiples, uint16_t* units);

// Rows of the dequantised weight: out[i, :] = w[rows ? rows[i] : i, :] for i < count, rounded to
// `type`.
NB_API void int4_dequantize(const Int4Format& f, const uint8_t* packed, const int64_t* rows,
                            int64_t count, void* out, Dtype type, const Parallel& parallel);

// --- what every kernel file shares ---------------------------------------------------------------

// Writes output row m of a forward call whose input row holds a NaN or an infinity, by the
// arithmetic a dense linear has: NaN anywhere gives NaN; an infinity meets every weight of its
// column (0 * inf = NaN). Kernels that quantise activations call it for such rows, after everything
// else.
void int4_linear_nonfinite_row(const Int4LinearParams& p, int64_t m);
void int4_linear_dx_nonfinite_row(const Int4LinearParams& p, int64_t m);  // of dy

// The kernels each ISA file exports to the table (cpu.cpp); not part of the public surface.
Status int4_linear_scalar(const Int4LinearParams& p);
Status int4_linear_dx_scalar(const Int4LinearParams& p);
Status int4_linear_avx2(const Int4LinearParams& p);
Status int4_linear_avx2_int8(const Int4LinearParams& p);
Status int4_linear_dx_avx2(const Int4LinearParams& p);
Status int4_linear_dx_avx2_int16(const Int4LinearParams& p);
Status int4_linear_dx_avx2_int8(const Int4LinearParams& p);
Status int4_linear_avx512(const Int4LinearParams& p);
Status int4_linear_dx_avx512(const Int4LinearParams& p);
Status int4_linear_avx512_vnni(const Int4LinearParams& p);
Status int4_linear_avx512_vnni_int8(const Int4LinearParams& p);
Status int4_linear_dx_avx512_vnni_int16(const Int4LinearParams& p);
Status int4_linear_dx_avx512_vnni_int8(const Int4LinearParams& p);
Status int4_linear_amx_bf16(const Int4LinearParams& p);
Status int4_linear_amx_int8(const Int4LinearParams& p);
Status int4_linear_dx_amx_bf16(const Int4LinearParams& p);

}  // namespace nibblock
