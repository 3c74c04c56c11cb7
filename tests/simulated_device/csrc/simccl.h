// Collectives of the simulated device, as NCCL does them: in the order of the calls, on a stream of the communicator.
#pragma once
#include <torch/csrc/distributed/c10d/Backend.hpp>

namespace sim {

// `transport`: gloo, of the same ranks. `members`: which they are in the world.
c10::intrusive_ptr<c10d::Backend> make_simccl(c10::intrusive_ptr<c10d::Backend> transport, int rank, int size,
                                              std::vector<int64_t> members);

}  // namespace sim
