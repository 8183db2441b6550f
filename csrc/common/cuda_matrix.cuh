// Tensor core operands out of shared memory: ldmatrix with transposition, for the GPU and for the
// software model of cuda_emulation.h.
//
// Source: NVIDIA's PTX ISA manual, section ldmatrix; from sm_75 on.
#pragma once

#include "cuda_common.cuh"

namespace nibblock {
namespace cuda {

#ifdef NIBBLOCK_EMULATE_CUDA

namespace emulation {
struct MatrixRow {  // what a lane brings, and where its results go
  const uint8_t* row;
  uint32_t* out;
};
inline std::vector<MatrixRow>& matrix_rows() {
  static std::vector<MatrixRow> rows;
  return rows;
}
}  // namespace emulation

inline void load_transposed(const uint8_t* row, uint32_t (&out)[4]) {
  emulation::Machine& m = emulation::machine();
  emulation::Warp& warp = m.warps[m.current / 32];
  const int place = emulation::place_of(row, 16, 16);
  emulation::note_read(place, 16);
  emulation::self().loads.push_back({place, 16});
  std::vector<emulation::MatrixRow>& rows = emulation::matrix_rows();
  if (rows.size() < m.threads.size()) rows.resize(m.threads.size());
  rows[m.current] = {row, out};
  const int generation = warp.generation;
  if (++warp.arrived == 32) {
    const emulation::MatrixRow* const lane = &rows[m.current / 32 * 32];
    for (int l = 0; l < 32; ++l) {
      const int g = l >> 2, t = l & 3;
      for (int j = 0; j < 4; ++j) {
        uint16_t low, high;
        memcpy(&low, lane[8 * j + 2 * t].row + 2 * g, 2);
        memcpy(&high, lane[8 * j + 2 * t + 1].row + 2 * g, 2);
        lane[l].out[j] = low | static_cast<uint32_t>(high) << 16;
      }
    }
    warp.arrived = 0;
    ++warp.generation;
  }
  while (warp.generation == generation) emulation::give_way();
  emulation::machine().moved = true;
}

#else

// Four 8 x 8 matrices of 16-bit values: lanes 8j .. 8j + 7 bring the addresses of the 8 rows of
// matrix j, 16 bytes each. Lane 4g + t gets of matrix j column g, rows 2t and 2t + 1.
NB_DEVICE void load_transposed(const uint8_t* row, uint32_t (&out)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

#endif

}  // namespace cuda
}  // namespace nibblock
