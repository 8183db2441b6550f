// torch glue of block_weight_grad for CUDA devices: checks, tensors -> params, workspace from
// torch's allocator, launch on torch's current stream. Stable ABI only.
//
// The op has a name of its own: `block_weight_grad` on CUDA tensors belongs to the backend that
// chooses between Triton and these kernels. What the layout holds is on the device and was checked
// where it was built; whatever it holds, the kernel stays inside its buffers.
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "../glue/cuda.h"
#include "block_sparse_linear.h"
#include "cuda.h"

namespace nibblock {
namespace {

using namespace glue;

constexpr const char* kOp = "block_weight_grad";

void check_status(Status s, const WeightGradCudaParams& p, const WeightGradCudaPlan& plan,
                  const std::string& kernel) {
  STD_TORCH_CHECK(s != kNotServed, kOp, ": no CUDA kernel ", kernel, " for blocks of ", p.block,
                  " of ", p.gtype == Dtype::kF32 ? "float32" : "16-bit",
                  " operands: blocks of 32, 64 or 128 of bfloat16 or float16 are served; use the "
                  "Triton backend");
  check_cuda_status(kOp, s, kernel, plan.device_error,
                    weight_grad_cuda_error_text(plan.device_error));
  STD_TORCH_CHECK(s == kOk, kOp, ": internal error ", static_cast<int>(s), " (m=", p.m, ", n=", p.n,
                  ", k=", p.k, ", block=", p.block, ", blocks=", p.count, ")");
}

Tensor block_weight_grad_cuda_op(const Tensor& grad, const Tensor& x, Tensor layout, int64_t block,
                                 ScalarType dtype, const Text& kernel) {
  WeightGradCudaParams p = {};
  STD_TORCH_CHECK(x.dim() >= 1, kOp, ": x must have at least 1 dimension, got a scalar");
  p.gtype = check_float(kOp, "x", x.scalar_type());
  check_cuda(kOp, "x", x);
  const int32_t device = x.get_device_index();
  check_beside_x(kOp, "grad", grad, device);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), kOp, ": grad must be ",
                  dtype_name(x.scalar_type()), " as x, got ", dtype_name(grad.scalar_type()));
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == x.scalar_type(), kOp,
                  ": dtype must be float32 or ", dtype_name(x.scalar_type()), ", got ",
                  dtype_name(dtype));
  p.out_type = check_float(kOp, "dtype", dtype);
  bool same = grad.dim() == x.dim();
  for (int64_t i = 0; same && i + 1 < x.dim(); ++i) same = grad.size(i) == x.size(i);
  STD_TORCH_CHECK(same, kOp, ": grad must have the leading dimensions of x, ", shape_text(x),
                  ", got ", shape_text(grad));
  STD_TORCH_CHECK(block == 16 || block == 32 || block == 64 || block == 128, kOp,
                  ": block must be 16, 32, 64 or 128, got ", block);
  p.n = grad.size(grad.dim() - 1);
  p.k = x.size(x.dim() - 1);
  p.block = block;
  check_beside_x(kOp, "layout", layout, device);
  const int64_t least = block_layout_size(p.n, p.k, block, 0);
  p.count = (layout.numel() - least) / 3;
  STD_TORCH_CHECK(layout.scalar_type() == ScalarType::Int && layout.dim() == 1 && p.count >= 0 &&
                      layout.numel() == block_layout_size(p.n, p.k, block, p.count),
                  kOp, ": layout must be int32 [", least, " + 3 Z] for out_features=", p.n,
                  ", in_features=", p.k, ", block=", block, ", got ", shape_text(layout),
                  "; build it with block_layout()");
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (!layout.is_contiguous()) layout = torch::stable::contiguous(layout);
  const BlockLayout s =
      block_layout(static_cast<const int32_t*>(layout.const_data_ptr()), p.n, p.k, block, p.count);
  p.row_ptr = s.row_ptr;
  p.col = s.col;
  const auto sized = [](const std::vector<int64_t>& shape) {
    return torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size());
  };
  const std::vector<int64_t> shape = {p.count, block, block};
  Tensor out = torch::stable::new_empty(x, sized(shape), dtype);
  if (p.count == 0) return out;
  Tensor keep_g = grad, keep_x = x;
  const Rows g = as_rows(grad, &keep_g), rows = as_rows(x, &keep_x);
  p.m = rows.count;
  p.g = g.data;
  p.g_stride = g.stride;
  p.x = rows.data;
  p.x_stride = rows.stride;
  p.out = out.mutable_data_ptr();
  WeightGradCudaPlan plan;
  check_status(weight_grad_cuda_plan(p, kernel.empty() ? nullptr : kernel.c_str(), &plan), p, plan,
               kernel);
  void* const stream = current_stream(device);
  Tensor partials = layout, counters = layout;
  if (plan.counters > 0) {
    unsigned long long capture = 0;
    if (!weight_grad_cuda_capture(stream, &capture, &plan.device_error)) {
      check_status(kDeviceError, p, plan, kernel);
    }
    const std::vector<int64_t> partial_shape = {plan.partial_bytes};
    partials = torch::stable::new_empty(layout, sized(partial_shape), ScalarType::Byte);
    counters = zero_counters(layout, plan.counters, device, stream, capture);
  }
  check_status(weight_grad_cuda_run(
                   p, &plan, plan.counters ? partials.mutable_data_ptr() : nullptr,
                   plan.counters ? static_cast<int32_t*>(counters.mutable_data_ptr()) : nullptr,
                   stream),
               p, plan, kernel);
  return out;
}

}  // namespace
}  // namespace nibblock

STABLE_TORCH_LIBRARY_FRAGMENT(nibblock, m) {
  m.def("_block_weight_grad_cuda(Tensor grad, Tensor x, Tensor layout, int block, "
        "ScalarType dtype, str kernel) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(nibblock, CUDA, m) {
  m.impl("_block_weight_grad_cuda", TORCH_BOX(&nibblock::block_weight_grad_cuda_op));
}
