// Every kernel and launcher returns a Status; none of them throws, prints or aborts. The callers
// turn a status into a message (csrc/glue for torch, csrc/native for NumPy), because only they know
// the names of the arguments the user gave.
#pragma once

#define NB_API __attribute__((visibility("default")))

namespace nibblock {

enum Status : int {
  kOk = 0,
  kNoKernel = 1,        // no row of the table serves this call at the active ISA level
  kUnknownKernel = 2,   // a forced kernel id is not in the table
  kIsaUnavailable = 3,  // a forced kernel needs an ISA level above the active one
  kNotServed = 4,     // a forced kernel exists and can run here but does not serve these parameters
  kOutOfMemory = 5,   // the workspace could not be allocated
  kDeviceTooOld = 6,  // the GPU is older than every kernel that was built
  kDeviceError = 7,   // the GPU's driver or runtime refused; its own code comes with it
  kOtherDevice = 8,   // a forced kernel was built for another compute capability than the GPU's
};

}  // namespace nibblock
