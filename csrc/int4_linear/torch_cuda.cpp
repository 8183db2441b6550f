// torch glue of int4_linear for CUDA devices: checks, tensors -> params, workspace from torch's
// allocator, launch on torch's current stream. Stable ABI only.
//
// The op has a name of its own: `int4_linear` on CUDA tensors belongs to the backend that chooses
// between Triton and these kernels (python/nibblock/ops), which calls it where a committed
// measurement says so. Its schema stands here because it exists only where this library is loaded.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <vector>

#include "../block_sparse_linear/block_sparse_linear.h"
#include "../glue/cuda.h"
#include "../glue/int4.h"
#include "cuda.h"

namespace nibblock {
namespace {

using namespace glue;

constexpr const char* kOp = "int4_linear";

void check_status(Status s, const Int4CudaParams& p, const Int4CudaPlan& plan,
                  const std::string& kernel) {
  const Int4CudaTable table = int4_linear_cuda_table();
  for (int i = 0; i < table.count; ++i) {
    const Int4CudaKernel& row = table.rows[i];
    if (kernel != row.id || !row.sm90a) continue;
    STD_TORCH_CHECK(s != kNotServed, kOp, ": ", kernel, " serves ", row.serves_text, ", got ", p.m,
                    " rows of x; use the Triton backend");
    STD_TORCH_CHECK(s != kOtherDevice && s != kDeviceTooOld, kOp, ": ", kernel,
                    " must have a GPU of compute capability 9.0, got ", plan.capability / 10, ".",
                    plan.capability % 10, "; use the Triton backend");
  }
  STD_TORCH_CHECK(
      s != kNotServed || p.w.group != 16, kOp,
      ": group_size must be at least 32 for a CUDA kernel, got 16; use the Triton backend");
  STD_TORCH_CHECK(s != kNotServed, kOp, ": no CUDA kernel ", kernel, " for ", p.m,
                  " rows of x on this GPU: 1 to ", cuda::kMaxRowsOfX,
                  " rows of bfloat16 or float16 are served; use the Triton backend");
  check_cuda_status(kOp, s, kernel, plan.device_error,
                    int4_linear_cuda_error_text(plan.device_error));
  STD_TORCH_CHECK(s == kOk, kOp, ": internal error ", static_cast<int>(s), " (m=", p.m,
                  ", n=", p.w.n, ", k=", p.w.k, ")");
}

Tensor int4_linear_cuda_op(const Tensor& x, Tensor packed, const std::optional<Tensor>& bias,
                           int64_t format, std::optional<Tensor> values,
                           std::optional<Tensor> layout, int64_t block, const Text& kernel) {
  Int4CudaParams p = {};
  STD_TORCH_CHECK(x.dim() >= 1, kOp, ": x must have at least 1 dimension, got a scalar");
  p.xtype = check_float(kOp, "x", x.scalar_type());
  check_cuda(kOp, "x", x);
  const int32_t device = x.get_device_index();
  const FormatCode f = decode_format(format);
  STD_TORCH_CHECK(!f.int8, kOp, ": compute must be \"bf16\" on a GPU, got \"int8\"");
  p.w = check_format(kOp, packed, f.out_features, x.size(x.dim() - 1), f.group_size, f.bits,
                     f.affine, f.scale_dtype, check_cuda);
  check_beside_x(kOp, "packed", packed, device);
  Tensor keep_bias = packed;
  if (bias) {
    p.bias_type = check_float(kOp, "bias", bias->scalar_type());
    check_beside_x(kOp, "bias", *bias, device);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == p.w.n, kOp, ": bias must be [", p.w.n,
                    "], got ", shape_text(*bias));
    keep_bias = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
    p.bias = keep_bias.const_data_ptr();
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  STD_TORCH_CHECK(values.has_value() == layout.has_value(), kOp,
                  ": values and layout must come together, got one of them");
  // An adapter without blocks has no values to point at, and adds nothing.
  if (values && values->numel() > 0) {
    p.value_type = check_float(kOp, "values", values->scalar_type());
    check_beside_x(kOp, "values", *values, device);
    check_beside_x(kOp, "layout", *layout, device);
    STD_TORCH_CHECK(block == 32 || block == 64 || block == 128, kOp,
                    ": block must be 32, 64 or 128 on a GPU, got ", block);
    const int64_t z = values->dim() == 3 ? values->size(0) : -1;
    STD_TORCH_CHECK(z >= 0 && values->size(1) == block && values->size(2) == block, kOp,
                    ": values must be [Z, ", block, ", ", block, "], got ", shape_text(*values));
    const int64_t size = block_layout_size(p.w.n, p.w.k, block, z);
    STD_TORCH_CHECK(layout->scalar_type() == ScalarType::Int && layout->dim() == 1 &&
                        layout->numel() == size,
                    kOp, ": layout must be int32 [", size, "], got ", shape_text(*layout),
                    "; build it with block_layout()");
    STD_TORCH_CHECK(p.w.bits == 4, kOp, ": bits must be 4 beside an adapter, got ", p.w.bits);
    if (!layout->is_contiguous()) layout = torch::stable::contiguous(*layout);
    if (!values->is_contiguous()) values = torch::stable::contiguous(*values);
    if (reinterpret_cast<uintptr_t>(values->const_data_ptr()) % 16 != 0) {
      values = torch::stable::clone(*values);
    }
    // What the layout holds is on the device: it was checked where it was built.
    const BlockLayout s =
        block_layout(static_cast<const int32_t*>(layout->const_data_ptr()), p.w.n, p.w.k, block, z);
    p.values = values->const_data_ptr();
    p.row_ptr = s.row_ptr;
    p.col = s.col;
    p.block = block;
  }
  // A blob is 64-byte aligned where this package makes it; a view into another buffer may not be.
  if (reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 != 0) {
    packed = torch::stable::clone(packed);
  }
  Tensor keep = packed;
  const Rows rows = as_rows(x, &keep);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  shape.push_back(p.w.n);
  const auto sized = [](const std::vector<int64_t>& s) {
    return torch::headeronly::IntHeaderOnlyArrayRef(s.data(), s.size());
  };
  Tensor y = torch::stable::new_empty(x, sized(shape));
  if (y.numel() == 0) return y;
  p.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  p.m = rows.count;
  p.x = rows.data;
  p.x_stride = rows.stride;
  p.y = y.mutable_data_ptr();
  p.y_stride = p.w.n;
  Int4CudaPlan plan;
  const char* forced = kernel.empty() ? nullptr : kernel.c_str();
  check_status(int4_linear_cuda_plan(p, forced, &plan), p, plan, kernel);
  void* const stream = current_stream(device);
  unsigned long long capture = 0;
  if (!int4_linear_cuda_capture(stream, &capture, &plan.device_error)) {
    check_status(kDeviceError, p, plan, kernel);
  }
  const std::vector<int64_t> partial_shape = {plan.partial_bytes};
  const Tensor partials = torch::stable::new_empty(packed, sized(partial_shape));
  const Tensor counters = zero_counters(packed, plan.counters, device, stream, capture);
  check_status(int4_linear_cuda_run(p, &plan, partials.mutable_data_ptr(),
                                    static_cast<int32_t*>(counters.mutable_data_ptr()), stream),
               p, plan, kernel);
  return y;
}

}  // namespace
}  // namespace nibblock

STABLE_TORCH_LIBRARY_FRAGMENT(nibblock, m) {
  m.def("_int4_linear_cuda(Tensor x, Tensor packed, Tensor? bias, int format, Tensor? values, "
        "Tensor? layout, int block, str kernel) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(nibblock, CUDA, m) {
  m.impl("_int4_linear_cuda", TORCH_BOX(&nibblock::int4_linear_cuda_op));
}
