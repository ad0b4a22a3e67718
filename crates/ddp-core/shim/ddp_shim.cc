// Thin calls into libtorch that decide nothing; custom functions are in ddp_autograd.cc. Rules in README.md.
#include "ddp_shim.h"

#include "ddp_guarded.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/core/Generator.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_sgd.h>
#include <ATen/ops/from_blob.h>
#include <ATen/record_function.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

namespace {

using phalanx::guarded;
using phalanx::tensor_at;

at::Device device_of(int32_t cuda_device) {
  if (cuda_device < 0) return at::Device(at::kCPU);
  return at::Device(at::kCUDA, static_cast<at::DeviceIndex>(cuda_device));
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

// All hooks of one variable; it has room for one object.
class Hooks : public torch::autograd::PostAccumulateGradHook {
 public:
  void operator()(const at::Tensor&) override {
    for (const auto& entry : calls_) entry.second();
  }
  uint64_t add(Callback call) {
    calls_.emplace_back(++last_, std::move(call));
    return last_;
  }
  bool remove(uint64_t key) {
    for (auto entry = calls_.begin(); entry != calls_.end(); ++entry) {
      if (entry->first == key) {
        calls_.erase(entry);
        break;
      }
    }
    return calls_.empty();
  }

 private:
  uint64_t last_ = 0;
  std::vector<std::pair<uint64_t, Callback>> calls_;
};

struct Hook {
  at::Tensor variable;
  uint64_t key;
};

// A function for a record callback, which carries no context of its own.
thread_local ddp_witness witness = nullptr;
thread_local int witnessed = -1;

std::unique_ptr<at::ObserverContext> on_node(const at::RecordFunction&) {
  int task = torch::autograd::get_current_graph_task_id();
  if (task != witnessed && witness != nullptr) {
    witnessed = task;
    witness();
  }
  return nullptr;
}

// A shell's storage is known by its deleter, which has nothing to delete; the context is the token.
void shell_memory_goes(void*) {}

bool is_shell(const c10::StorageImpl* storage) {
  return const_cast<c10::StorageImpl*>(storage)->_mutable_data_ptr_no_checks().get_deleter() == &shell_memory_goes;
}

at::DataPtr shell_memory(void* memory, uint64_t token, at::Device device) {
  return at::DataPtr(memory, reinterpret_cast<void*>(token), &shell_memory_goes, device);
}

std::atomic<ddp_access> on_access{nullptr};

struct Accessed {
  std::vector<uint64_t> tokens;
  bool lacks_memory = false;

  void take(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.has_storage()) return;
    c10::StorageImpl* storage = tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
    if (storage == nullptr || !is_shell(storage)) return;
    const at::DataPtr& memory = storage->_mutable_data_ptr_no_checks();
    tokens.push_back(reinterpret_cast<uint64_t>(memory.get_context()));
    lacks_memory = lacks_memory || memory.get() == nullptr;
  }
  void take(const c10::IValue& value) {
    if (value.isTensor()) {
      take(value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) take(tensor);
    } else if (value.isList()) {
      for (const c10::IValue& element : value.toListRef()) take(element);
    }
  }
};

std::unique_ptr<at::ObserverContext> on_operation(const at::RecordFunction& operation) {
  Accessed accessed;
  for (const c10::IValue& input : operation.inputs()) accessed.take(input);
  const ddp_access tell = on_access.load();
  if (accessed.lacks_memory && tell != nullptr) tell(accessed.tokens.data(), accessed.tokens.size());
  return nullptr;
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
    at::Device device = device_of(cuda_device);
    auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(scalar_type)).device(device);
    at::Tensor over = at::from_blob(
        memory, {len}, [owner](void*) mutable { owner.reset(); }, options, device);
    *tensor = new at::Tensor(std::move(over));
  });
}

ddp_status ddp_shell_new(int64_t len, int32_t scalar_type, int32_t cuda_device, uint64_t token, void** tensor) {
  return guarded([&] {
    at::Device device = device_of(cuda_device);
    auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(scalar_type)).device(device);
    at::Tensor shell = at::empty({0}, options);
    c10::Storage storage(c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), static_cast<size_t>(len) * shell.itemsize(),
        shell_memory(nullptr, token, device), /*allocator=*/nullptr, /*resizable=*/false));
    shell.set_(storage, 0, {len}, {1});
    *tensor = new at::Tensor(std::move(shell));
  });
}

ddp_status ddp_shell_attach(void* shell, void* memory) {
  return guarded([&] {
    c10::StorageImpl* storage = tensor_at(shell).storage().unsafeGetStorageImpl();
    if (!is_shell(storage)) throw std::invalid_argument("the tensor has memory of its own");
    const at::DataPtr& before = storage->_mutable_data_ptr_no_checks();
    uint64_t token = reinterpret_cast<uint64_t>(before.get_context());
    storage->set_data_ptr_noswap(shell_memory(memory, token, before.device()));
  });
}

