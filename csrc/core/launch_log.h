// What a call would launch: while a LaunchLog lives, launch() on its thread launches nothing and
// writes down what it was asked to. So `explain` runs the very code that runs a problem.
#pragma once
#include <cstddef>
#include <vector>

namespace mamba2 {

// What one block works on at a time, 0 where it does not apply; stages of its ring of copies.
struct BlockTile {
  int tokens = 0, p = 0, n = 0, stages = 0;
};

struct LaunchRecord {
  const char* stage;  // of the Range around it
  unsigned grid[3];
  int threads;
  std::size_t smem_bytes;
  BlockTile tile;
  int registers;  // a thread; -1: not known, there is no such card here
};

class LaunchLog {
 public:
  explicit LaunchLog(bool card_is_here) : card_is_here(card_is_here) { current() = this; }
  ~LaunchLog() { current() = nullptr; }
  LaunchLog(const LaunchLog&) = delete;
  LaunchLog& operator=(const LaunchLog&) = delete;

  // This thread's, or nullptr.
  static LaunchLog*& current() {
    static thread_local LaunchLog* log = nullptr;
    return log;
  }

  const bool card_is_here;
  const char* stage = "";
  std::vector<LaunchRecord> launches;
};

// Part of every Range: the stage that launches belong to while it lives.
class LaunchStage {
 public:
  explicit LaunchStage(const char* name) : log_(LaunchLog::current()) {
    if (!log_) return;
    outer_ = log_->stage;
    log_->stage = name;
  }
  ~LaunchStage() {
    if (log_) log_->stage = outer_;
  }
  LaunchStage(const LaunchStage&) = delete;
  LaunchStage& operator=(const LaunchStage&) = delete;

 private:
  LaunchLog* log_;
  const char* outer_ = "";
};

}  // namespace mamba2
