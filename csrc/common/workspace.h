// Memory that kernels work in, kept by each thread from one call to the next.
//
// A layer's call needs a few hundred KiB to some MiB for a moment. From malloc, blocks of that size
// come from the end of the heap and go back to the system when they are freed: the next call gets
// pages that the kernel has to find and clear again, which took a fifth of the time of a language
// model's head in training. Kept, they are also still in the caches.
#pragma once

#include <stdint.h>

namespace nibblock {

// At least `bytes` bytes at a multiple of 64, of any content; null when memory is short.
void* workspace_take(int64_t bytes);

// Gives back what the same thread took; null is nothing.
void workspace_give(void* memory);

}  // namespace nibblock
