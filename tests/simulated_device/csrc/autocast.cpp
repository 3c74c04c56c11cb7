// Mixed precision by torch's own lists of operators.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "operators.h"

namespace sim {

namespace {
using at::Tensor;
using torch::jit::Stack;

const c10::DispatchKeySet kAutocast(c10::DispatchKey::AutocastPrivateUse1);

// Give all tensors of the arguments the dtype, as far as autocast may.
void cast_arguments(const c10::OperatorHandle& op, Stack* stack, at::ScalarType dtype) {
  const size_t count = op.schema().arguments().size();
  for (auto argument = stack->end() - count; argument != stack->end(); ++argument) {
    if (argument->isTensor()) {
      if (argument->toTensor().defined()) *argument = at::autocast::cached_cast(dtype, argument->toTensor(), kSim);
    } else if (argument->isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& tensor : argument->toTensorVector())
        list.push_back(at::autocast::cached_cast(dtype, tensor, kSim));
      *argument = list;
    }
  }
}

void call(const c10::OperatorHandle& op, Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard without(kAutocast);
  op.callBoxed(stack);
}

void lower(const c10::OperatorHandle& op, Stack* stack) {
  cast_arguments(op, stack, at::autocast::get_autocast_dtype(kSim));
  call(op, stack);
}

void in_fp32(const c10::OperatorHandle& op, Stack* stack) {
  cast_arguments(op, stack, at::kFloat);
  call(op, stack);
}

// A sum or softmax of lower precision is taken in fp32, unless the script says in what.
void to_fp32_by_dtype(const c10::OperatorHandle& op, Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto first = stack->end() - arguments.size();
  const bool eligible = first->isTensor() && at::autocast::is_eligible(first->toTensor(), kSim);
  for (size_t i = 0; i < arguments.size(); ++i)
    if (eligible && arguments[i].name() == "dtype" && (first + i)->isNone())
      *(first + i) = static_cast<int64_t>(at::kFloat);
  call(op, stack);
}

void widest(const c10::OperatorHandle& op, Stack* stack) {
  at::ScalarType dtype = at::autocast::get_autocast_dtype(kSim);
  const size_t count = op.schema().arguments().size();
  for (auto argument = stack->end() - count; argument != stack->end(); ++argument) {
    if (argument->isTensor() && argument->toTensor().defined())
      dtype = at::autocast::prioritize(dtype, argument->toTensor(), kSim);
    else if (argument->isTensorList())
      for (const Tensor& tensor : argument->toTensorVector()) dtype = at::autocast::prioritize(dtype, tensor, kSim);
  }
  cast_arguments(op, stack, dtype);
  call(op, stack);
}

template <auto* kernel>
torch::CppFunction boxed() {
  return torch::CppFunction::makeFromBoxedFunction<kernel>();
}
}  // namespace

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

// The lists name an operator, or an operator and an overload.
#define SIM_PICK(_1, _2, NAME, ...) NAME
#define SIM_OPERATOR(KERNEL, OP) m.impl(#OP, boxed<&KERNEL>());
#define SIM_OVERLOAD(KERNEL, OP, OVERLOAD) m.impl(#OP "." #OVERLOAD, boxed<&KERNEL>());
#define SIM_LOWER(...) SIM_PICK(__VA_ARGS__, SIM_OVERLOAD, SIM_OPERATOR)(lower, __VA_ARGS__)
#define SIM_FP32(...) SIM_PICK(__VA_ARGS__, SIM_OVERLOAD, SIM_OPERATOR)(in_fp32, __VA_ARGS__)
#define SIM_BY_DTYPE(...) SIM_PICK(__VA_ARGS__, SIM_OVERLOAD, SIM_OPERATOR)(to_fp32_by_dtype, __VA_ARGS__)
#define SIM_WIDEST(...) SIM_PICK(__VA_ARGS__, SIM_OVERLOAD, SIM_OPERATOR)(widest, __VA_ARGS__)

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(SIM_LOWER)
  AT_FORALL_FP32(SIM_FP32)
  AT_FORALL_FP32_SET_OPT_DTYPE(SIM_BY_DTYPE)
  AT_FORALL_PROMOTE(SIM_WIDEST)
  m.impl("norm.Scalar", boxed<&in_fp32>());
  m.impl("norm.ScalarOpt_dim", boxed<&in_fp32>());
}

}  // namespace sim
