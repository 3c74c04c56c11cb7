// Operators: torch's CPU kernels, run on a stream.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include "runtime.h"

namespace sim {

constexpr auto kSim = c10::DeviceType::PrivateUse1;

inline bool on_sim(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == kSim; }

// The same tensor over other memory of the host's or of the device's view.
at::Tensor over(const at::Tensor& tensor, char* memory);
// What the device sees of a tensor of it: a CPU tensor, for tasks only.
at::Tensor device_view(const at::Tensor& tensor);
// The bytes that an operator may touch. Of a tensor with gaps, the gaps too.
Access access_of(const at::Tensor& tensor, bool write);

// Run an operator whose arguments are on the stack by its CPU kernel; its results replace them.
void run_on_stream(const c10::OperatorHandle& op, torch::jit::Stack* stack);

}  // namespace sim
