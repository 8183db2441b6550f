// torch glue of decoder_ops for the CPU. Private ops: nn/_lean.py calls them where the shapes are
// known, so they refuse what they do not cover. Stable ABI only.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../glue/check.h"
#include "../glue/int4.h"
#include "decoder_ops.h"

namespace nibblock {
namespace {

using namespace glue;
using Tensors = std::vector<Tensor>;

// t is of x's dtype, on the CPU and contiguous.
void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), op, ": ", name, " must be ",
                  dtype_name(x.scalar_type()), " as x, got ", dtype_name(t.scalar_type()));
  check_cpu(op, name, t);
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous, got strides");
}

// t is all that, and of x's shape.
void check_same(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_like(op, name, t, x);
  STD_TORCH_CHECK(same_shape(t, x), op, ": ", name, " must be ", shape_text(x), ", got ",
                  shape_text(t));
}

template <class Params>
void on_torch_threads(void (*body)(const Params&), Params* p) {
  const Parallel parallel = torch_parallel();
  p->parallel = &parallel;
  body(*p);
}

// Sets the dtype, rows and width of x, [..., width].
template <class Params>
void take_rows(const char* op, const char* name, const Tensor& x, Params* p) {
  p->type = check_float(op, name, x.scalar_type());
  STD_TORCH_CHECK(x.dim() >= 1, op, ": ", name, " must have at least 1 dimension, got a scalar");
  check_like(op, name, x, x);
  p->width = x.size(x.dim() - 1);
  p->rows = p->width > 0 ? x.numel() / p->width : 0;
}

template <class Params>
void take_weight(const char* op, const Tensor& weight, const Tensor& x, Params* p) {
  check_like(op, "weight", weight, x);
  STD_TORCH_CHECK(weight.dim() == 1 && weight.numel() == p->width, op, ": weight must be [",
                  p->width, "], got ", shape_text(weight));
  p->weight = weight.const_data_ptr();
}

// y, and x + delta in `sum` where delta is given.
Tensor norm(const char* op, const Tensor& x, const Tensor* delta, const Tensor& weight, double eps,
            Tensor* sum) {
  AddRmsNormParams p;
  take_rows(op, "x", x, &p);
  take_weight(op, weight, x, &p);
  p.x = x.const_data_ptr();
  p.eps = static_cast<float>(eps);
  p.delta = nullptr;
  p.sum = nullptr;
  if (delta) {
    check_like(op, "delta", *delta, x);
    STD_TORCH_CHECK(delta->numel() == x.numel(), op, ": delta must be ", shape_text(x), ", got ",
                    shape_text(*delta));
    *sum = empty_like_rows(x, p.width);
    p.delta = delta->const_data_ptr();
    p.sum = sum->mutable_data_ptr();
  }
  Tensor y = empty_like_rows(x, p.width);
  p.y = y.mutable_data_ptr();
  on_torch_threads(add_rms_norm, &p);
  return y;
}

Tensor rms_norm_op(const Tensor& x, const Tensor& weight, double eps) {
  return norm("_rms_norm", x, nullptr, weight, eps, nullptr);
}

std::tuple<Tensor, Tensor> add_rms_norm_op(const Tensor& x, const Tensor& delta,
                                           const Tensor& weight, double eps) {
  Tensor sum = x;
  Tensor y = norm("_add_rms_norm", x, &delta, weight, eps, &sum);
  return {sum, y};
}

