#include "allocator.h"

#include <cstring>
#include <map>
#include <unordered_map>

namespace sim {

namespace {
constexpr size_t kGranularity = 512;  // as CUDA's
constexpr size_t kDefaultLimit = size_t(4) << 30;

struct Block {
  char* begin;
  size_t bytes;
  int stream;                    // whose order protects its reuse
  bool reserved = true;          // not given back by `emptyCache`
  std::vector<int> also_used_on; // by record_stream
  std::vector<std::pair<int, Seq>> leaving;  // freed, and once these tasks have ended it serves again
};

struct Figures {
  int64_t allocated = 0, allocated_peak = 0, reserved = 0, reserved_peak = 0, count = 0, freed = 0, limit = kDefaultLimit;
};

class Allocator final : public c10::DeviceAllocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const int device = current_device;
    if (!bytes) return {nullptr, nullptr, &free_block, as_device(device)};
    const std::string origin = Runtime::get().origin();
    Lock lock(Runtime::get().mutex);
    Block* block = take(lock, origin, (bytes + kGranularity - 1) / kGranularity * kGranularity, device);
    return {block->begin, block, &free_block, as_device(device)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    Runtime& runtime = Runtime::get();
    char *target = runtime.device_address(to), *source = runtime.device_address(from);
    runtime.enqueue(current_streams[runtime.device_of(to)], "copy of a storage",
                    {{static_cast<const char*>(from), bytes, false}, {static_cast<char*>(to), bytes, true}},
                    [=] { memcpy(target, source, bytes); });
  }

  bool initialized() override { return true; }

  void emptyCache(c10::MempoolId_t) override {
    Lock lock(Runtime::get().mutex);
    give_back_all();
  }

  void recordStream(const c10::DataPtr& pointer, c10::Stream stream) override {
    Lock lock(Runtime::get().mutex);
    auto found = live_.find(pointer.get());
    if (found != live_.end() && found->second->stream != index_of(stream))
      found->second->also_used_on.push_back(index_of(stream));
  }

  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    Lock lock(Runtime::get().mutex);
    const Figures& figures = figures_[device];
    c10::CachingDeviceAllocator::DeviceStats stats;
    auto fill = [](auto& stat, int64_t current, int64_t peak, int64_t total) {
      stat[0].current = current;
      stat[0].peak = peak;
      stat[0].allocated = total;
      stat[0].freed = total - current;
    };
    fill(stats.allocated_bytes, figures.allocated, figures.allocated_peak, figures.allocated);
    fill(stats.requested_bytes, figures.allocated, figures.allocated_peak, figures.allocated);
    fill(stats.active_bytes, figures.allocated, figures.allocated_peak, figures.allocated);
    fill(stats.reserved_bytes, figures.reserved, figures.reserved_peak, figures.reserved);
    fill(stats.allocation, figures.count - figures.freed, figures.count - figures.freed, figures.count);
    return stats;
  }

  void resetAccumulatedStats(c10::DeviceIndex) override {}

  void resetPeakStats(c10::DeviceIndex device) override {
    Lock lock(Runtime::get().mutex);
    figures_[device].allocated_peak = figures_[device].allocated;
    figures_[device].reserved_peak = figures_[device].reserved;
  }

  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) {
    Lock lock(Runtime::get().mutex);
    return {figures_[device].limit - figures_[device].reserved, figures_[device].limit};
  }

  void set_limit(int device, size_t bytes) {
    Lock lock(Runtime::get().mutex);
    figures_[device].limit = static_cast<int64_t>(bytes);
  }

  void release(Block* block) {
    Lock lock(Runtime::get().mutex);
    live_.erase(block->begin);
    Figures& figures = figures_[block->stream % kDevices];
    figures.allocated -= block->bytes;
    ++figures.freed;
    for (int stream : block->also_used_on) block->leaving.emplace_back(stream, Runtime::get().stream(stream).issued);
    block->also_used_on.clear();
    if (block->leaving.empty())
      free_[{block->stream, block->bytes}].push_back(block);
    else
      leaving_.push_back(block);
  }

 private:
  static c10::Device as_device(int device) { return {c10::DeviceType::PrivateUse1, c10::DeviceIndex(device)}; }
  static void free_block(void* block);

  Block* take(Lock& lock, const std::string& origin, size_t bytes, int device) {
    Runtime& runtime = Runtime::get();
    for (size_t i = 0; i < leaving_.size();) {
      Block* block = leaving_[i];
      auto ended = [&](const std::pair<int, Seq>& task) { return runtime.done(task.first, task.second); };
      if (std::all_of(block->leaving.begin(), block->leaving.end(), ended)) {
        free_[{block->stream, block->bytes}].push_back(block);
        leaving_.erase(leaving_.begin() + i);
      } else {
        ++i;
      }
    }
    const int stream = current_streams[device];
    auto& fitting = free_[{stream, bytes}];
    Block* block;
    if (fitting.empty() || !fitting.back()->reserved) reserve(device, bytes);
    if (fitting.empty()) {
      block = new Block{runtime.device_memory[device]->extend(bytes), bytes, stream};
    } else {
      block = fitting.back();
      fitting.pop_back();
      block->reserved = true;
    }
    // The allocator has seen that these ended: reuse is ordered after them, but nothing else is.
    Clock seen;
    for (auto& [user, seq] : block->leaving) seen.learn(user, seq);
    block->leaving.clear();
    live_[block->begin] = block;
    Figures& figures = figures_[device];
    figures.allocated += bytes;
    figures.allocated_peak = std::max(figures.allocated_peak, figures.allocated);
    ++figures.count;
    char* memory = runtime.device_address(block->begin);
    runtime.enqueue(lock, origin, stream, "allocation", {{block->begin, bytes, true}},
                    [memory, bytes] { memset(memory, 0xFF, bytes); }, &seen);  // NaN
    return block;
  }

  void reserve(int device, size_t bytes) {
    Figures& figures = figures_[device];
    if (figures.reserved + static_cast<int64_t>(bytes) > figures.limit) give_back_all();
    TORCH_CHECK_WITH(OutOfMemoryError, figures.reserved + static_cast<int64_t>(bytes) <= figures.limit,
                     "sim out of memory. Tried to allocate ", bytes, " bytes on sim:", device, ", which has ",
                     figures.limit, ", of which ", figures.allocated, " are in use");
    figures.reserved += bytes;
    figures.reserved_peak = std::max(figures.reserved_peak, figures.reserved);
  }

  void give_back_all() {
    for (auto& [of, blocks] : free_)
      for (Block* block : blocks)
        if (block->reserved) {
          block->reserved = false;
          figures_[of.first % kDevices].reserved -= block->bytes;
        }
  }

  std::unordered_map<const void*, Block*> live_;
  std::map<std::pair<int, size_t>, std::vector<Block*>> free_;  // by stream and size; the last one freed serves first
  std::vector<Block*> leaving_;
  Figures figures_[kDevices];
};

Allocator& allocator() {
  static Allocator* allocator = new Allocator;
  return *allocator;
}

void Allocator::free_block(void* block) {
  if (block) allocator().release(static_cast<Block*>(block));
}
}  // namespace

c10::DeviceAllocator* device_allocator() { return &allocator(); }
void set_memory_limit(int device, size_t bytes) { allocator().set_limit(device, bytes); }

}  // namespace sim
