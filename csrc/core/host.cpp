#include "host.h"

#include "macros.h"

namespace mamba2 {
namespace {

constexpr int64_t kReadAlignment = 16;  // bytes of the widest load of any kernel

int64_t element_bytes(ScalarType t) {
  if (const auto dtype = floating_dtype(t)) return static_cast<int64_t>(size_of(*dtype));
  return t == ScalarType::Long ? 8 : t == ScalarType::Int ? 4 : 1;
}

bool aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kReadAlignment == 0;
}

// The contiguous copy is made here and not by aten::contiguous, so that running out of memory says
// so: below torch 2.13 the stable ABI drops the cause of an error.
Tensor copy_of(const Tensor& t) {
  const auto sizes = t.sizes();
  Tensor out = allocate(Sizes(sizes.begin(), sizes.end()), t.scalar_type(), t);
  torch::stable::copy_(out, t);
  return out;
}

}  // namespace

Tensor allocate(const Sizes& sizes, ScalarType dtype, const Tensor& like) {
  int32_t device_type = 0, layout = 0;
  aoti_torch_get_device_type(like.get(), &device_type);
  aoti_torch_get_layout(like.get(), &layout);
  int32_t shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const auto dims = static_cast<int64_t>(sizes.size());
  AtenTensorHandle handle = nullptr;
  AOTITorchError error;
  if (like.is_cuda()) {  // the host is sooner done with it
    Sizes strides(sizes.size(), 1);
    for (int64_t i = dims - 2; i >= 0; --i) {
      strides[i] = strides[i + 1] * std::max<int64_t>(sizes[i + 1], 1);
    }
    error = aoti_torch_empty_strided(dims, sizes.data(), strides.data(), shim_dtype, device_type,
                                     like.get_device_index(), &handle);
  } else {
    error = aoti_torch_aten_new_empty(like.get(), sizes.data(), dims, &shim_dtype, &layout,
                                      &device_type, like.get_device_index(), nullptr, &handle);
  }
  if (error != TORCH_SUCCESS) {
    int64_t bytes = element_bytes(dtype);
    for (const int64_t size : sizes) bytes *= size;
    fail(like.is_cuda() ? "CUDA out of memory" : "out of memory", ": ", ceil_div(bytes, 1 << 20),
         " MiB could not be allocated on ", describe_device(like));
  }
  return Tensor(handle);
}

bool readable_in_place(const Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const int64_t dims = t.dim();
  const int64_t item_bytes = element_bytes(t.scalar_type());
  if (dims == 0 || t.numel() == 0) return true;
  if (sizes[dims - 1] != 1 && strides[dims - 1] != 1) return false;
  for (int64_t i = 0; i + 1 < dims; ++i) {
    if (sizes[i] == 1) continue;
    if (strides[i] <= 0 || strides[i] * item_bytes % kReadAlignment != 0) return false;
  }
  return aligned(t);
}

Tensor compact(const Tensor& t) { return t.is_contiguous() && aligned(t) ? t : copy_of(t); }

// A contiguous tensor of odd sizes is not copied: its copy would lie no better.
Tensor readable(const Tensor& t) { return readable_in_place(t) ? t : compact(t); }

void fill(Tensor to, const OptionalTensor& from) {
  if (!to.defined() || to.numel() == 0) return;
  if (from) {
    torch::stable::copy_(to, *from);
  } else {
    torch::stable::zero_(to);
  }
}

int64_t check_cu_seqlens(const ArgumentCheck& check, const Tensor& cu_seqlens, int64_t b) {
  check.shape("cu_seqlens", cu_seqlens, {{"nseq + 1"}});
  check.dtype("cu_seqlens", cu_seqlens, {ScalarType::Int, ScalarType::Long});
  check.device("cu_seqlens", cu_seqlens);
  if (cu_seqlens.size(0) < 1) check.that(false, "cu_seqlens", "(nseq + 1,)", "(0,)");
  if (b != 1) check.that(false, "x's b", "1 with cu_seqlens", b);
  return cu_seqlens.size(0) - 1;
}

}  // namespace mamba2