std::tuple<Tensor, Tensor> rms_norm_grad_op(const Tensor& grad, const Tensor& x,
                                            const Tensor& weight, double eps, bool wants_weight) {
  const char* op = "_rms_norm_grad";
  RmsNormGradParams p;
  take_rows(op, "x", x, &p);
  take_weight(op, weight, x, &p);
  check_same(op, "grad", grad, x);
  p.x = x.const_data_ptr();
  p.dy = grad.const_data_ptr();
  p.eps = static_cast<float>(eps);
  Tensor dx = empty_like_rows(x, p.width);
  p.dx = dx.mutable_data_ptr();
  std::vector<float> sums(wants_weight ? p.chunks() * p.width : 0);
  p.sums = wants_weight ? sums.data() : nullptr;
  on_torch_threads(rms_norm_grad, &p);
  Tensor dweight = empty_like_rows(weight, wants_weight ? p.width : 0);
  if (wants_weight) {
    for (int64_t chunk = 1; chunk < p.chunks(); ++chunk)
      for (int64_t i = 0; i < p.width; ++i) sums[i] += sums[chunk * p.width + i];
    for (int64_t i = 0; i < p.width; ++i)
      store_f32_as(dweight.mutable_data_ptr(), p.type, i, p.rows ? sums[i] : 0.0f);
  }
  return {dx, dweight};
}

// All of a rotation of x, [..., width], but the count of its heads and where the result goes.
RotateParams rotation(const char* op, const char* name, const Tensor& x, const Tensor& cos,
                      const Tensor& sin, bool inverse) {
  RotateParams p;
  p.type = check_float(op, name, x.scalar_type());
  check_like(op, name, x, x);
  check_like(op, "cos", cos, x);
  check_like(op, "sin", sin, x);
  STD_TORCH_CHECK(x.dim() >= 1 && cos.dim() >= 1, op, ": ", name,
                  " and cos must have at least 1 dimension, got a scalar");
  p.x_stride = p.y_stride = x.size(x.dim() - 1);
  p.rows = p.x_stride > 0 ? x.numel() / p.x_stride : 0;
  p.dim = cos.size(cos.dim() - 1);
  p.tables = p.dim > 0 ? cos.numel() / p.dim : 0;
  STD_TORCH_CHECK(p.dim > 0 && p.dim % 2 == 0 && sin.numel() == cos.numel() &&
                      (p.rows == 0 || (p.tables > 0 && p.rows % p.tables == 0)),
                  op, ": cos and sin must be [a divisor of ", p.rows, ", even], got ",
                  shape_text(cos), " and ", shape_text(sin));
  p.x = x.const_data_ptr();
  p.cos = cos.const_data_ptr();
  p.sin = sin.const_data_ptr();
  p.inverse = inverse;
  return p;
}

// x, whole heads, in a tensor of its own.
Tensor rotated_op(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  const char* op = "_rotated";
  RotateParams p = rotation(op, "x", x, cos, sin, inverse);
  p.heads = p.x_stride / p.dim;
  STD_TORCH_CHECK(p.heads * p.dim == p.x_stride, op, ": x must hold whole heads of ", p.dim,
                  ", got ", shape_text(x));
  Tensor y = empty_like_rows(x, p.x_stride);
  p.y = y.mutable_data_ptr();
  on_torch_threads(rotate, &p);
  return y;
}

// silu(gate) * up of two tensors.
Tensor silu_product_op(const Tensor& gate, const Tensor& up) {
  const char* op = "_silu_product";
  SiluMulParams p;
  take_rows(op, "gate", gate, &p);
  check_same(op, "up", up, gate);
  p.stride = p.width;
  Tensor y = empty_like_rows(gate, p.width);
  p.gate = gate.const_data_ptr();
  p.up = up.const_data_ptr();
  p.y = y.mutable_data_ptr();
  on_torch_threads(silu_mul, &p);
  return y;
}

std::tuple<Tensor, Tensor> silu_product_grad_op(const Tensor& grad, const Tensor& gate,
                                                const Tensor& up) {
  const char* op = "_silu_product_grad";
  SiluMulGradParams p;
  take_rows(op, "gate", gate, &p);
  check_same(op, "up", up, gate);
  check_same(op, "grad", grad, gate);
  Tensor dgate = empty_like_rows(gate, p.width), dup = empty_like_rows(gate, p.width);
  p.gate = gate.const_data_ptr();
  p.up = up.const_data_ptr();
  p.dy = grad.const_data_ptr();
  p.dgate = dgate.mutable_data_ptr();
  p.dup = dup.mutable_data_ptr();
  on_torch_threads(silu_mul_grad, &p);
  return {dgate, dup};
}

