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

/* A shell: a one-dimensional tensor whose memory comes and goes. All views of it see what it has: nothing at first,
 * after ddp_shell_attach `memory`, which must hold its elements until another memory, or none (null), is attached. */
ddp_status ddp_shell_new(int64_t len, int32_t scalar_type, int32_t cuda_device, uint64_t token, void** tensor);
ddp_status ddp_shell_attach(void* shell, void* memory);
/* From here on every access to the shell's memory, which is none, throws `message`. */
ddp_status ddp_shell_fail(void* shell, const char* message);

/* Calls `callback` before an operation on this thread, or on one that runs this thread's backward, that takes a shell
 * without memory: with the tokens of all shells that it takes, in the order of its arguments. It cannot stop the operation. */
typedef void (*ddp_access)(const uint64_t* tokens, size_t count);
ddp_status ddp_access_add(ddp_access callback, uint64_t* handle);
ddp_status ddp_access_remove(uint64_t handle);

/* The handle (cudaStream_t) of this thread's current stream of a CUDA device. */
ddp_status ddp_current_stream(int32_t cuda_device, uint64_t* handle);

/* variable.set_data(data): the variable keeps its identity and its autograd metadata. */
ddp_status ddp_set_data(void* variable, const void* data);

/* What a variable is at this moment. */
typedef struct {
  uint64_t data;          /* address of its first element; of a shell's, what stays the same */
  uint32_t version;       /* counts changes in place */
  int32_t requires_grad;  /* 0 or 1 */
  int32_t scalar_type;    /* c10::ScalarType */
  int32_t cuda_device;    /* -1: on the CPU */
  int32_t has_gradient;   /* 0 or 1 */
} ddp_variable;
ddp_status ddp_variables(void* const* variables, size_t count, ddp_variable* states);

/* Where the gradient of a variable lies, compared with `view`: 0 nowhere (undefined), 1 in the memory of
 * `view`, 2 elsewhere, 3 elsewhere with the kind and the strides of `view`, 4 sparse. `data` is its first
 * element where it is 3. */
typedef struct {
  const void* data;
  int32_t place;
} ddp_gradient;
ddp_status ddp_gradient_of(const void* variable, const void* view, ddp_gradient* gradient);
/* Copies the gradient, dense or sparse, of any kind, into `view` and makes `view` the gradient. */
ddp_status ddp_gradient_move(void* variable, const void* view);
/* Makes `gradient` the gradient; null makes it undefined. */
ddp_status ddp_gradient_set(void* variable, const void* gradient);

/* Copies `values` into `tensor` without counting it as a change: graphs that have saved the tensor stay
 * good, as they do when a kernel updates running statistics. */
ddp_status ddp_write(void* tensor, const void* values);

/* Runs `callback` after each accumulation into `variable`'s gradient, until ddp_hook_remove. The hook is
 * the variable's own: freezing the variable or giving it other data does not remove it. */
ddp_status ddp_hook_add(void* variable, ddp_callback callback, void* context, ddp_destroy destroy,
                        void** hook);
ddp_status ddp_hook_remove(void* hook);

/* Runs `callback` on this thread whenever a backward comes to run its first node here, or comes back from
 * one that it contains. It cannot stop that backward. */
typedef void (*ddp_witness)(void);
ddp_status ddp_witness_add(ddp_witness callback, uint64_t* handle);
ddp_status ddp_witness_remove(uint64_t handle);

/* used[i] = 1 where the graph below the node that is running now reaches `variables[i]`; only from inside
 * a witness or a hook. */
ddp_status ddp_graph_reaches(void* const* variables, size_t count, uint8_t* used);

/* Runs `callback` once at the end of the backward that is running on this thread; must be called from
 * inside a hook. If that backward fails first, only `destroy` runs. */
ddp_status ddp_end_of_backward(ddp_callback callback, void* context, ddp_destroy destroy);

/* at::_fused_adamw_, or with `decoupled` 0 at::_fused_adam_, over `count` tensors; `step` is a scalar f32
 * tensor; gradients are divided by `gradient_divisor`, which may be null, in place. */
