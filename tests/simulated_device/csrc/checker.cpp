#include "checker.h"

namespace sim {

namespace {
constexpr size_t kWorthForgetting = 256;  // entries; below, looking through all of them costs less
}

std::string Operation::describe(bool write) const {
  std::string text = "'" + name + "' (" + (write ? "writes" : "reads") + ", stream " + std::to_string(stream) +
                     " of sim:" + std::to_string(device);
  if (!origin.empty()) text += ", at " + origin;
  return text + ")";
}

std::string Checker::check(const OperationPtr& operation, const Clock& clock, const std::vector<Access>& accesses) {
  std::string race;
  if (mode == Mode::kOff) return race;
  for (const Access& access : accesses) {
    const char *begin = access.begin, *end = begin + access.bytes;
    if (begin == end) continue;
    bool noted = false;
    size_t kept = 0;
    for (size_t i = 0; i < history_.size(); ++i) {
      Past& past = history_[i];
      const bool ordered = past.by == operation || clock.knows(past.by->stream, past.by->seq);
      if (race.empty() && !ordered && past.begin < end && begin < past.end && (past.write || access.write))
        race = "RACE between " + past.by->describe(past.write) + " and " + operation->describe(access.write);
      // Whoever is ordered after this write is ordered after all that it is ordered after.
      const bool covered = ordered && access.write && begin <= past.begin && past.end <= end;
      const bool again = ordered && !access.write && !past.write && past.begin == begin && past.end == end &&
                         past.by->stream == operation->stream;
      if (again) {
        past.by = operation;
        noted = true;
      }
      if (!covered) {
        if (kept != i) history_[kept] = std::move(past);
        ++kept;
      }
    }
    history_.resize(kept);
    if (!noted) history_.push_back({begin, end, access.write, operation});
  }
  if (!race.empty()) report(race);
  return race;
}

void Checker::forget(const Clock& host) {
  if (history_.size() < kWorthForgetting) return;
  auto known = [&](const Past& past) { return host.knows(past.by->stream, past.by->seq); };
  history_.erase(std::remove_if(history_.begin(), history_.end(), known), history_.end());
}

}  // namespace sim
