// Custom autograd functions, and who keeps what backward needs: thin calls into libtorch. Rules in README.md.
#include "ddp_shim.h"

#include "ddp_guarded.h"

#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/saved_variable_hooks.h>
#include <torch/csrc/autograd/variable.h>

namespace {

namespace autograd = torch::autograd;
using autograd::variable_list;
using phalanx::guarded;
using phalanx::tensor_at;

// New tensors on their way to Rust, which takes them over; those that it never gets are freed here.
class Handed {
 public:
  void* add(const at::Tensor& tensor) {
    owned_.push_back(std::make_unique<at::Tensor>(tensor));
    pointers_.push_back(owned_.back().get());
    return pointers_.back();
  }
  void add_if_defined(const at::Tensor& tensor) {
    if (tensor.defined()) {
      add(tensor);
    } else {
      pointers_.push_back(nullptr);
    }
  }
  void* const* data() const { return pointers_.data(); }
  size_t size() const { return pointers_.size(); }
  // From here on they are the callee's.
  void release() {
    for (auto& tensor : owned_) static_cast<void>(tensor.release());
    owned_.clear();
  }

 private:
  std::vector<std::unique_ptr<at::Tensor>> owned_;
  std::vector<void*> pointers_;
};

// A tensor that came from Rust and is ours.
at::Tensor taken(void* pointer) {
  if (pointer == nullptr) return at::Tensor();
  std::unique_ptr<at::Tensor> owned(static_cast<at::Tensor*>(pointer));
  return std::move(*owned);
}

class FunctionNode : public autograd::Node {
 public:
  FunctionNode(const char* name, ddp_backward call, std::shared_ptr<void> context)
      : name_(name), call_(call), context_(std::move(context)) {}

  std::string name() const override { return name_; }

  void save(const at::Tensor& tensor) {
    // A node that keeps its own output through it would never be freed.
    saved_.emplace_back(tensor, tensor.grad_fn().get() == this);
  }

  variable_list apply(variable_list&& gradients) override {
    std::shared_ptr<void> context;
    Handed saved, incoming;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (context_ == nullptr) throw std::runtime_error(autograd::ERR_BACKWARD_TWICE);
      context = context_;
      for (const auto& one : saved_) saved.add_if_defined(one.unpack(shared_from_this()));
    }
    for (const auto& gradient : gradients) incoming.add_if_defined(gradient);
    std::vector<uint8_t> needs;
    for (size_t i = 0; i < num_outputs(); ++i) needs.push_back(task_should_compute_output(i) ? 1 : 0);
    std::vector<void*> results(num_outputs(), nullptr);
    ddp_backward_call call{saved.data(),    saved.size(), incoming.data(), incoming.size(),
                           needs.data(),    needs.size(), at::GradMode::is_enabled() ? 1 : 0,
                           results.data()};
    char message[DDP_MESSAGE_BYTES];
    message[0] = '\0';
    saved.release();
    incoming.release();
    int32_t code = call_(context.get(), &call, message, sizeof(message));
    variable_list outgoing;
    for (void* result : results) outgoing.push_back(taken(result));
    // torch-sys catches nothing but std::exception.
    if (code != 0) throw std::runtime_error(message);
    return outgoing;
  }

  void release_variables() override {
    std::shared_ptr<void> context;
    std::vector<autograd::SavedVariable> saved;
    std::lock_guard<std::mutex> lock(mutex_);
    context.swap(context_);
    saved.swap(saved_);
  }

 private:
  std::string name_;
  ddp_backward call_;
  std::shared_ptr<void> context_;
  std::vector<autograd::SavedVariable> saved_;
};

// What this thread does with tensors that autograd saves.
struct Saving {
  ddp_pack pack;
  ddp_unpack unpack;
  ddp_destroy destroy;
};
thread_local Saving saving{nullptr, nullptr, nullptr};

