// The device as torch sees it.
#pragma once
#include <ATen/core/Generator.h>

#include <optional>

namespace sim {

void register_device();
// A seed for one operator, from its generator or the device's own.
uint64_t draw_seed(const std::optional<at::Generator>& given, int device);
const at::Generator& default_generator(int device);  // -1: of the current one

}  // namespace sim
