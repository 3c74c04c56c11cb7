// The caching allocator: a block that is freed serves again at once on its stream, and is poisoned before.
#pragma once
#include <c10/core/CachingDeviceAllocator.h>

#include "runtime.h"

namespace sim {

c10::DeviceAllocator* device_allocator();
// So many bytes may be reserved on a device; more is an OutOfMemoryError.
void set_memory_limit(int device, size_t bytes);

// torch's stream and ours: an index is the stream's number on its device * kDevices + the device.
inline int index_of(const c10::Stream& stream) {
  return static_cast<int>(stream.id()) * kDevices + stream.device_index();
}
inline c10::Stream as_stream(int index) {
  return c10::Stream(c10::Stream::UNSAFE, {c10::DeviceType::PrivateUse1, c10::DeviceIndex(index % kDevices)},
                     index / kDevices);
}

}  // namespace sim
