// The decode kernels for bfloat16 activations and codes of 8 bits.
#include "cuda_kernels.cuh"

namespace nibblock {
namespace cuda {

DecodeKernels decode_kernels_bf16_8() { return decode_kernels<BFloat16, 8>(); }

}  // namespace cuda
}  // namespace nibblock
