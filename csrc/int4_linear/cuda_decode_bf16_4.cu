// The decode kernels for bfloat16 activations and codes of 4 bits.
#include "cuda_kernels.cuh"

namespace nibblock {
namespace cuda {

DecodeKernels decode_kernels_bf16_4() { return decode_kernels<BFloat16, 4>(); }

}  // namespace cuda
}  // namespace nibblock