// Rows of scores become the gradient of their summed cross-entropy; returns the loss of each.
Tensor softmax_grad_op(Tensor scores, const Tensor& labels) {
  const char* op = "_softmax_grad_";
  SoftmaxGradParams p;
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float && scores.dim() == 2, op,
                  ": scores must be float32 [rows, width], got ", dtype_name(scores.scalar_type()),
                  " ", shape_text(scores));
  check_like(op, "scores", scores, scores);
  check_cpu(op, "labels", labels);
  p.rows = scores.size(0);
  p.width = scores.size(1);
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.dim() == 1 &&
                      labels.size(0) == p.rows && labels.is_contiguous(),
                  op, ": labels must be a contiguous int64 [", p.rows, "], got ",
                  dtype_name(labels.scalar_type()), " ", shape_text(labels));
  p.labels = static_cast<const int64_t*>(labels.const_data_ptr());
  for (int64_t r = 0; r < p.rows; ++r) {
    STD_TORCH_CHECK(p.labels[r] >= 0 && p.labels[r] < p.width, op, ": labels must be in [0, ",
                    p.width, "), got ", p.labels[r]);
  }
  const int64_t shape[1] = {p.rows};
  Tensor losses = torch::stable::new_empty(
      scores, torch::headeronly::IntHeaderOnlyArrayRef(shape, 1), ScalarType::Float);
  p.scores = static_cast<float*>(scores.mutable_data_ptr());
  p.losses = static_cast<float*>(losses.mutable_data_ptr());
  on_torch_threads(softmax_grad, &p);
  return losses;
}

// softmax(scale * query key^T) value for one query a sequence. [batch, heads, 1, dim] contiguous,
// which is also [batch, 1, heads * dim].
Tensor attend_op(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  const char* op = "_attend";
  AttendParams p;
  p.type = check_float(op, "query", query.scalar_type());
  STD_TORCH_CHECK(p.type != Dtype::kF16, op, ": query must be float32 or bfloat16, got float16");
  const Tensor* const all[] = {&query, &key, &value};
  const char* const names[] = {"query", "key", "value"};
  const int64_t *sizes[3], *strides[3];  // asked for once: each question costs 10 ns and more
  for (int i = 0; i < 3; ++i) {
    const Tensor& t = *all[i];
    STD_TORCH_CHECK(t.scalar_type() == query.scalar_type(), op, ": ", names[i], " must be ",
                    dtype_name(query.scalar_type()), " as query, got ",
                    dtype_name(t.scalar_type()));
    check_cpu(op, names[i], t);
    STD_TORCH_CHECK(t.dim() == 4, op, ": ", names[i], " must be [batch, heads, length, dim], got ",
                    shape_text(t));
    sizes[i] = t.sizes().data();
    strides[i] = t.strides().data();
    STD_TORCH_CHECK(sizes[i][3] <= 1 || strides[i][3] == 1, op, ": ", names[i],
                    " must be contiguous along its last dimension, got strides");
  }
  const int64_t *q = sizes[0], *k = sizes[1], *v = sizes[2];
  STD_TORCH_CHECK(q[2] == 1 && q[3] % 8 == 0, op,
                  ": query must be [batch, heads, 1, a multiple of 8], got ", shape_text(query));
  STD_TORCH_CHECK(k[0] == q[0] && k[3] == q[3] && k[1] > 0 && q[1] % k[1] == 0 && k[2] > 0, op,
                  ": key must be [", q[0], ", a divisor of ", q[1], ", 1 or more, ", q[3],
                  "], got ", shape_text(key));
  STD_TORCH_CHECK(v[0] == k[0] && v[1] == k[1] && v[2] == k[2] && v[3] == k[3], op,
                  ": value must be ", shape_text(key), " as key, got ", shape_text(value));
  p.batch = q[0], p.heads = q[1], p.kv_heads = k[1], p.keys = k[2], p.dim = k[3];
  for (int i = 0; i < 3; ++i) {
    if (i < 2) p.q_stride[i] = strides[0][i];
    p.k_stride[i] = strides[1][i];
    p.v_stride[i] = strides[2][i];
  }
  p.q = query.const_data_ptr();
  p.k = key.const_data_ptr();
  p.v = value.const_data_ptr();
  p.scale = static_cast<float>(scale);
  Tensor y = empty_like_rows(query, p.dim);
  p.y = y.mutable_data_ptr();
  const Parallel parallel = torch_parallel();
  p.parallel = &parallel;
  STD_TORCH_CHECK(attend(p) == kOk, op, ": out of memory");
  return y;
}

