// The decode kernels for float16 activations and codes of 4 bits.
#include "cuda_kernels.cuh"

namespace nibblock {
namespace cuda {

DecodeKernels decode_kernels_f16_4() { return decode_kernels<Float16, 4>(); }

}  // namespace cuda
}  // namespace nibblock
