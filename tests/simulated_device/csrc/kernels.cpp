// Operators that are not a CPU kernel on a stream: memory, views, copies, and those that torch leaves to the device.
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/bernoulli.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "allocator.h"
#include "operators.h"

namespace sim {

namespace {
using at::Tensor;
using torch::jit::Stack;

// --- memory -----------------------------------------------------------------------------------------------------------
c10::Device chosen(std::optional<c10::Device> device) {
  return {kSim, c10::DeviceIndex(device && device->has_index() ? device->index() : current_device)};
}

void refuse_pinned(std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Cannot pin a tensor of a device, only dense CPU tensors can be pinned");
}

Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
             std::optional<c10::Device> device, std::optional<bool> pin, std::optional<c10::MemoryFormat> format) {
  refuse_pinned(pin);
  const c10::DeviceGuard guard(chosen(device));
  return at::detail::empty_generic(size, device_allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool> pin) {
  refuse_pinned(pin);
  const c10::DeviceGuard guard(chosen(device));
  return at::detail::empty_strided_generic(size, stride, device_allocator(),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

void record_stream(Tensor& self, c10::Stream stream) {
  device_allocator()->recordStream(self.storage().data_ptr(), stream);
}

// --- views --------------------------------------------------------------------------------------------------------------
Tensor as_strided(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                  std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset ? std::make_optional(offset->guard_int(__FILE__, __LINE__)) : std::nullopt);
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const Tensor& resize(const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

Tensor& set_whole_storage(Tensor& self, at::Storage source) { return at::native::set_(self, std::move(source)); }

// --- copies: what blocks the host, and what does not, is as on CUDA ---------------------------------------------------------
bool is_pinned(const Tensor& tensor) { return Runtime::get().pinned_memory->contains(tensor.const_data_ptr()); }

Tensor pinned_view(const Tensor& tensor) {
  return over(tensor, Runtime::get().device_address(tensor.const_data_ptr()));
}

void copy_on_device(const Tensor& source, const Tensor& target) {
  Runtime& runtime = Runtime::get();
  const int stream = current_streams[source.device().index()], other = current_streams[target.device().index()];
  if (stream != other) runtime.block(stream, runtime.now(other));  // both devices' streams take part
  const Point end = runtime.enqueue(stream, "copy on the device", {access_of(source, false), access_of(target, true)},
                                    [from = device_view(source), to = device_view(target)] { to.copy_(from); });
  if (stream != other) runtime.block(other, end);
}

void copy_to_device(const Tensor& source, const Tensor& target, bool non_blocking) {
  Runtime& runtime = Runtime::get();
  const bool direct =
      non_blocking && is_pinned(source) && source.is_contiguous() && source.scalar_type() == target.scalar_type();
  std::vector<Access> accesses{access_of(target, true)};
  if (direct) accesses.push_back(access_of(source, false));
  const Point end = runtime.enqueue(
      current_streams[target.device().index()], "copy to the device", accesses,
      [from = direct ? pinned_view(source) : source.clone(), to = device_view(target)] { to.copy_(from); });
  if (!non_blocking) runtime.wait(end);
}

void copy_to_host(const Tensor& source, const Tensor& target, bool non_blocking) {
  Runtime& runtime = Runtime::get();
  const bool direct = non_blocking && is_pinned(target) && target.is_contiguous();
  std::vector<Access> accesses{access_of(source, false)};
  if (direct) accesses.push_back(access_of(target, true));
  const Tensor staged = direct ? pinned_view(target) : at::empty_like(target, target.options().pinned_memory(false));
  const Point end = runtime.enqueue(current_streams[source.device().index()], "copy to the host", accesses,
                                    [from = device_view(source), staged] { staged.copy_(from); });
  if (direct) return;
  runtime.wait(end);
  target.copy_(staged);
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool non_blocking) {
  if (!target.numel()) return target;
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::DeviceGuard guard(on_sim(source) ? source.device() : target.device());
  if (on_sim(source) && on_sim(target))
    copy_on_device(source, target);
  else if (on_sim(target))
    copy_to_device(source, target, non_blocking);
  else
    copy_to_host(source, target, non_blocking);
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  at::native::resize_(target, source.sizes());
  return copy_from(source, target, false);
}

// --- what torch leaves to the device ----------------------------------------------------------------------------------------
c10::OperatorHandle aten(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }

void convolution(const c10::OperatorHandle&, Stack* stack) { run_on_stream(aten("aten::convolution"), stack); }

void convolution_backward(const c10::OperatorHandle& op, Stack* stack) {
  const auto grad_output = torch::jit::peek(*stack, 0, op.schema().arguments().size()).toTensor();
  const std::vector<int64_t> bias_sizes{grad_output.size(1)};
  stack->insert(stack->end() - op.schema().arguments().size() + 3, c10::IValue(bias_sizes));
  run_on_stream(aten("aten::convolution_backward"), stack);
}

// The CPU's would draw from the CPU's generator.
std::tuple<Tensor, Tensor> native_dropout(const Tensor& input, double p, std::optional<bool> train) {
  if (!train.value_or(true)) return {input.clone(), at::ones_like(input, input.options().dtype(at::kBool))};
  const Tensor mask = at::empty_like(input, input.options().dtype(at::kBool)).bernoulli_(1 - p);
  return {input.mul(mask).mul_(p == 1 ? 0.0 : 1 / (1 - p)), mask};
}
}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("record_stream", record_stream);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
  m.impl("convolution_backward_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution_backward>());
  m.impl("native_dropout", native_dropout);
}

}  // namespace sim
