// Independent tasks over PyTorch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

namespace mamba2::cpu {

// Calls task(i, scratch) for every i in [0, count), each worker with a scratch of its own from
// make_scratch(). Which worker runs which task is left open, so a task may depend on i alone.
template <class MakeScratch, class Task>
void parallel_tasks(int64_t count, const MakeScratch& make_scratch, const Task& task) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t workers = std::min(threads, count);
  std::atomic<int64_t> next{0};
  std::exception_ptr error;  // parallel_for would keep the fact and lose the message
  std::mutex error_mutex;
  const auto work = [&](int64_t begin, int64_t end) {
    try {
      for (int64_t worker = begin; worker < end; ++worker) {
        auto scratch = make_scratch();
        for (int64_t i; (i = next.fetch_add(1)) < count;) task(i, scratch);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      error = std::current_exception();
    }
  };
  if (workers == 1) {
    work(0, 1);
  } else if (workers > 1) {
    torch::stable::parallel_for(0, workers, 1, work);
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace mamba2::cpu