// --- products of a few rows with int4 weights, and what follows them, in one call: a call costs as
// --- long as a small product

using Formats = std::vector<int64_t>;

// The products one after the other, or, of few rows, all in one parallel region: waking the threads
// takes as long as a small layer. A task is some panels of one weight.
void run_products(const char* op, const Int4LinearParams* products, size_t count,
                  const Parallel& parallel) {
  constexpr int64_t kMostRows = 4, kLeastColumns = 64, kWorthThreads = 131072;
  int64_t columns = 0;
  for (size_t i = 0; i < count; ++i) columns += products[i].w.n;
  const Int4LinearParams& first = products[0];
  if (count == 1 || parallel.threads == 1 || first.m > kMostRows ||
      first.m * first.w.k * columns < kWorthThreads) {
    for (size_t i = 0; i < count; ++i)
      check_product(op, int4_linear_run(int4_linear_table(), products[i], nullptr), products[i]);
    return;
  }
  const int64_t width = round_up(ceil_div(columns, 4 * parallel.threads), kLeastColumns);
  std::vector<Int4LinearParams> parts;
  for (size_t i = 0; i < count; ++i) {
    const int64_t panel = int4_geometry(products[i].w).panel_stride, n = products[i].w.n;
    for (int64_t at = 0; at < n; at += width) {
      Int4LinearParams part = products[i];
      part.w.n = n - at < width ? n - at : width;
      part.packed += at / kPanelRows * panel;
      if (part.bias)
        part.bias = static_cast<const char*>(part.bias) + at * dtype_size(part.bias_type);
      part.y = static_cast<char*>(part.y) + at * dtype_size(part.xtype);
      part.parallel = &kSerial;
      parts.push_back(part);
    }
  }
  std::vector<Status> found(parts.size());
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      found[i] = int4_linear_run(int4_linear_table(), parts[i], nullptr);
  };
  parallel_for(parallel, static_cast<int64_t>(parts.size()), run);
  for (size_t i = 0; i < parts.size(); ++i) check_product(op, found[i], parts[i]);
}

// Weights of some layers: packed, biases (one for each, or none) and formats.
struct Weights {
  const char* op;
  const Tensors &packed, &biases;
  const Formats& formats;

  void check() const {
    STD_TORCH_CHECK(formats.size() == packed.size(), op, ": formats must hold ", packed.size(),
                    " as packed, got ", formats.size());
    STD_TORCH_CHECK(biases.empty() || biases.size() == packed.size(), op, ": biases must hold ",
                    packed.size(), " as packed, or none, got ", biases.size());
  }
  int64_t columns(size_t first, size_t last) const {
    int64_t n = 0;
    for (size_t i = first; i < last; ++i) n += decode_format(formats[i]).out_features;
    return n;
  }
};

