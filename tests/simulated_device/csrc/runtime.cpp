#include "runtime.h"

#include <Python.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include "pinned.h"

namespace sim {

thread_local int current_device = 0;
thread_local int current_streams[kDevices] = {0, 1};

namespace {
// Other threads of the script go on while this one waits for the device.
class WithoutGil {
 public:
  WithoutGil() : thread_(PyGILState_Check() ? PyEval_SaveThread() : nullptr) {}
  ~WithoutGil() {
    if (thread_) PyEval_RestoreThread(thread_);
  }

 private:
  PyThreadState* thread_;
};
}  // namespace

Runtime& Runtime::get() {
  static Runtime* runtime = new Runtime;  // never destroyed: threads of its own use it until the process ends
  return *runtime;
}

Runtime::Runtime() {
  for (auto& arena : device_memory) arena = std::make_unique<Arena>(Protection::kNone);
  pinned_memory = std::make_unique<Arena>(Protection::kAll);
  for (int device = 0; device < kDevices; ++device) make_stream(device, device, Pace::kLate);
}

// --- streams --------------------------------------------------------------------------------------------------------
Stream& Runtime::make_stream(int index, int device, Pace pace) {
  if (index >= static_cast<int>(streams_.size())) streams_.resize(index + 1);
  if (!streams_[index]) {
    streams_[index] = std::make_unique<Stream>();
    Stream& made = *streams_[index];
    made.index = index;
    made.device = device;
    made.pace = pace;
    std::thread([this, &made] { work(made); }).detach();
  }
  return *streams_[index];
}

int Runtime::pooled_stream(int device) {
  Lock lock(mutex);
  const int number = 1 + next_pooled_[device]++ % kPooledStreams;
  return make_stream(number * kDevices + device, device, Pace::kLate).index;
}

int Runtime::communicator_stream(int device) {
  Lock lock(mutex);
  if (!retired_[device].empty()) {
    const int index = retired_[device].back();
    retired_[device].pop_back();
    return index;
  }
  int number = 1 + kPooledStreams;
  while (number * kDevices + device < static_cast<int>(streams_.size()) && streams_[number * kDevices + device])
    ++number;
  return make_stream(number * kDevices + device, device, Pace::kPrompt).index;
}

void Runtime::retire_communicator_stream(int stream) {
  Lock lock(mutex);
  retired_[streams_[stream]->device].push_back(stream);
}

void Runtime::work(Stream& stream) {
  const c10::InferenceMode inference;  // a kernel may write into whatever tensors a script has
  Lock lock(mutex);
  for (;;) {
    for (;;) {
      if (stream.queue.empty()) {
        stream.work.wait(lock);
        continue;
      }
      const Task& next = stream.queue.front();
      const auto due = next.issued + patience;
      if (stream.pace == Pace::kPrompt || next.seq <= stream.wanted || Time::now() >= due) break;
      stream.work.wait_until(lock, due);
    }
    Task task = std::move(stream.queue.front());
    stream.queue.pop_front();
    if (!task.run) {
      want(task.awaited.stream, task.awaited.seq);
      finished_.wait(lock, [&] { return done(task.awaited.stream, task.awaited.seq); });
    } else {
      lock.unlock();
      std::string error;
      try {
        task.run();
      } catch (const c10::Error& raised) {
        error = task.name + ": " + raised.what_without_backtrace();
      } catch (const std::exception& raised) {
        error = task.name + ": " + raised.what();
      }
      task.run = nullptr;  // what it holds is let go without the lock
      lock.lock();
      if (error_.empty()) error_ = error;
    }
    stream.done = task.seq;
    finished_.notify_all();
  }
}

void Runtime::want(int stream, Seq seq) {
  Stream& wanted = *streams_[stream];
  if (seq <= wanted.wanted) return;
  wanted.wanted = seq;
  wanted.work.notify_one();
}

// --- told by the host -------------------------------------------------------------------------------------------------
Point Runtime::enqueue(int stream, const std::string& name, const std::vector<Access>& accesses,
                       std::function<void()> run) {
  const std::string where = origin();
  Lock lock(mutex);
  return enqueue(lock, where, stream, name, accesses, std::move(run));
}

Point Runtime::enqueue(Lock&, const std::string& origin, int index, const std::string& name,
                       const std::vector<Access>& accesses, std::function<void()> run, const Clock* besides) {
  raise_error();
  Stream& stream = *streams_[index];
  const Seq seq = ++stream.issued;
  stream.clock.join(host_);
  stream.clock.learn(index, seq);
  auto operation = std::make_shared<const Operation>(Operation{name, origin, index, stream.device, seq});
  std::string race;
  if (besides) {
    Clock clock = stream.clock;
    clock.join(*besides);
    race = checker.check(operation, clock, accesses);
  } else {
    race = checker.check(operation, stream.clock, accesses);
  }
  for (const Access& access : accesses) PinnedMemory::get().use(access, operation);
  stream.queue.push_back({seq, name, std::move(run), {}, Time::now()});
  if (stream.queue.size() == 1) stream.work.notify_one();
  TORCH_CHECK(race.empty() || checker.mode != Checker::Mode::kRaise, "simulated device: ", race);
  return {index, seq, stream.clock};
}

Point Runtime::now(int index) {
  Lock lock(mutex);
  Stream& stream = *streams_[index];
  stream.clock.join(host_);
  return {index, stream.issued, stream.clock};
}

void Runtime::record(Event& event, int stream) {
  static_cast<Point&>(event) = now(stream);
  event.recorded = Time::now();
}

void Runtime::block(int index, const Point& until) {
  if (until.stream < 0) return;
  Lock lock(mutex);
  Stream& stream = *streams_[index];
  stream.clock.join(until.clock);
  if (until.stream == index || done(until.stream, until.seq)) return;
  const Seq seq = ++stream.issued;
  stream.clock.learn(index, seq);
  stream.queue.push_back({seq, "wait", nullptr, until, Time::now()});
  if (stream.queue.size() == 1) stream.work.notify_one();
}

bool Runtime::query(const Point& point) {
  if (point.stream < 0) return true;
  Lock lock(mutex);
  const bool ended = done(point.stream, point.seq);
  if (ended) host_learns(point.clock);
  return ended;
}

void Runtime::wait(const Point& point) {
  if (point.stream < 0) return;
  WithoutGil without;
  Lock lock(mutex);
  want(point.stream, point.seq);
  finished_.wait(lock, [&] { return done(point.stream, point.seq); });
  host_learns(point.clock);
  raise_error();
}

void Runtime::wait_device(int device) {
  std::vector<int> its;
  {
    Lock lock(mutex);
    for (auto& stream : streams_)
      if (stream && stream->device == device) its.push_back(stream->index);
  }
  for (int stream : its) wait(now(stream));
}

void Runtime::host_learns(const Clock& clock) {
  host_.join(clock);
  PinnedMemory::get().settle(host_);
  checker.forget(host_);
}

void Runtime::raise_error() {
  if (error_.empty()) return;
  const std::string error = std::move(error_);
  error_.clear();
  TORCH_CHECK(false, "simulated device: asynchronous error in ", error);
}

// --- memory -----------------------------------------------------------------------------------------------------------
int Runtime::device_of(const void* pointer) const {
  for (int device = 0; device < kDevices; ++device)
    if (device_memory[device]->contains(pointer)) return device;
  return -1;
}

char* Runtime::device_address(const void* pointer) {
  const int device = device_of(pointer);
  if (device >= 0) return device_memory[device]->device_address(pointer);
  return pinned_memory->contains(pointer) ? pinned_memory->device_address(pointer) : nullptr;
}

}  // namespace sim
