// The tile kernels for bfloat16 activations and codes of 4 bits.
#include "cuda_tile_kernels.cuh"

namespace nibblock {
namespace cuda {

TileKernels tile_kernels_bf16_4() { return tile_kernels<BFloat16, 4>(); }

}  // namespace cuda
}  // namespace nibblock
