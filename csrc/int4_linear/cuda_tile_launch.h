// From a planned call to the launches of a tile kernel (cuda_tile.h). Host code.
#pragma once

#include "cuda.h"
#include "cuda_tile.h"
#include "cuda_tile_kernels.cuh"

namespace nibblock {
namespace cuda {

// Asks for the sums of x, if the weight is affine, then for the product; on the given stream.
// Returns CUDA's own code. `workspace` is plan.partial_bytes.
int launch_tile(const Int4CudaParams& p, const Int4CudaPlan& plan, const TileKernel& kernel,
                const void* x_sums, void* workspace, int32_t* counters, void* stream);

}  // namespace cuda
}  // namespace nibblock
