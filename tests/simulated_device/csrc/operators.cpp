#include "operators.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <unordered_set>

#include "allocator.h"
#include "guard.h"

namespace sim {

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

at::Tensor over(const Tensor& tensor, char* memory) {
  return at::from_blob(memory, tensor.sizes(), tensor.strides(), at::TensorOptions().dtype(tensor.dtype()));
}

at::Tensor device_view(const Tensor& tensor) {
  if (!tensor.numel())
    return at::empty_strided(tensor.sizes(), tensor.strides(), at::TensorOptions().dtype(tensor.dtype()));
  TORCH_CHECK(tensor.has_storage() && tensor.storage().data() != nullptr,
              "simulated device: a tensor whose memory was released is used");
  return over(tensor, Runtime::get().device_address(tensor.const_data_ptr()));
}

Access access_of(const Tensor& tensor, bool write) {
  if (!tensor.numel() || !tensor.has_storage()) return {nullptr, 0, write};
  int64_t elements = 1;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) elements += (tensor.size(dim) - 1) * tensor.stride(dim);
  return {static_cast<const char*>(tensor.const_data_ptr()), size_t(elements) * tensor.element_size(), write};
}

namespace {

// Results whose sizes, or values, follow from the values of arguments: the host waits for them, as it does on CUDA.
bool needs_values(const std::string& name, const std::vector<IValue>& arguments) {
  static const std::unordered_set<std::string> names = {
      "aten::nonzero", "aten::masked_select", "aten::_unique", "aten::_unique2", "aten::unique_dim",
      "aten::unique_consecutive", "aten::repeat_interleave", "aten::bincount", "aten::linalg_cholesky_ex",
      "aten::linalg_inv_ex", "aten::_linalg_svd", "aten::linalg_qr", "aten::_linalg_eigh"};
  if (names.count(name)) return true;
  if (name != "aten::index") return false;
  for (const auto& index : arguments[1].toOptionalTensorVector())
    if (index && (index->scalar_type() == at::kBool || index->scalar_type() == at::kByte)) return true;
  return false;
}

// Call `change` with each tensor of an argument; what it assigns is kept.
template <typename Change>
void each_tensor(IValue& value, Change change) {
  if (value.isTensor()) {
    Tensor tensor = value.toTensor();
    if (tensor.defined()) change(tensor);
    value = tensor;
  } else if (value.isTensorList()) {
    auto list = value.toTensorVector();
    for (Tensor& tensor : list)
      if (tensor.defined()) change(tensor);
    value = list;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> changed;
    for (std::optional<Tensor> tensor : value.toOptionalTensorVector()) {
      if (tensor && tensor->defined()) change(*tensor);
      changed.push_back(tensor);
    }
    value = changed;
  }
}

std::vector<Tensor> tensors_of(const Stack& values) {
  std::vector<Tensor> all;
  for (const IValue& value : values) {
    if (value.isTensorList()) {
      for (const Tensor& tensor : value.toTensorVector()) all.push_back(tensor);
    } else {
      all.push_back(value.isTensor() ? value.toTensor() : Tensor());
    }
  }
  return all;
}

// A tensor like this one, of zeros: valid indices, and no work.
Tensor zeros_shaped_like(const Tensor& tensor) {
  const auto options = at::TensorOptions().dtype(tensor.dtype());
  if (!tensor.is_non_overlapping_and_dense()) return at::zeros(tensor.sizes(), options);
  return at::empty_strided(tensor.sizes(), tensor.strides(), options).zero_();
}

bool is_generator(const c10::Argument& argument) {
  const auto& type = argument.type();
  if (type->kind() == c10::TypeKind::GeneratorType) return true;
  return type->kind() == c10::TypeKind::OptionalType &&
         type->castRaw<c10::OptionalType>()->getElementType()->kind() == c10::TypeKind::GeneratorType;
}

bool is_written(const c10::Argument& argument) { return argument.alias_info() && argument.alias_info()->isWrite(); }

bool is_of_tensors(const c10::Argument& result) {
  const auto& type = result.type();
  return type->kind() == c10::TypeKind::TensorType ||
         (type->kind() == c10::TypeKind::ListType &&
          type->castRaw<c10::ListType>()->getElementType()->kind() == c10::TypeKind::TensorType);
}

// Leaves its results on the stack in place of its arguments.
void call_on_cpu(const c10::OperatorHandle& op, Stack& stack) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::NoGradGuard no_grad;
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
}