ddp_status ddp_shell_fail(void* shell, const char* message) {
  return guarded([&] {
    c10::StorageImpl* storage = tensor_at(shell).storage().unsafeGetStorageImpl();
    storage->release_data_and_set_meta_custom_data_ptr_error_msg_(std::string(message));
  });
}

ddp_status ddp_access_add(ddp_access callback, uint64_t* handle) {
  return guarded([&] {
    on_access = callback;
    *handle = at::addThreadLocalCallback(
        at::RecordFunctionCallback(on_operation).needsInputs(true).scopes({at::RecordScope::FUNCTION}));
  });
}

ddp_status ddp_access_remove(uint64_t handle) {
  return guarded([&] { at::removeCallback(handle); });
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

ddp_status ddp_variables(void* const* variables, size_t count, ddp_variable* states) {
  return guarded([&] {
    for (size_t i = 0; i < count; ++i) {
      const at::Tensor& variable = tensor_at(variables[i]);
      ddp_variable& state = states[i];
      c10::StorageImpl* storage =
          variable.has_storage() ? variable.storage().unsafeGetStorageImpl() : nullptr;
      if (storage != nullptr && is_shell(storage)) {
        state.data = reinterpret_cast<uint64_t>(storage) + static_cast<uint64_t>(variable.storage_offset());
      } else {
        state.data = reinterpret_cast<uint64_t>(variable.const_data_ptr());
      }
      state.version = static_cast<uint32_t>(variable._version());
      state.requires_grad = variable.requires_grad() ? 1 : 0;
      state.scalar_type = static_cast<int32_t>(variable.scalar_type());
      state.cuda_device = variable.is_cuda() ? static_cast<int32_t>(variable.device().index()) : -1;
      state.has_gradient = variable.is_leaf() && variable.grad().defined() ? 1 : 0;
    }
  });
}

ddp_status ddp_gradient_of(const void* variable, const void* view, ddp_gradient* found) {
  return guarded([&] {
    const at::Tensor& gradient = tensor_at(variable).grad();
    const at::Tensor& target = tensor_at(view);
    found->data = nullptr;
    if (!gradient.defined()) {
      found->place = 0;
    } else if (gradient.layout() != at::kStrided) {
      found->place = 4;
    } else if (gradient.numel() == 0 ? gradient.unsafeGetTensorImpl() == target.unsafeGetTensorImpl()
                                     : gradient.const_data_ptr() == target.const_data_ptr()) {
      found->place = 1;
    } else if (gradient.scalar_type() == target.scalar_type() && gradient.device() == target.device() &&
               gradient.sizes() == target.sizes() && gradient.strides() == target.strides()) {
      found->place = 3;
      found->data = gradient.const_data_ptr();
    } else {
      found->place = 2;
    }
  });
}

ddp_status ddp_gradient_move(void* variable, const void* view) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::Tensor& gradient = tensor_at(variable).mutable_grad();
    if (gradient.layout() != at::kStrided) {
      tensor_at(view).copy_(gradient.to_dense());
    } else {
      tensor_at(view).copy_(gradient);
    }
    gradient = tensor_at(view);
  });
}

ddp_status ddp_gradient_set(void* variable, const void* gradient) {
  return guarded([&] {
    tensor_at(variable).mutable_grad() = gradient == nullptr ? at::Tensor() : tensor_at(gradient);
  });
}

ddp_status ddp_write(void* tensor, const void* values) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    tensor_at(tensor).variable_data().copy_(tensor_at(values));
  });
}

ddp_status ddp_hook_add(void* variable, ddp_callback callback, void* context, ddp_destroy destroy,
                        void** hook) {
  Callback call(callback, context, destroy);
  return guarded([&] {
    const at::Tensor& tensor = tensor_at(variable);
    if (!tensor.is_leaf()) throw std::invalid_argument("the tensor is computed, not a variable");
    torch::autograd::impl::materialize_autograd_meta(tensor);
    auto& present = torch::autograd::impl::post_acc_grad_hooks(tensor);
    auto* ours = dynamic_cast<Hooks*>(present.get());
    if (present != nullptr && ours == nullptr) {
      throw std::invalid_argument("the variable has a post-accumulate hook of somebody else");
    }
    auto added = std::make_unique<Hook>();
    if (ours == nullptr) {
      auto hooks = std::make_unique<Hooks>();
      ours = hooks.get();
      torch::autograd::impl::set_post_acc_grad_hooks(tensor, std::move(hooks));
    }
    added->key = ours->add(std::move(call));
    added->variable = tensor;
    *hook = added.release();
  });
}

