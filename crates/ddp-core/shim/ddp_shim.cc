// The only C++ of phalanx: thin calls into libtorch that decide nothing. Rules in README.md.
#include "ddp_shim.h"

#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/utils/lambda_post_hook.h>
#include <torch/csrc/autograd/variable.h>

namespace {

ddp_status failure(const char* text) {
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

// A callback with its context; the context is destroyed when the last copy goes.
class Callback {
 public:
  Callback(ddp_callback call, void* context, ddp_destroy destroy)
      : call_(call), context_(context, destroy) {}

  void operator()() const {
    char message[DDP_MESSAGE_BYTES];
    message[0] = '\0';
    if (call_(context_.get(), message, sizeof(message)) != 0) {
      // torch-sys catches nothing but std::exception.
      throw std::runtime_error(message);
    }
  }

 private:
  ddp_callback call_;
  std::shared_ptr<void> context_;
};

struct Hook {
  std::shared_ptr<torch::autograd::Node> accumulator;  // the variable holds it weakly
  uintptr_t key;
};

const at::Tensor& tensor_at(const void* pointer) {
  return *static_cast<const at::Tensor*>(pointer);
}

at::TensorList list_of(std::vector<at::Tensor>& into, void* const* tensors, size_t count) {
  into.reserve(count);
  for (size_t i = 0; i < count; ++i) into.push_back(tensor_at(tensors[i]));
  return into;
}

}  // namespace

extern "C" {

ddp_status ddp_tensor_identity(const void* tensor, uint64_t* identity) {
  return guarded([&] {
    *identity = reinterpret_cast<uint64_t>(tensor_at(tensor).unsafeGetTensorImpl());
  });
}

ddp_status ddp_tensor_over_memory(void* memory, int64_t len, int32_t scalar_type, int32_t cuda_device,
                                  void* context, ddp_destroy destroy, void** tensor) {
  // From here on the context has an owner, also if something below throws.
  std::shared_ptr<void> owner(context, destroy);
  return guarded([&] {
    at::Device device(at::kCPU);
    if (cuda_device >= 0) device = at::Device(at::kCUDA, static_cast<at::DeviceIndex>(cuda_device));
    auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(scalar_type)).device(device);
    at::Tensor over = at::from_blob(
        memory, {len}, [owner](void*) mutable { owner.reset(); }, options, device);
    *tensor = new at::Tensor(std::move(over));
  });
}

ddp_status ddp_current_stream(int32_t cuda_device, uint64_t* handle) {
  return guarded([&] {
    at::Device device(at::kCUDA, static_cast<at::DeviceIndex>(cuda_device));
    c10::impl::VirtualGuardImpl guard(at::kCUDA);
    *handle = reinterpret_cast<uint64_t>(guard.getStream(device).native_handle());
  });
}

ddp_status ddp_set_data(void* variable, const void* data) {
  return guarded([&] { tensor_at(variable).set_data(tensor_at(data)); });
}

ddp_status ddp_gradient_place(const void* variable, const void* view, int32_t* place) {
  return guarded([&] {
    const at::Tensor& gradient = tensor_at(variable).grad();
    if (!gradient.defined()) {
      *place = 0;
    } else {
      *place = gradient.data_ptr() == tensor_at(view).data_ptr() ? 1 : 2;
    }
  });
}

ddp_status ddp_gradient_move(void* variable, const void* view) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::Tensor& gradient = tensor_at(variable).mutable_grad();
    tensor_at(view).copy_(gradient);
    gradient = tensor_at(view);
  });
}

ddp_status ddp_gradient_clear(void* variable) {
  return guarded([&] { tensor_at(variable).mutable_grad() = at::Tensor(); });
}

ddp_status ddp_hook_add(void* variable, ddp_callback callback, void* context, ddp_destroy destroy,
                        void** hook) {
  Callback call(callback, context, destroy);
  return guarded([&] {
    using torch::autograd::variable_list;
    auto accumulator = torch::autograd::impl::grad_accumulator(tensor_at(variable));
    if (accumulator == nullptr) throw std::invalid_argument("the tensor does not require gradients");
    auto post_hook = std::make_unique<torch::autograd::utils::LambdaPostHook>(
        [call](const variable_list& outputs, const variable_list&) {
          call();
          return outputs;
        });
    auto added = std::make_unique<Hook>();
    added->key = accumulator->add_post_hook(std::move(post_hook));
    added->accumulator = std::move(accumulator);
    *hook = added.release();
  });
}

ddp_status ddp_hook_remove(void* hook) {
  return guarded([&] {
    std::unique_ptr<Hook> removed(static_cast<Hook*>(hook));
    removed->accumulator->del_post_hook(removed->key);
  });
}

ddp_status ddp_end_of_backward(ddp_callback callback, void* context, ddp_destroy destroy) {
  Callback call(callback, context, destroy);
  return guarded([&] {
    torch::autograd::Engine::get_default_engine().queue_callback([call] { call(); });
  });
}

ddp_status ddp_fused_adamw(void* const* parameters, void* const* gradients, void* const* first_moments,
                           void* const* second_moments, size_t count, const void* step,
                           const void* gradient_divisor, ddp_adamw_settings settings) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    std::vector<at::Tensor> p, g, m, v;
    std::vector<at::Tensor> steps(count, tensor_at(step));
    std::optional<at::Tensor> divisor;
    if (gradient_divisor != nullptr) divisor = tensor_at(gradient_divisor);
    at::_fused_adamw_(list_of(p, parameters, count), list_of(g, gradients, count),
                      list_of(m, first_moments, count), list_of(v, second_moments, count), {}, steps,
                      settings.lr, settings.beta1, settings.beta2, settings.weight_decay, settings.eps,
                      /*amsgrad=*/false, /*maximize=*/false, divisor);
  });
}

ddp_status ddp_autocast_get(int32_t device_type, int32_t* enabled, int32_t* scalar_type) {
  return guarded([&] {
    auto device = static_cast<at::DeviceType>(device_type);
    *enabled = at::autocast::is_autocast_enabled(device) ? 1 : 0;
    *scalar_type = static_cast<int32_t>(at::autocast::get_autocast_dtype(device));
  });
}

ddp_status ddp_autocast_set(int32_t device_type, int32_t enabled, int32_t scalar_type) {
  return guarded([&] {
    auto device = static_cast<at::DeviceType>(device_type);
    at::autocast::set_autocast_enabled(device, enabled != 0);
    at::autocast::set_autocast_dtype(device, static_cast<at::ScalarType>(scalar_type));
  });
}

ddp_status ddp_autocast_nest(int32_t change) {
  return guarded([&] {
    if (change > 0) {
      at::autocast::increment_nesting();
    } else if (at::autocast::decrement_nesting() == 0) {
      at::autocast::clear_cache();
    }
  });
}

}  // extern "C"