IValue seeded_generator(uint64_t seed) { return at::make_generator<at::CPUGeneratorImpl>(seed); }

class Call {
 public:
  Call(const c10::OperatorHandle& op, std::vector<IValue> arguments)
      : op_(op), schema_(op.schema()), name_(op.schema().name()), given_(std::move(arguments)) {
    for (const auto& result : schema_.returns()) {
      TORCH_CHECK(!result.alias_info() || result.alias_info()->isWrite(),
                  "simulated device: ", name_, " makes a view and has no kernel");
      fresh_ = fresh_ || !is_written(result);
      only_tensors_ = only_tensors_ && is_of_tensors(result);
    }
    find_device();
  }

  void run(Stack* stack) {
    const c10::DeviceGuard guard(c10::Device(kSim, c10::DeviceIndex(device_)));
    give_sizes_to_empty_outputs();
    prepare_arguments();
    if (!only_tensors_ || needs_values(name_, given_))
      run_and_wait(stack);
    else
      run_later(stack);
  }

 private:
  void find_device() {
    for (IValue argument : given_)
      each_tensor(argument, [&](Tensor& tensor) {
        if (!on_sim(tensor)) return;
        TORCH_CHECK(device_ < 0 || device_ == tensor.device().index(), "simulated device: ", name_,
                    ": expected all tensors to be on the same device, but found sim:", device_, " and ",
                    tensor.device());
        device_ = tensor.device().index();
      });
    for (const IValue& argument : given_)
      if (device_ < 0 && argument.isDevice() && argument.toDevice().type() == kSim && argument.toDevice().has_index())
        device_ = argument.toDevice().index();
    if (device_ < 0) device_ = current_device;
  }

  // The arguments as the CPU kernel would get them for a call that is only about sizes.
  Stack arguments_of_zeros() const {
    Stack stack;
    for (size_t i = 0; i < given_.size(); ++i) {
      IValue argument = given_[i];
      each_tensor(argument, [&](Tensor& tensor) {
        if (on_sim(tensor)) tensor = zeros_shaped_like(tensor);
      });
      if (argument.isDevice()) argument = c10::Device(at::kCPU);
      if (is_generator(schema_.arguments()[i])) argument = seeded_generator(0);
      stack.push_back(std::move(argument));
    }
    return stack;
  }

  // An out= argument without elements takes the result's shape.
  void give_sizes_to_empty_outputs() {
    std::vector<size_t> empty;
    for (size_t i = 0; i < given_.size(); ++i)
      if (schema_.arguments()[i].kwarg_only() && is_written(schema_.arguments()[i]) && given_[i].isTensor() &&
          given_[i].toTensor().defined() && !given_[i].toTensor().numel())
        empty.push_back(i);
    if (empty.empty()) return;
    Stack stack = arguments_of_zeros();
    const std::vector<IValue> outputs(stack.begin(), stack.end());
    call_on_cpu(op_, stack);
    for (size_t i : empty)
      if (outputs[i].toTensor().sizes() != given_[i].toTensor().sizes())
        given_[i].toTensor().resize_(outputs[i].toTensor().sizes());
  }

  void prepare_arguments() {
    for (size_t i = 0; i < given_.size(); ++i) {
      const c10::Argument& argument = schema_.arguments()[i];
      IValue value = given_[i];
      each_tensor(value, [&](Tensor& tensor) {
        if (on_sim(tensor)) {
          accesses_.push_back(access_of(tensor, is_written(argument)));
          tensor = device_view(tensor);
          return;
        }
        TORCH_CHECK(tensor.is_cpu() && (tensor.dim() == 0 || name_.rfind("aten::index", 0) == 0 ||
                                        name_.rfind("aten::_index_put", 0) == 0),
                    "simulated device: ", name_, ": expected all tensors to be on the same device, but found sim:",
                    device_, " and ", tensor.device());
        const bool number = tensor.unsafeGetTensorImpl()->is_wrapped_number();  // whose dtype does not count
        tensor = tensor.clone();  // its value now
        tensor.unsafeGetTensorImpl()->set_wrapped_number(number);
      });
      if (value.isDevice()) value = c10::Device(at::kCPU);
      if (is_generator(argument)) {
        random_ = true;
        value = seeded_generator(draw_seed(given_[i].toOptional<at::Generator>(), device_));
      }
      arguments_.push_back(std::move(value));
    }
    TORCH_CHECK(random_ || !op_.hasTag(at::Tag::nondeterministic_seeded), "simulated device: ", name_,
                " draws random numbers without a generator and has no kernel");
  }