// x [m, k] times the weights [first, last), side by side in a tensor like `like` but for its last
// dimension.
Tensor side_by_side(const Weights& w, size_t first, size_t last, const Tensor& like, const void* x,
                    int64_t m, int64_t k) {
  const int64_t columns = w.columns(first, last);
  Tensor y = empty_like_rows(like, columns);
  const Parallel parallel = torch_parallel();
  Int4LinearParams p;
  p.xtype = check_float(w.op, "x", like.scalar_type());
  p.m = m;
  p.x = x;
  p.x_stride = k;
  p.y_stride = columns;
  p.parallel = &parallel;
  p.add = nullptr;
  char* to = static_cast<char*>(y.mutable_data_ptr());
  std::vector<Int4LinearParams> products;
  Tensors keep;
  for (size_t i = first; i < last; ++i) {
    const FormatCode f = decode_format(w.formats[i]);
    if (f.out_features == 0) continue;
    Tensor weight = w.packed[i], bias = weight;
    p.w = check_format(w.op, weight, f.out_features, k, f.group_size, f.bits, f.affine,
                       f.scale_dtype);
    p.packed = static_cast<const uint8_t*>(weight.const_data_ptr());
    p.compute = f.int8 ? Compute::kInt8 : Compute::kBF16;
    p.bias = nullptr;
    p.bias_type = Dtype::kF32;
    if (!w.biases.empty()) take_bias(w.op, w.biases[i], f.out_features, &bias, &p);
    p.y = to;
    to += f.out_features * dtype_size(p.xtype);
    products.push_back(p);
    keep.push_back(weight);
    keep.push_back(bias);
  }
  if (y.numel() > 0) run_products(w.op, products.data(), products.size(), parallel);
  return y;
}

// The same of x [..., k].
Tensor side_by_side(const Weights& w, size_t first, size_t last, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1, w.op, ": x must have at least 1 dimension, got a scalar");
  check_float(w.op, "x", x.scalar_type());
  check_like(w.op, "x", x, x);
  const int64_t k = x.size(x.dim() - 1);
  return side_by_side(w, first, last, x, x.const_data_ptr(), k > 0 ? x.numel() / k : 0, k);
}

// The products of siblings with x, or with its norm; with cos and sin their first heads are
// rotated.
Tensor int4_siblings_op(const Tensor& x, const std::optional<Tensor>& norm_weight, double eps,
                        const Tensors& packed, const Tensors& biases, const Formats& formats,
                        const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                        int64_t heads) {
  const Weights w = {"_int4_siblings", packed, biases, formats};
  w.check();
  STD_TORCH_CHECK(!packed.empty(), w.op, ": packed must hold 1 weight or more, got none");
  const Tensor normed = norm_weight ? norm(w.op, x, nullptr, *norm_weight, eps, nullptr) : x;
  Tensor y = side_by_side(w, 0, packed.size(), normed);
  if (!cos || !sin) return y;
  RotateParams p = rotation(w.op, "y", y, *cos, *sin, false);
  p.heads = heads;
  STD_TORCH_CHECK(heads >= 0 && heads * p.dim <= p.y_stride, w.op, ": y must hold ", heads,
                  " heads of ", p.dim, ", got ", shape_text(y));
  p.y = y.mutable_data_ptr();
  on_torch_threads(rotate, &p);
  return y;
}

// down(silu(gate(x)) * up(x)) of the weights [first, first + 3).
Tensor mlp(const Weights& w, size_t first, const Tensor& x) {
  const Tensor t = side_by_side(w, first, first + 2, x);
  SiluMulParams p;
  take_rows(w.op, "x", t, &p);
  p.stride = p.width;
  p.width = w.columns(first, first + 1);
  STD_TORCH_CHECK(2 * p.width == p.stride, w.op, ": gate and up must have as many columns, got ",
                  p.width, " and ", p.stride - p.width);
  Tensor hidden = empty_like_rows(t, p.width);
  const char* data = static_cast<const char*>(t.const_data_ptr());
  p.gate = data;
  p.up = data + p.width * dtype_size(p.type);
  p.y = hidden.mutable_data_ptr();
  on_torch_threads(silu_mul, &p);
  return side_by_side(w, first + 2, first + 3, hidden);
}