typedef struct {
  double lr;
  double beta1;
  double beta2;
  double weight_decay;
  double eps;
  int32_t decoupled;
} ddp_adam_settings;
ddp_status ddp_fused_adam(void* const* parameters, void* const* gradients, void* const* first_moments,
                          void* const* second_moments, size_t count, const void* step,
                          const void* gradient_divisor, ddp_adam_settings settings);

/* at::_fused_sgd_; `momenta` is not read where `momentum` is 0. */
typedef struct {
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  int32_t nesterov;
  int32_t first_step;
} ddp_sgd_settings;
ddp_status ddp_fused_sgd(void* const* parameters, void* const* gradients, void* const* momenta,
                         size_t count, const void* gradient_divisor, ddp_sgd_settings settings);

/* Autocast of a device type (at::DeviceType: 0 CPU, 1 CUDA) on this thread. */
ddp_status ddp_autocast_get(int32_t device_type, int32_t* enabled, int32_t* scalar_type);
ddp_status ddp_autocast_set(int32_t device_type, int32_t enabled, int32_t scalar_type);
/* Enters (+1) or leaves (-1) an autocast region; leaving the outermost one drops the cast weights. */
ddp_status ddp_autocast_nest(int32_t change);

/* The state of the default random generator of the CPU (`cuda_device` < 0) or of that CUDA device, as a new
 * tensor of bytes; and its replacement. */
ddp_status ddp_random_state(int32_t cuda_device, void** state);
ddp_status ddp_set_random_state(int32_t cuda_device, const void* state);

/* A node of the graph whose backward is ours. */
typedef struct {
  void* const* saved; /* what the forward saved: new tensors, the callee's */
  size_t saved_count;
  void* const* gradients; /* of the outputs: new tensors, the callee's; null where undefined */
  size_t gradient_count;
  const uint8_t* needs; /* by input: whether this backward wants its gradient */
  size_t input_count;
  int32_t recording; /* whether this backward is itself recorded (create_graph) */
  void** results;    /* by input: the callee puts new tensors there; null is undefined */
} ddp_backward_call;
typedef int32_t (*ddp_backward)(void* context, const ddp_backward_call* call, char* message,
                                size_t message_bytes);
/* Records a function whose outputs are computed already: `wrapped` gets a new tensor for each of `outputs`, whose
 * backward is `callback`. `saved` is kept as libtorch keeps what its own nodes save, and handed to the callback.
 * Where nothing is recorded (no grad mode, no input that requires gradients) `destroy` runs at once, else when
 * the graph is freed. */
ddp_status ddp_function(const char* name, void* const* inputs, size_t input_count, void* const* outputs,
                        size_t output_count, void* const* saved, size_t saved_count,
                        ddp_backward callback, void* context, ddp_destroy destroy, void** wrapped);

/* How often a tensor's memory was changed in place. */
ddp_status ddp_version(const void* tensor, uint32_t* version);

/* Whether operations of this thread are recorded. */
ddp_status ddp_grad_mode(int32_t* enabled);

/* A tensor kept as a node keeps what it saves: given back as a new tensor, unless it was changed in place. */
ddp_status ddp_saved_new(const void* tensor, void** saved);
ddp_status ddp_saved_get(const void* saved, void** tensor);
void ddp_saved_free(void* saved);

/* While functions are set, every tensor that autograd would keep for a backward recorded on this thread goes to
 * `pack` (a new tensor, the callee's, detached) and its `handle` is kept instead; `unpack` gives a new tensor
 * for it when a node needs it, on that node's thread; `destroy` ends it. Null functions end that. */
typedef int32_t (*ddp_pack)(void* tensor, void** handle, char* message, size_t message_bytes);
typedef int32_t (*ddp_unpack)(void* handle, void** tensor, char* message, size_t message_bytes);
ddp_status ddp_saving(ddp_pack pack, ddp_unpack unpack, ddp_destroy destroy);

#ifdef __cplusplus
}
#endif
#endif
