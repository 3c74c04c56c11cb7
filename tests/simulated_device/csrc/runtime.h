// Streams that run late, events, and the host's waits. One lock guards all of it; nobody needs the GIL under it.
#pragma once
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "checker.h"
#include "memory.h"

namespace sim {

constexpr int kDevices = 2;
constexpr int kPooledStreams = 32;  // by device, handed out in turn, as CUDA does
using Time = std::chrono::steady_clock;
using Lock = std::unique_lock<std::mutex>;

// A point of a stream.
struct Point {
  int stream = -1;  // none: nothing was recorded
  Seq seq = 0;
  Clock clock;
};

struct Event : Point {
  Time::time_point recorded;
};

// When a stream begins with a task.
enum class Pace {
  kLate,    // when somebody waits for it, or after a while
  kPrompt,  // as soon as it can: communicators, whose peers wait unseen
};

struct Task {
  Seq seq;
  std::string name;
  std::function<void()> run;  // none: wait for `awaited`
  Point awaited;
  Time::time_point issued;
};

struct Stream {
  int index;
  int device;
  Pace pace;
  std::deque<Task> queue;
  Seq issued = 0, done = 0, wanted = 0;
  Clock clock;
  std::condition_variable work;
};

class Runtime {
 public:
  static Runtime& get();

  // --- told by the host -------------------------------------------------------------------------------------------
  // Something to do on a stream. `besides`: what the operation is ordered after beyond its stream.
  Point enqueue(int stream, const std::string& name, const std::vector<Access>& accesses, std::function<void()> run);
  Point enqueue(Lock& lock, const std::string& origin, int stream, const std::string& name,
                const std::vector<Access>& accesses, std::function<void()> run, const Clock* besides = nullptr);
  void record(Event& event, int stream);
  Point now(int stream);
  void block(int stream, const Point& until);  // the stream waits; the host does not
  bool query(const Point& point);
  void wait(const Point& point);  // the host waits
  void wait_device(int device);
  // Where the script is, if that was asked for. Called without the lock.
  std::string origin() const { return locate ? locate() : std::string(); }

  // --- streams ------------------------------------------------------------------------------------------------------
  int pooled_stream(int device);
  int communicator_stream(int device);
  void retire_communicator_stream(int stream);
  Stream& stream(int index) { return *streams_[index]; }  // with the lock
  bool done(int stream, Seq seq) { return streams_[stream]->done >= seq; }  // with the lock

  // --- memory ---------------------------------------------------------------------------------------------------------
  // The device's address of device or pinned memory, or none.
  char* device_address(const void* pointer);
  int device_of(const void* pointer) const;  // -1: of none

  std::mutex mutex;
  Checker checker;
  std::unique_ptr<Arena> device_memory[kDevices], pinned_memory;
  std::chrono::milliseconds patience{40};  // tasks that nobody waits for run after this long
  std::function<std::string()> locate;

 private:
  Runtime();
  Stream& make_stream(int index, int device, Pace pace);
  void work(Stream& stream);
  void want(int stream, Seq seq);
  void host_learns(const Clock& clock);
  void raise_error();

  std::condition_variable finished_;
  std::vector<std::unique_ptr<Stream>> streams_;  // by index: number of the stream on its device * kDevices + device
  std::vector<int> retired_[kDevices];
  int next_pooled_[kDevices] = {};
  Clock host_;
  std::string error_;  // of a task
};

// The calling thread's, as torch keeps them.
extern thread_local int current_device;
extern thread_local int current_streams[kDevices];

}  // namespace sim
