// The tile kernels for bfloat16 activations and codes of 8 bits.
#include "cuda_tile_kernels.cuh"

namespace nibblock {
namespace cuda {

TileKernels tile_kernels_bf16_8() { return tile_kernels<BFloat16, 8>(); }

}  // namespace cuda
}  // namespace nibblock
