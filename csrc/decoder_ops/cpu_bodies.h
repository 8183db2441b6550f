// All bodies of decoder_ops, for the instruction set of the file that includes this.
#pragma once

#include "cpu_attend.h"
#include "cpu_layer.h"
#include "cpu_loss.h"

namespace nibblock {
namespace {

DecoderBodies bodies() {
  return {
      [](const AddRmsNormParams& p) {
        by_type(p, add_rms_norm_as<F32>, add_rms_norm_as<BF16>, add_rms_norm_as<F16>);
      },
      [](const RmsNormGradParams& p) {
        by_type(p, rms_norm_grad_as<F32>, rms_norm_grad_as<BF16>, rms_norm_grad_as<F16>);
      },
      [](const RotateParams& p) { by_type(p, rotate_as<F32>, rotate_as<BF16>, rotate_as<F16>); },
      [](const SiluMulParams& p) {
        by_type(p, silu_mul_as<F32>, silu_mul_as<BF16>, silu_mul_as<F16>);
      },
      [](const SiluMulGradParams& p) {
        by_type(p, silu_mul_grad_as<F32>, silu_mul_grad_as<BF16>, silu_mul_grad_as<F16>);
      },
      softmax_grad_rows,
      attend_any,
  };
}

}  // namespace
}  // namespace nibblock
