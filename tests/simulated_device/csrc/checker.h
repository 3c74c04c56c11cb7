// Two accesses to the same bytes, one of them a write, must be ordered. Whether they are does not depend on timing.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "clock.h"

namespace sim {

struct Access {
  const char* begin;
  size_t bytes;
  bool write;
};

// A task that touches memory, as it is named in a report.
struct Operation {
  std::string name;
  std::string origin;  // where the script told the device to do it, if that was asked for
  int stream;
  int device;
  Seq seq;

  std::string describe(bool write) const;
};

using OperationPtr = std::shared_ptr<const Operation>;

class Checker {
 public:
  enum class Mode { kOff, kCount, kRaise };

  // What the operation, which runs after all that `clock` knows, races with; empty if with nothing.
  std::string check(const OperationPtr& operation, const Clock& clock, const std::vector<Access>& accesses);
  // What the host knows to have ended cannot race with what comes later.
  void forget(const Clock& host);
  void report(const std::string& race) { races.push_back(race); }

  Mode mode = Mode::kRaise;
  std::vector<std::string> races;

 private:
  struct Past {
    const char *begin, *end;
    bool write;
    OperationPtr by;
  };
  std::vector<Past> history_;
};

}  // namespace sim
