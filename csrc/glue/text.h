// A str argument of an op.
//
// torch's own conversion of the stable ABI (ToImpl<std::string> of torch 2.13) copies the text to
// the heap and never frees it: 32 bytes a call, which besides lie between larger blocks, so that
// glibc cannot join those when they are freed. A backward took new memory for every result.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

namespace nibblock {
namespace glue {

struct Text : std::string {
  using std::string::string;
};

}  // namespace glue
}  // namespace nibblock

namespace torch {
namespace stable {
namespace detail {

template <>
struct ToImpl<nibblock::glue::Text> {
  static nibblock::glue::Text call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);  // ours to delete
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    nibblock::glue::Text text(data, length);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

}  // namespace detail
}  // namespace stable
}  // namespace torch