class Hooks : public autograd::SavedVariableHooks {
 public:
  explicit Hooks(Saving functions) : functions_(functions) {}
  ~Hooks() override {
    if (handle_ != nullptr) functions_.destroy(handle_);
  }
  void call_pack_hook(const at::Tensor& tensor) override {
    auto handed = std::make_unique<at::Tensor>(tensor.detach());
    char message[DDP_MESSAGE_BYTES];
    message[0] = '\0';
    if (functions_.pack(handed.release(), &handle_, message, sizeof(message)) != 0) {
      throw std::runtime_error(message);
    }
  }
  at::Tensor call_unpack_hook() override {
    void* tensor = nullptr;
    char message[DDP_MESSAGE_BYTES];
    message[0] = '\0';
    if (functions_.unpack(handle_, &tensor, message, sizeof(message)) != 0) {
      throw std::runtime_error(message);
    }
    return taken(tensor);
  }

 private:
  Saving functions_;
  void* handle_ = nullptr;
};

// libtorch asks its engine for the hooks of a tensor that it saves; the one that it has by default has none.
class SavingEngine : public autograd::Engine {
 public:
  static autograd::Engine& instance() {
    static SavingEngine engine;
    return engine;
  }
  ~SavingEngine() override { stop(); }
  std::unique_ptr<autograd::SavedVariableHooks> get_default_saved_variable_hooks() override {
    if (saving.pack == nullptr) return nullptr;
    return std::make_unique<Hooks>(saving);
  }
};

void install_engine() {
  static std::once_flag once;
  std::call_once(once, [] {
    if (&autograd::Engine::get_default_engine() != &autograd::Engine::get_base_engine()) {
      throw std::logic_error("something else in this process has replaced libtorch's autograd engine");
    }
    autograd::set_default_engine_stub(&SavingEngine::instance);
  });
}

}  // namespace

extern "C" {

ddp_status ddp_function(const char* name, void* const* inputs, size_t input_count, void* const* outputs,
                        size_t output_count, void* const* saved, size_t saved_count,
                        ddp_backward callback, void* context, ddp_destroy destroy, void** wrapped) {
  // From here on the context has an owner, also if something below throws.
  std::shared_ptr<void> owner(context, destroy);
  return guarded([&] {
    variable_list ins;
    std::vector<std::optional<at::Tensor>> outs;
    for (size_t i = 0; i < input_count; ++i) ins.push_back(tensor_at(inputs[i]));
    for (size_t i = 0; i < output_count; ++i) outs.emplace_back(tensor_at(outputs[i]));
    std::shared_ptr<FunctionNode> node;
    if (at::GradMode::is_enabled() && autograd::any_variable_requires_grad(ins)) {
      node.reset(new FunctionNode(name, callback, std::move(owner)), autograd::deleteNode);
      node->set_next_edges(autograd::collect_next_edges(ins));
      node->clear_input_metadata();
    }
    auto no_jvp = [](const variable_list&, const variable_list&) -> variable_list {
      throw std::logic_error("custom functions have no forward-mode derivative");
    };
    auto alias = [](const at::Tensor& tensor) { return tensor.view_as(tensor); };
    auto made = autograd::_wrap_outputs(ins, {}, {}, outs, node, no_jvp, {}, alias, /*pure_view=*/false);
    if (node != nullptr) {
      for (size_t i = 0; i < saved_count; ++i) node->save(tensor_at(saved[i]));
    }
    Handed handed;
    for (const auto& one : made) handed.add(one.value_or(at::Tensor()));
    std::copy(handed.data(), handed.data() + handed.size(), wrapped);
    handed.release();
  });
}

ddp_status ddp_version(const void* tensor, uint32_t* version) {
  return guarded([&] { *version = static_cast<uint32_t>(tensor_at(tensor)._version()); });
}

ddp_status ddp_grad_mode(int32_t* enabled) {
  return guarded([&] { *enabled = at::GradMode::is_enabled() ? 1 : 0; });
}

ddp_status ddp_saved_new(const void* tensor, void** saved) {
  return guarded([&] {
    *saved = new autograd::SavedVariable(tensor_at(tensor), /*is_output=*/false);
  });
}

ddp_status ddp_saved_get(const void* saved, void** tensor) {
  return guarded([&] {
    *tensor = new at::Tensor(static_cast<const autograd::SavedVariable*>(saved)->unpack());
  });
}

void ddp_saved_free(void* saved) {
  delete static_cast<autograd::SavedVariable*>(saved);
}

ddp_status ddp_saving(ddp_pack pack, ddp_unpack unpack, ddp_destroy destroy) {
  return guarded([&] {
    install_engine();
    saving = Saving{pack, unpack, destroy};
  });
}

}  // extern "C"
