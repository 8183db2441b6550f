// The tile kernels for float16 activations and codes of 4 bits.
#include "cuda_tile_kernels.cuh"

namespace nibblock {
namespace cuda {

TileKernels tile_kernels_f16_4() { return tile_kernels<Float16, 4>(); }

}  // namespace cuda
}  // namespace nibblock
