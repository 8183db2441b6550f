// The decode kernels for float16 activations and codes of 8 bits.
#include "cuda_kernels.cuh"

namespace nibblock {
namespace cuda {

DecodeKernels decode_kernels_f16_8() { return decode_kernels<Float16, 8>(); }

}  // namespace cuda
}  // namespace nibblock
