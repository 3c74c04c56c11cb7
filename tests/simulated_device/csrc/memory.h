// Memory that two look at: one file, mapped once for the host's eyes and once for the device's.
#pragma once
#include <cstddef>

namespace sim {

constexpr size_t kPage = 4096;
constexpr size_t kArenaBytes = size_t(64) << 30;  // of addresses; pages exist once they are used

enum class Protection { kNone, kRead, kAll };

class Arena {
 public:
  explicit Arena(Protection host);

  bool contains(const void* pointer) const {
    return host_ <= static_cast<const char*>(pointer) && static_cast<const char*>(pointer) < host_ + kArenaBytes;
  }
  // The device's address of what the host calls `pointer`.
  char* device_address(const void* pointer) const { return device_ + (static_cast<const char*>(pointer) - host_); }
  // A new piece, as the host calls it. Pieces are never given back.
  char* extend(size_t bytes);

 private:
  int file_;
  char *host_, *device_;
  size_t used_ = 0;
};

// What the host may do with whole pages of its own mapping.
void protect(char* begin, char* end, Protection protection);

}  // namespace sim
