#include "workspace.h"

#include <stdlib.h>

namespace nibblock {
namespace {

constexpr int kSlots = 8;  // that a thread holds at most; kernels nest two or three
constexpr int64_t kKept = int64_t{32} << 20;  // bytes that a thread keeps at most

struct Slot {
  void* memory;
  int64_t bytes;
  bool taken;
};

struct Slots {
  Slot at[kSlots] = {};
  int64_t kept = 0;

  ~Slots() {
    for (Slot& slot : at) {
      if (!slot.taken) drop(&slot);
    }
  }
  void drop(Slot* slot) {
    free(slot->memory);
    kept -= slot->bytes;
    slot->memory = nullptr;
    slot->bytes = 0;
  }
};

thread_local Slots slots;

void* fresh(int64_t bytes) {
  void* memory = nullptr;
  return posix_memalign(&memory, 64, static_cast<size_t>(bytes)) == 0 ? memory : nullptr;
}

}  // namespace

void* workspace_take(int64_t bytes) {
  bytes = ((bytes > 0 ? bytes : 1) + 63) / 64 * 64;
  // The smallest that is large enough; else the largest of the free ones makes way for a new one,
  // so that slots do not fill up with sizes that nobody asks for again.
  Slot *fit = nullptr, *other = nullptr;
  for (Slot& slot : slots.at) {
    if (slot.taken) continue;
    if (slot.bytes >= bytes) {
      if (!fit || slot.bytes < fit->bytes) fit = &slot;
    } else if (!other || slot.bytes > other->bytes) {
      other = &slot;
    }
  }
  if (!fit && other) {
    slots.drop(other);
    if (slots.kept + bytes <= kKept) {
      other->memory = fresh(bytes);
      if (!other->memory) return nullptr;
      other->bytes = bytes;
      slots.kept += bytes;
      fit = other;
    }
  }
  if (!fit) return fresh(bytes);
  fit->taken = true;
  return fit->memory;
}

void workspace_give(void* memory) {
  if (!memory) return;
  for (Slot& slot : slots.at) {
    if (slot.memory != memory) continue;
    slot.taken = false;
    return;
  }
  free(memory);
}

}  // namespace nibblock
