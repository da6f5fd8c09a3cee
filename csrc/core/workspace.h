// One allocation, handed out in pieces. Built on nothing it only counts, so that the same code says
// how much is needed and where each piece lies.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mamba2 {

class Workspace {
 public:
  static constexpr std::size_t kAlignment = 1024;  // of every piece: what swizzled tiles want

  Workspace() = default;
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}

  // The next piece; nullptr when only counting, or when it has no bytes.
  void* take(std::size_t bytes) {
    void* piece = memory_ && bytes > 0 ? memory_ + bytes_ : nullptr;
    bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }
  template <class T>
  T* take_array(int64_t count) {
    return static_cast<T*>(take(sizeof(T) * static_cast<std::size_t>(count)));
  }
  std::size_t bytes() const { return bytes_; }

 private:
  char* memory_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace mamba2
