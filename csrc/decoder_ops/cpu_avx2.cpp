#include "cpu_bodies.h"

namespace nibblock {

DecoderBodies decoder_bodies_avx2() { return bodies(); }

}  // namespace nibblock
