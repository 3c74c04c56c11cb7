// Pinned host memory. While a copy is not known to be done, the host may not touch what it writes, nor write what it
// reads: the pages are protected, and what happens nevertheless is a race like any other.
#pragma once
#include <ATen/core/CachingHostAllocator.h>

#include <map>
#include <memory>
#include <vector>

#include "runtime.h"

namespace sim {

class PinnedMemory {
 public:
  struct Block;

  static PinnedMemory& get();

  // All with the runtime's lock.
  Block* allocate(size_t bytes);
  void release(Block* block);
  char* address(const Block* block) const;
  void use(const Access& access, const OperationPtr& by);
  void settle(const Clock& host);
  // The host touched what is protected. Reports the race and opens the page.
  void fault(char* address, bool write);

 private:
  Block* find(const char* pointer);
  static void protect_again(Block& block);

  std::map<const char*, std::unique_ptr<Block>> blocks_;
  std::map<size_t, std::vector<Block*>> free_;
  std::vector<Block*> busy_;  // with uses that the host does not know to be over
};

at::HostAllocator* pinned_allocator();
// Faults in memory of ours are told apart from others.
void install_fault_handler();

}  // namespace sim
