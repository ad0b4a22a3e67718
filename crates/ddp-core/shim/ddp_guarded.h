// What the files of the shim share: the one catch, and tensors as Rust gives them. Rules in README.md.
#ifndef PHALANX_DDP_GUARDED_H
#define PHALANX_DDP_GUARDED_H

#include "ddp_shim.h"

#include <cstring>
#include <exception>

#include <ATen/core/Tensor.h>

namespace phalanx {

inline ddp_status failure(const char* text) {
  ddp_status status;
  status.code = 1;
  std::strncpy(status.message, text, DDP_MESSAGE_BYTES - 1);
  status.message[DDP_MESSAGE_BYTES - 1] = '\0';
  return status;
}

// The only catch of the boundary: nothing but plain values leaves.
template <typename Body>
ddp_status guarded(Body&& body) noexcept {
  try {
    body();
    ddp_status status;
    status.code = 0;
    status.message[0] = '\0';
    return status;
  } catch (const std::exception& error) {
    return failure(error.what());
  } catch (...) {
    return failure("an exception that is not a std::exception");
  }
}

inline const at::Tensor& tensor_at(const void* pointer) {
  return *static_cast<const at::Tensor*>(pointer);
}

}  // namespace phalanx

#endif
