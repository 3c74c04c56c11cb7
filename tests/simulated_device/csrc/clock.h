// What is known to have ended: a vector clock over streams.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace sim {

using Seq = int64_t;  // the number of a task on its stream, from 1

// For each stream, the last task that ended before "now" of whoever holds the clock: a stream, an event or the host.
class Clock {
 public:
  bool knows(int stream, Seq seq) const {
    return stream < static_cast<int>(known_.size()) && known_[stream] >= seq;
  }

  void learn(int stream, Seq seq) {
    if (stream >= static_cast<int>(known_.size())) known_.resize(stream + 1, 0);
    known_[stream] = std::max(known_[stream], seq);
  }

  void join(const Clock& other) {
    if (other.known_.size() > known_.size()) known_.resize(other.known_.size(), 0);
    for (size_t i = 0; i < other.known_.size(); ++i) known_[i] = std::max(known_[i], other.known_[i]);
  }

 private:
  std::vector<Seq> known_;
};

}  // namespace sim