ddp_status ddp_hook_remove(void* hook) {
  return guarded([&] {
    std::unique_ptr<Hook> removed(static_cast<Hook*>(hook));
    auto& present = torch::autograd::impl::post_acc_grad_hooks(removed->variable);
    auto* ours = dynamic_cast<Hooks*>(present.get());
    if (ours != nullptr && ours->remove(removed->key)) present.reset();
  });
}

ddp_status ddp_witness_add(ddp_witness callback, uint64_t* handle) {
  return guarded([&] {
    witness = callback;
    *handle = at::addThreadLocalCallback(
        at::RecordFunctionCallback(on_node).scopes({at::RecordScope::BACKWARD_FUNCTION}));
  });
}

ddp_status ddp_witness_remove(uint64_t handle) {
  return guarded([&] { at::removeCallback(handle); });
}

ddp_status ddp_graph_reaches(void* const* variables, size_t count, uint8_t* used) {
  return guarded([&] {
    std::unordered_map<const void*, size_t> indices;
    for (size_t i = 0; i < count; ++i) {
      used[i] = 0;
      indices.emplace(tensor_at(variables[i]).unsafeGetTensorImpl(), i);
    }
    std::shared_ptr<torch::autograd::Node> root = torch::autograd::get_current_node();
    if (root == nullptr) throw std::logic_error("no backward is running on this thread");
    std::unordered_set<torch::autograd::Node*> seen{root.get()};
    std::vector<torch::autograd::Node*> open{root.get()};
    while (!open.empty()) {
      torch::autograd::Node* node = open.back();
      open.pop_back();
      if (auto* leaf = dynamic_cast<torch::autograd::AccumulateGrad*>(node)) {
        auto found = indices.find(leaf->variable.unsafeGetTensorImpl());
        if (found != indices.end()) used[found->second] = 1;
      }
      for (const auto& edge : node->next_edges()) {
        if (edge.function != nullptr && seen.insert(edge.function.get()).second) {
          open.push_back(edge.function.get());
        }
      }
    }
  });
}

ddp_status ddp_end_of_backward(ddp_callback callback, void* context, ddp_destroy destroy) {
  Callback call(callback, context, destroy);
  return guarded([&] {
    torch::autograd::Engine::get_default_engine().queue_callback([call] { call(); });
  });
}

ddp_status ddp_fused_adam(void* const* parameters, void* const* gradients, void* const* first_moments,
                          void* const* second_moments, size_t count, const void* step,
                          const void* gradient_divisor, ddp_adam_settings settings) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    std::vector<at::Tensor> p, g, m, v;
    std::vector<at::Tensor> steps(count, tensor_at(step));
    std::optional<at::Tensor> divisor;
    if (gradient_divisor != nullptr) divisor = tensor_at(gradient_divisor);
    auto fused = [&](auto function) {
      function(list_of(p, parameters, count), list_of(g, gradients, count),
               list_of(m, first_moments, count), list_of(v, second_moments, count), at::TensorList(), steps,
               settings.lr, settings.beta1, settings.beta2, settings.weight_decay, settings.eps,
               /*amsgrad=*/false, /*maximize=*/false, divisor);
    };
    if (settings.decoupled != 0) {
      fused([](auto&&... all) { at::_fused_adamw_(all...); });
    } else {
      fused([](auto&&... all) { at::_fused_adam_(all...); });
    }
  });
}

ddp_status ddp_fused_sgd(void* const* parameters, void* const* gradients, void* const* momenta,
                         size_t count, const void* gradient_divisor, ddp_sgd_settings settings) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    std::vector<at::Tensor> p, g, m;
    std::optional<at::Tensor> divisor;
    if (gradient_divisor != nullptr) divisor = tensor_at(gradient_divisor);
    at::TensorList momentum;
    if (settings.momentum != 0.0) momentum = list_of(m, momenta, count);
    at::_fused_sgd_(list_of(p, parameters, count), list_of(g, gradients, count), momentum,
                    settings.weight_decay, settings.momentum, settings.lr, settings.dampening,
                    settings.nesterov != 0, /*maximize=*/false, settings.first_step != 0, divisor);
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

ddp_status ddp_random_state(int32_t cuda_device, void** state) {
  return guarded([&] {
    at::Generator generator = at::globalContext().defaultGenerator(device_of(cuda_device));
    std::lock_guard<std::mutex> lock(generator.mutex());
    *state = new at::Tensor(generator.get_state());
  });
}

ddp_status ddp_set_random_state(int32_t cuda_device, const void* state) {
  return guarded([&] {
    at::Generator generator = at::globalContext().defaultGenerator(device_of(cuda_device));
    std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_state(tensor_at(state));
  });
}

}  // extern "C"
