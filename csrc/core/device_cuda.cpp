#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <mutex>

#include "device.h"

// The archs of this build, as TORCH_CUDA_ARCH_LIST names them.
#ifndef MAMBA2_ARCHS
#define MAMBA2_ARCHS ""
#endif

namespace mamba2 {
namespace {

// PyTorch's C function, found in the library that is already loaded when there is a CUDA tensor:
// linking to libtorch_cuda would tie this library to builds of torch with CUDA.
void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Function>(symbol);
  }();
  void* stream = nullptr;
  check(function && function(device, &stream) == 0, "mamba2_cuda: PyTorch gave no CUDA stream");
  return stream;
}

Card read_card(int32_t device) {
  Card card;
  const auto read = [&](cudaDeviceAttr attribute, int& value) {
    const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
    check(error == cudaSuccess, "cuda:", device, ": ", cudaGetErrorString(error));
  };
  read(cudaDevAttrComputeCapabilityMajor, card.major);
  read(cudaDevAttrComputeCapabilityMinor, card.minor);
  read(cudaDevAttrMultiProcessorCount, card.sm_count);
  read(cudaDevAttrMaxSharedMemoryPerBlockOptin, card.max_smem_bytes);
  return card;
}

const Card& card_of(int32_t device) {
  constexpr std::size_t kMaxDevices = 128;
  static std::array<Card, kMaxDevices> cards;
  static std::array<std::once_flag, kMaxDevices> read;
  check(device >= 0 && device < int32_t{kMaxDevices}, "cuda:", device, ": no such device");
  const auto i = static_cast<std::size_t>(device);
  std::call_once(read[i], [&] { cards[i] = read_card(device); });
  return cards[i];
}

bool no_kernel_for_card(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
         error == cudaErrorUnsupportedPtxVersion || error == cudaErrorInvalidPtx;
}

}  // namespace

struct OnDevice::Guard {
  torch::stable::accelerator::DeviceGuard guard;
};

OnDevice::OnDevice(const Tensor& t)
    : index_(t.get_device_index()), card_(&card_of(index_)), stream_(current_stream(index_)) {
  guard_.reset(new Guard{torch::stable::accelerator::DeviceGuard(index_)});
}
OnDevice::~OnDevice() = default;

void OnDevice::check_launch(const char* op, int code) const {
  if (code == 0) return;
  const auto error = static_cast<cudaError_t>(code);
  cudaGetLastError();  // said here, so that no later call says it again
  if (no_kernel_for_card(error)) {
    fail(op, ": this build of mamba2_cuda has kernels for ", MAMBA2_ARCHS,
         ", none for cuda:", index_, " of compute capability ", card_->major, ".", card_->minor,
         "; build it with TORCH_CUDA_ARCH_LIST=", card_->major, ".", card_->minor);
  }
  fail(op, ": CUDA error on cuda:", index_, ": ", cudaGetErrorString(error));
}

}  // namespace mamba2
