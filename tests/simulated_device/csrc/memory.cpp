#include "memory.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

namespace sim {

namespace {
int flags_of(Protection protection) {
  switch (protection) {
    case Protection::kNone: return PROT_NONE;
    case Protection::kRead: return PROT_READ;
    case Protection::kAll: break;
  }
  return PROT_READ | PROT_WRITE;
}

char* map(int file, int flags) {
  void* where = mmap(nullptr, kArenaBytes, flags, MAP_SHARED | MAP_NORESERVE, file, 0);
  TORCH_CHECK(where != MAP_FAILED, "simulated device: no addresses for its memory");
  return static_cast<char*>(where);
}
}  // namespace

Arena::Arena(Protection host) : file_(memfd_create("simulated device", MFD_CLOEXEC)) {
  TORCH_CHECK(file_ >= 0 && ftruncate(file_, kArenaBytes) == 0, "simulated device: no file for its memory");
  host_ = map(file_, flags_of(host));
  device_ = map(file_, PROT_READ | PROT_WRITE);
}

char* Arena::extend(size_t bytes) {
  TORCH_CHECK(used_ + bytes <= kArenaBytes, "simulated device: no addresses are left");
  char* piece = host_ + used_;
  used_ += bytes;
  return piece;
}

void protect(char* begin, char* end, Protection protection) {
  if (begin < end) mprotect(begin, end - begin, flags_of(protection));
}

}  // namespace sim
