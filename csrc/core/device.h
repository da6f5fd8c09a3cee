// The card that a call runs on, seen from the host. Nothing here synchronises.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "host.h"

namespace mamba2 {

// What plans ask of a card. Read once per card.
struct Card {
  int major = 0, minor = 0;  // compute capability
  int sm_count = 1;
  int max_smem_bytes = 0;  // of a block that asks for them
};

// While it lives, the device of `t` is the current one; kernels go to PyTorch's current stream of
// it.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  const Card& card() const { return *card_; }
  void* stream() const { return stream_; }
  // Throws when a launch, or what came before it, failed: `error` is a cudaError_t.
  void check_launch(const char* op, int error) const;

 private:
  struct Guard;
  std::unique_ptr<Guard> guard_;
  int32_t index_ = 0;
  const Card* card_ = nullptr;
  void* stream_ = nullptr;
};

}  // namespace mamba2
