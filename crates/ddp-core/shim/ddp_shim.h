/* The whole C++ boundary of phalanx-ddp-core. See README.md in this folder for the rules.
 *
 * Every function returns a ddp_status by value: code 0 is success, otherwise `message` holds the
 * NUL-terminated text of the C++ exception. Tensors are `at::Tensor*` as `tch::Tensor::as_ptr` gives them.
 */
#ifndef PHALANX_DDP_SHIM_H
#define PHALANX_DDP_SHIM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DDP_MESSAGE_BYTES 2040

typedef struct {
  int32_t code;
  char message[DDP_MESSAGE_BYTES];
} ddp_status;

/* A callback into Rust: 0 is success; otherwise it has written a NUL-terminated text into `message`,
 * and the shim throws it as a std::runtime_error, which stops the backward. It never unwinds. */
typedef int32_t (*ddp_callback)(void* context, char* message, size_t message_bytes);
/* Called exactly once, when the shim no longer holds `context`. */
typedef void (*ddp_destroy)(void* context);

/* Identity of the variable behind a tensor: equal for shallow clones. */
ddp_status ddp_tensor_identity(const void* tensor, uint64_t* identity);

/* A one-dimensional tensor over memory of ours, on the CPU (`cuda_device` < 0) or on that CUDA device;
 * `destroy(context)` runs when its storage goes. */
ddp_status ddp_tensor_over_memory(void* memory, int64_t len, int32_t scalar_type, int32_t cuda_device,
                                  void* context, ddp_destroy destroy, void** tensor);

/* The handle (cudaStream_t) of this thread's current stream of a CUDA device. */
ddp_status ddp_current_stream(int32_t cuda_device, uint64_t* handle);

/* variable.set_data(data): the variable keeps its identity and its autograd metadata. */
ddp_status ddp_set_data(void* variable, const void* data);

/* Where the gradient of `variable` lies: 0 nowhere (undefined), 1 in the memory of `view`, 2 elsewhere. */
ddp_status ddp_gradient_place(const void* variable, const void* view, int32_t* place);
/* Copies the gradient into `view` and makes `view` the gradient. */
ddp_status ddp_gradient_move(void* variable, const void* view);
/* Makes the gradient undefined. */
ddp_status ddp_gradient_clear(void* variable);

/* Runs `callback` after each accumulation into `variable`'s gradient, until ddp_hook_remove. */
ddp_status ddp_hook_add(void* variable, ddp_callback callback, void* context, ddp_destroy destroy,
                        void** hook);
ddp_status ddp_hook_remove(void* hook);

/* Runs `callback` once at the end of the backward that is running on this thread; must be called from
 * inside a hook. If that backward fails first, only `destroy` runs. */
ddp_status ddp_end_of_backward(ddp_callback callback, void* context, ddp_destroy destroy);

/* at::_fused_adamw_ over `count` tensors; `step` is a scalar f32 tensor; `gradient_divisor` may be null. */
typedef struct {
  double lr;
  double beta1;
  double beta2;
  double weight_decay;
  double eps;
} ddp_adamw_settings;
ddp_status ddp_fused_adamw(void* const* parameters, void* const* gradients, void* const* first_moments,
                           void* const* second_moments, size_t count, const void* step,
                           const void* gradient_divisor, ddp_adamw_settings settings);

/* Autocast of a device type (at::DeviceType: 0 CPU, 1 CUDA) on this thread. */
ddp_status ddp_autocast_get(int32_t device_type, int32_t* enabled, int32_t* scalar_type);
ddp_status ddp_autocast_set(int32_t device_type, int32_t enabled, int32_t scalar_type);
/* Enters (+1) or leaves (-1) an autocast region; leaving the outermost one drops the cast weights. */
ddp_status ddp_autocast_nest(int32_t change);

#ifdef __cplusplus
}
#endif
#endif