Tensor int4_mlp_op(const Tensor& x, const Tensors& packed, const Tensors& biases,
                   const Formats& formats) {
  const Weights w = {"_int4_mlp", packed, biases, formats};
  w.check();
  STD_TORCH_CHECK(packed.size() == 3, w.op, ": packed must hold gate, up and down, got ",
                  packed.size(), " weights");
  return mlp(w, 0, x);
}

// All of a decoder layer behind its rotated heads, for one token a sequence: h = hidden +
// o(attend(query, key, value)), then h + mlp(norm(h)). Weights: o, gate, up, down.
Tensor int4_layer_end_op(const Tensor& query, const Tensor& key, const Tensor& value, double scale,
                         const Tensor& hidden, const Tensor& norm_weight, double eps,
                         const Tensors& packed, const Tensors& biases, const Formats& formats) {
  const Weights w = {"_int4_layer_end", packed, biases, formats};
  w.check();
  STD_TORCH_CHECK(packed.size() == 4, w.op, ": packed must hold o, gate, up and down, got ",
                  packed.size(), " weights");
  const Tensor heads = attend_op(query, key, value, scale);
  const int64_t m = heads.size(0), k = heads.size(1) * heads.size(3);
  check_like(w.op, "hidden", hidden, heads);
  const int64_t width = hidden.dim() > 0 ? hidden.size(hidden.dim() - 1) : 0;
  STD_TORCH_CHECK(hidden.numel() == m * width && w.columns(0, 1) == width &&
                      w.columns(3, 4) == width,
                  w.op, ": hidden must be ", m, " rows of the ", w.columns(0, 1), " and ",
                  w.columns(3, 4), " columns of o and down, got ", shape_text(hidden));
  const Tensor delta = side_by_side(w, 0, 1, hidden, heads.const_data_ptr(), m, k);
  Tensor sum = hidden;
  const Tensor normed = norm(w.op, hidden, &delta, norm_weight, eps, &sum);
  Tensor out = mlp(w, 1, normed);
  const Dtype type = check_float(w.op, "hidden", hidden.scalar_type());
  const void* from = sum.const_data_ptr();
  void* to = out.mutable_data_ptr();
  for (int64_t i = 0; i < m * width; ++i)
    store_f32_as(to, type, i, load_as_f32(from, type, i) + load_as_f32(to, type, i));
  return out;
}

}  // namespace
}  // namespace nibblock

STABLE_TORCH_LIBRARY_IMPL(nibblock, CPU, m) {
  m.impl("_rms_norm", TORCH_BOX(&nibblock::rms_norm_op));
  m.impl("_rms_norm_forward", TORCH_BOX(&nibblock::rms_norm_op));
  m.impl("_rms_norm_grad", TORCH_BOX(&nibblock::rms_norm_grad_op));
  m.impl("_add_rms_norm", TORCH_BOX(&nibblock::add_rms_norm_op));
  m.impl("_rotated", TORCH_BOX(&nibblock::rotated_op));
  m.impl("_rotated_forward", TORCH_BOX(&nibblock::rotated_op));
  m.impl("_silu_product", TORCH_BOX(&nibblock::silu_product_op));
  m.impl("_silu_product_forward", TORCH_BOX(&nibblock::silu_product_op));
  m.impl("_silu_product_grad", TORCH_BOX(&nibblock::silu_product_grad_op));
  m.impl("_softmax_grad_", TORCH_BOX(&nibblock::softmax_grad_op));
  m.impl("_int4_siblings", TORCH_BOX(&nibblock::int4_siblings_op));
  m.impl("_int4_layer_end", TORCH_BOX(&nibblock::int4_layer_end_op));
  m.impl("_int4_mlp", TORCH_BOX(&nibblock::int4_mlp_op));
  m.impl("_attend", TORCH_BOX(&nibblock::attend_op));
}
