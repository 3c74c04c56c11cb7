#include "pinned.h"

#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

namespace sim {

struct PinnedMemory::Block {
  struct Use {
    OperationPtr by;
    char *begin, *end;              // what it touches
    char *first_page, *end_page;    // what is protected for it
    bool write;
  };
  char* begin;
  size_t bytes;     // as asked for
  size_t reserved;  // whole pages
  bool freed = false;
  std::vector<Use> uses;
};

namespace {
char* page_of(char* pointer) { return pointer - reinterpret_cast<uintptr_t>(pointer) % kPage; }
char* next_page(char* pointer) { return page_of(pointer + kPage - 1); }
}  // namespace

PinnedMemory& PinnedMemory::get() {
  static PinnedMemory* memory = new PinnedMemory;
  return *memory;
}

PinnedMemory::Block* PinnedMemory::allocate(size_t bytes) {
  Runtime& runtime = Runtime::get();
  // As torch's: what was let go while a copy used it serves again once that copy has ended.
  for (size_t i = 0; i < busy_.size();) {
    Block* block = busy_[i];
    auto running = [&](const Block::Use& use) { return !runtime.done(use.by->stream, use.by->seq); };
    if (block->freed && std::none_of(block->uses.begin(), block->uses.end(), running)) {
      block->uses.clear();
      protect_again(*block);
      free_[block->reserved].push_back(block);
      busy_.erase(busy_.begin() + i);
    } else {
      ++i;
    }
  }
  const size_t reserved = (bytes + kPage - 1) / kPage * kPage;
  auto& fitting = free_[reserved];
  Block* block;
  if (fitting.empty()) {
    auto fresh = std::make_unique<Block>();
    fresh->begin = runtime.pinned_memory->extend(reserved);
    fresh->reserved = reserved;
    block = fresh.get();
    blocks_[block->begin] = std::move(fresh);
  } else {
    block = fitting.back();
    fitting.pop_back();
  }
  block->bytes = bytes;
  block->freed = false;
  memset(runtime.pinned_memory->device_address(block->begin), 0xFF, reserved);
  return block;
}

void PinnedMemory::release(Block* block) {
  block->freed = true;
  if (block->uses.empty()) free_[block->reserved].push_back(block);
}

char* PinnedMemory::address(const Block* block) const { return block->begin; }

PinnedMemory::Block* PinnedMemory::find(const char* pointer) {
  auto after = blocks_.upper_bound(pointer);
  if (after == blocks_.begin()) return nullptr;
  Block* block = std::prev(after)->second.get();
  return pointer < block->begin + block->reserved ? block : nullptr;
}

void PinnedMemory::use(const Access& access, const OperationPtr& by) {
  if (!access.bytes || !Runtime::get().pinned_memory->contains(access.begin)) return;
  Block* block = find(access.begin);
  if (!block) return;
  char *begin = const_cast<char*>(access.begin), *end = begin + access.bytes;
  // A page that other tensors share is left open: what happens there cannot be told apart by pages.
  char* first_page = begin == block->begin ? begin : next_page(begin);
  char* end_page = end == block->begin + block->bytes ? next_page(end) : page_of(end);
  if (block->uses.empty()) busy_.push_back(block);
  block->uses.push_back({by, begin, end, first_page, end_page, access.write});
  protect_again(*block);
}

void PinnedMemory::protect_again(Block& block) {
  protect(block.begin, block.begin + block.reserved, Protection::kAll);
  for (const Block::Use& use : block.uses)
    if (!use.write) protect(use.first_page, use.end_page, Protection::kRead);
  for (const Block::Use& use : block.uses)
    if (use.write) protect(use.first_page, use.end_page, Protection::kNone);
}

void PinnedMemory::settle(const Clock& host) {
  for (size_t i = 0; i < busy_.size();) {
    Block& block = *busy_[i];
    const size_t before = block.uses.size();
    auto over = [&](const Block::Use& use) { return host.knows(use.by->stream, use.by->seq); };
    block.uses.erase(std::remove_if(block.uses.begin(), block.uses.end(), over), block.uses.end());
    if (block.uses.size() != before) protect_again(block);
    if (block.uses.empty()) {
      if (block.freed) free_[block.reserved].push_back(&block);
      busy_.erase(busy_.begin() + i);
    } else {
      ++i;
    }
  }
}

void PinnedMemory::fault(char* address, bool write) {
  if (Block* block = find(address))
    for (const Block::Use& use : block->uses)
      if (use.begin <= address && address < use.end && (use.write || write)) {
        Runtime::get().checker.report(std::string("RACE between ") + use.by->describe(use.write) + " and the host (" +
                                      (write ? "writes" : "reads") + " pinned memory), which has not waited for it");
        break;
      }
  protect(page_of(address), page_of(address) + kPage, Protection::kAll);
}

// --- for torch ----------------------------------------------------------------------------------------------------
namespace {
void release_pinned(void* block) {
  if (!block) return;
  Lock lock(Runtime::get().mutex);
  PinnedMemory::get().release(static_cast<PinnedMemory::Block*>(block));
}

class HostAllocator final : public at::HostAllocator {
 public:
  at::DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, nullptr, &release_pinned, at::DeviceType::CPU};
    Lock lock(Runtime::get().mutex);
    PinnedMemory::Block* block = PinnedMemory::get().allocate(bytes);
    return {PinnedMemory::get().address(block), block, &release_pinned, at::DeviceType::CPU};
  }
  at::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
  bool record_event(void*, void*, c10::Stream) override { return true; }  // `use` has noted it
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

struct sigaction handler_before;

void say(const char* text) {
  if (write(STDERR_FILENO, text, strlen(text)) < 0) return;
}

void on_fault(int number, siginfo_t* info, void* context) {
  Runtime& runtime = Runtime::get();
  char* address = static_cast<char*>(info->si_addr);
  if (runtime.pinned_memory->contains(address)) {  // raised by an access, never under the lock
    bool write = true;
#if defined(__x86_64__)
    write = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] & 2;
#endif
    Lock lock(runtime.mutex);
    PinnedMemory::get().fault(address, write);
    if (!getenv("SIM_FATAL_RACES")) return;
    say(("\nsimulated device: " + runtime.checker.races.back() + "\n").c_str());
  }
  if (runtime.device_of(address) >= 0)
    say("\nsimulated device: FATAL: the host touches memory of the device. It has to copy it to the host first.\n");
  sigaction(SIGSEGV, &handler_before, nullptr);  // the access is tried again, and ends as it would have
}
}  // namespace

at::HostAllocator* pinned_allocator() {
  static HostAllocator* allocator = new HostAllocator;
  return allocator;
}

void install_fault_handler() {
  Runtime::get();
  PinnedMemory::get();
  struct sigaction ours {};
  ours.sa_sigaction = &on_fault;
  ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  sigaction(SIGSEGV, &ours, &handler_before);
}

}  // namespace sim
