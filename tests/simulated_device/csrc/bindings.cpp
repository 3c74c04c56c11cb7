// For Python.
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "allocator.h"
#include "guard.h"
#include "simccl.h"

namespace sim {
namespace {

std::vector<std::string> races() {
  Lock lock(Runtime::get().mutex);
  return Runtime::get().checker.races;
}

void forget_races() {
  Lock lock(Runtime::get().mutex);
  Runtime::get().checker.races.clear();
}

void configure(Checker::Mode mode, int patience_ms) {
  Lock lock(Runtime::get().mutex);
  Runtime::get().checker.mode = mode;
  Runtime::get().patience = std::chrono::milliseconds(patience_ms);
}

// `locate` says where the script is.
void set_locate(pybind11::object locate) {
  if (locate.is_none()) {
    Runtime::get().locate = nullptr;
    return;
  }
  auto* kept = new pybind11::object(std::move(locate));
  Runtime::get().locate = [kept] {
    const pybind11::gil_scoped_acquire gil;  // torch's own bindings have let go of it
    return (*kept)().cast<std::string>();
  };
}

}  // namespace
}  // namespace sim

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace sim;
  register_device();
  pybind11::enum_<Checker::Mode>(m, "Mode")
      .value("OFF", Checker::Mode::kOff)
      .value("COUNT", Checker::Mode::kCount)
      .value("RAISE", Checker::Mode::kRaise);
  m.attr("device_count") = kDevices;
  m.def("races", &races);
  m.def("forget_races", &forget_races);
  m.def("configure", &configure);
  m.def("set_locate", &set_locate);
  m.def("set_memory_limit", &set_memory_limit);
  m.def("default_generator", [](int device) { return default_generator(device); });
  m.def("make_simccl", &make_simccl);
}