  // The results' memory is there at once, and filled when the stream comes to it.
  void run_later(Stack* stack) {
    std::vector<IValue> results(schema_.returns().size());
    std::vector<std::pair<size_t, Tensor>> targets;  // position among all tensors of all results, and the memory
    if (fresh_) {
      Stack shapes = arguments_of_zeros();
      call_on_cpu(op_, shapes);
      size_t position = 0;
      auto made_like = [&](const Tensor& like) {
        Tensor made;
        if (like.defined()) {
          made = at::empty_strided(like.sizes(), like.strides(),
                                   like.options().device(c10::Device(kSim, c10::DeviceIndex(device_))));
          accesses_.push_back(access_of(made, true));
          if (made.numel()) targets.emplace_back(position, device_view(made));
        }
        ++position;
        return made;
      };
      for (size_t i = 0; i < results.size(); ++i) {
        if (is_written(schema_.returns()[i])) {
          position += shapes[i].isTensorList() ? shapes[i].toTensorVector().size() : 1;
        } else if (shapes[i].isTensor()) {
          results[i] = made_like(shapes[i].toTensor());
        } else {
          std::vector<Tensor> list;
          for (const Tensor& like : shapes[i].toTensorVector()) list.push_back(made_like(like));
          results[i] = list;
        }
      }
    }
    auto task = [op = op_, arguments = arguments_, targets] {
      const Stack made = call_checked(op, arguments);
      const std::vector<Tensor> values = tensors_of(made);
      const at::NoGradGuard no_grad;
      for (const auto& [position, target] : targets) target.copy_(values[position]);
    };
    Runtime::get().enqueue(current_streams[device_], name_, accesses_, std::move(task));
    for (size_t i = 0; i < results.size(); ++i)
      stack->push_back(is_written(schema_.returns()[i]) ? written_argument(schema_.returns()[i]) : results[i]);
  }

  void run_and_wait(Stack* stack) {
    auto made = std::make_shared<Stack>();
    auto task = [op = op_, arguments = arguments_, made] { *made = call_checked(op, arguments); };
    Runtime& runtime = Runtime::get();
    runtime.wait(runtime.enqueue(current_streams[device_], name_, accesses_, std::move(task)));
    for (size_t i = 0; i < schema_.returns().size(); ++i) {
      if (is_written(schema_.returns()[i])) {
        stack->push_back(written_argument(schema_.returns()[i]));
        continue;
      }
      IValue value = (*made)[i];
      each_tensor(value, [&](Tensor& t) { t = t.to(c10::Device(kSim, c10::DeviceIndex(device_))); });
      stack->push_back(std::move(value));
    }
  }

  // The CPU kernel must write where the arguments are: the device's memory cannot be replaced by its own.
  static Stack call_checked(const c10::OperatorHandle& op, const std::vector<IValue>& arguments) {
    Stack stack(arguments.begin(), arguments.end());
    std::vector<std::pair<Tensor, const void*>> places;
    for (const Tensor& tensor : tensors_of(stack))
      if (tensor.defined()) places.emplace_back(tensor, tensor.const_data_ptr());
    call_on_cpu(op, stack);
    for (const auto& [tensor, place] : places)
      TORCH_CHECK(tensor.const_data_ptr() == place, "an output has another size than the result");
    return stack;
  }

  const IValue& written_argument(const c10::Argument& result) const {
    for (size_t i = 0; i < given_.size(); ++i) {
      const auto* alias = schema_.arguments()[i].alias_info();
      if (alias && *alias == *result.alias_info()) return given_[i];
    }
    TORCH_CHECK(false, "simulated device: ", name_, ": which argument is returned?");
  }

  const c10::OperatorHandle op_;
  const c10::FunctionSchema& schema_;
  const std::string name_;
  std::vector<IValue> given_, arguments_;  // as the script gave them, and as the CPU kernel gets them
  std::vector<Access> accesses_;
  int device_ = -1;
  bool fresh_ = false, only_tensors_ = true, random_ = false;
};

void fallback(const c10::OperatorHandle& op, Stack* stack) { run_on_stream(op, stack); }

}  // namespace

void run_on_stream(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  const auto arguments = torch::jit::last(*stack, count);
  Call call(op, std::vector<IValue>(arguments.begin(), arguments.end()));
  torch::jit::drop(*stack, count);
  call.run(stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

}  // namespace sim
