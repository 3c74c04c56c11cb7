// What torch asks of a device: which one is current, streams and events, pinned memory, random numbers.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "allocator.h"
#include "guard.h"
#include "pinned.h"

namespace sim {

namespace {
constexpr auto kType = c10::DeviceType::PrivateUse1;

int checked(int device) {
  TORCH_CHECK(0 <= device && device < kDevices, "simulated device: there is no sim:", device);
  return device;
}

int index_or_current(c10::Device device) { return device.has_index() ? checked(device.index()) : current_device; }

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return kType; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }

  c10::Device getDevice() const override { return {kType, c10::DeviceIndex(current_device)}; }
  void setDevice(c10::Device device) const override { current_device = index_or_current(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }

  c10::Stream getStream(c10::Device device) const override {
    return as_stream(current_streams[index_or_current(device)]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return as_stream(index_or_current(device)); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return as_stream(Runtime::get().pooled_stream(index_or_current(device)));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = as_stream(current_streams[stream.device_index()]);
    current_streams[stream.device_index()] = index_of(stream);
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override {
    return reinterpret_cast<void*>(static_cast<intptr_t>(index_of(stream) + 1));
  }
  bool queryStream(const c10::Stream& stream) const override {
    return Runtime::get().query(Runtime::get().now(index_of(stream)));
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    Runtime::get().wait(Runtime::get().now(index_of(stream)));
  }
  void synchronizeDevice(const c10::DeviceIndex device) const override { Runtime::get().wait_device(checked(device)); }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new Event;
    Runtime::get().record(*static_cast<Event*>(*event), index_of(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event) Runtime::get().block(index_of(stream), *static_cast<Event*>(event));
  }
  bool queryEvent(void* event) const override { return !event || Runtime::get().query(*static_cast<Event*>(event)); }
  void synchronizeEvent(void* event) const override {
    if (event) Runtime::get().wait(*static_cast<Event*>(event));
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  double elapsedTime(void* first, void* second, const c10::DeviceIndex) const override {
    TORCH_CHECK(first && second, "simulated device: an event was not recorded");
    auto passed = static_cast<Event*>(second)->recorded - static_cast<Event*>(first)->recorded;
    return std::chrono::duration<double, std::milli>(passed).count();
  }

  void recordDataPtrOnStream(const c10::DataPtr& pointer, const c10::Stream& stream) const override {
    device_allocator()->recordStream(pointer, stream);
  }

  c10::DeviceCapability getDeviceCapability(c10::Device) const override { return {}; }  // every dtype
};

// --- random numbers: a seed is drawn when an operator is told, and used by torch's CPU kernel when it runs -------------
class GeneratorImpl final : public at::CPUGeneratorImpl {
 public:
  explicit GeneratorImpl(int device) {
    device_ = c10::Device(kType, c10::DeviceIndex(device));
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

}  // namespace

const at::Generator& default_generator(int device) {
  static auto* generators = new std::vector<at::Generator>([] {
    std::vector<at::Generator> all;
    for (int device = 0; device < kDevices; ++device) all.push_back(at::make_generator<GeneratorImpl>(device));
    return all;
  }());
  return (*generators)[device < 0 ? current_device : checked(device)];
}

namespace {
class Hooks final : public at::PrivateUse1HooksInterface {
 public:
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current_device = checked(device); }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    const int before = current_device;
    if (device >= 0) current_device = checked(device);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchangeDevice(device); }

  bool isPinnedPtr(const void* pointer) const override { return Runtime::get().pinned_memory->contains(pointer); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  at::Device getDeviceFromPtr(void* pointer) const override {
    const int device = Runtime::get().device_of(pointer);
    TORCH_CHECK(device >= 0, "simulated device: this is not device memory");
    return {kType, c10::DeviceIndex(device)};
  }

  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override { return default_generator(device); }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return at::make_generator<GeneratorImpl>(device < 0 ? current_device : checked(device));
  }

  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::StorageImpl* resized = storage.unsafeGetStorageImpl();
    const c10::DeviceGuard on(resized->device());
    c10::DataPtr fresh(nullptr, resized->device());
    if (bytes) {
      fresh = device_allocator()->allocate(bytes);
      if (const size_t kept = std::min<size_t>(bytes, resized->nbytes()))
        device_allocator()->copy_data(fresh.get(), resized->data(), kept);
    }
    resized->set_data_ptr_noswap(std::move(fresh));
    resized->set_nbytes(bytes);
  }
};
}  // namespace

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

uint64_t draw_seed(const std::optional<at::Generator>& given, int device) {
  at::Generator generator = given && given->defined() ? *given : default_generator(device);
  TORCH_CHECK(generator.device().type() == kType, "Expected a 'sim' device type for generator but found '",
              generator.device().type(), "'");
  std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get<GeneratorImpl>()->random64();
}

void register_device() {
  install_fault_handler();
  c10::SetAllocator(kType, device_allocator());
  at::setHostAllocator(kType, pinned_allocator());
  at::RegisterPrivateUse1HooksInterface(new Hooks);
}

}  // namespace sim
