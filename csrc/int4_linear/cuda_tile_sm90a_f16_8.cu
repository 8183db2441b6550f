// The tile kernels for float16 activations and codes of 8 bits.
#include "cuda_tile_kernels.cuh"

namespace nibblock {
namespace cuda {

TileKernels tile_kernels_f16_8() { return tile_kernels<Float16, 8>(); }

}  // namespace cuda
}  // namespace nibblock
