// Bulk and tensor copies on the host.
#pragma once
#include "emulation_mbarrier.h"
#include "emulation_sm80.h"

namespace mamba2::ptx {

// What cuTensorMapEncodeTiled encodes: a strided tensor of 16-bit elements and the box of one copy.
struct alignas(64) TensorMap {
  char* base = nullptr;
  int rank = 0;  // 0: never encoded
  bool swizzle_128 = false;
  int64_t dims[5] = {1, 1, 1, 1, 1};  // elements, innermost first
  int64_t strides[5] = {2};           // bytes
  int box[5] = {1, 1, 1, 1, 1};       // elements
};

}  // namespace mamba2::ptx

namespace mamba2::emulation {

struct TensorCopy {
  ptx::TensorMap map;
  int at[5] = {};
  Block* block;
  uint32_t smem;  // shared-window address of the box
  const char* what;

  int row_bytes() const { return map.box[0] * 2; }
  int rows() const { return map.box[1] * map.box[2] * map.box[3] * map.box[4]; }
  uint32_t bytes() const { return static_cast<uint32_t>(row_bytes() * rows()); }

  // Row `row` of the box in global memory, at coordinate 0; null when it is out of bounds.
  char* global_row(int row) const {
    char* p = map.base;
    for (int d = 1; d < map.rank; ++d) {
      const int64_t c = int64_t{at[d]} + row % map.box[d];
      row /= map.box[d];
      if (c < 0 || c >= map.dims[d]) return nullptr;
      p += c * map.strides[d];
    }
    return p;
  }
  char* unit(int row, int i) const {
    const uint32_t a = smem + static_cast<uint32_t>(row * row_bytes() + i * 16);
    return window_pointer(*block, map.swizzle_128 ? swizzle_128(a) : a, 16, what);
  }
  // Columns [first, last) of the box lie inside the tensor.
  int first() const { return std::max(0, std::min(map.box[0], -at[0])); }
  int last() const {
    const int64_t left = map.dims[0] - at[0];
    return static_cast<int>(std::max<int64_t>(first(), std::min<int64_t>(map.box[0], left)));
  }

  void load() const {
    for (int r = 0; r < rows(); ++r) {
      char row[512] = {};
      if (const char* g = global_row(r)) {
        std::memcpy(row + first() * 2, g + (int64_t{at[0]} + first()) * 2,
                    static_cast<size_t>(last() - first()) * 2);
      }
      for (int i = 0; i < row_bytes() / 16; ++i) async_write(*block, unit(r, i), row + i * 16, 16);
    }
  }
  void read(std::vector<char>& data) const {
    data.resize(bytes());
    char* to = data.data();
    for (int r = 0; r < rows(); ++r) {
      for (int i = 0; i < row_bytes() / 16; ++i, to += 16) async_read(*block, to, unit(r, i), 16);
    }
  }
  void write(const std::vector<char>& data) const {
    for (int r = 0; r < rows(); ++r) {
      char* g = global_row(r);
      if (!g) continue;
      std::memcpy(g + (int64_t{at[0]} + first()) * 2, data.data() + r * row_bytes() + first() * 2,
                  static_cast<size_t>(last() - first()) * 2);
    }
  }
};

inline TensorCopy tensor_copy(const char* what, const ptx::TensorMap* map, int rank, const int* at,
                              const void* smem) {
  TensorCopy c{*map, {}, grid->current->block, 0, what};
  if (map->rank != rank) fault("%s: the tensor map has rank %d", what, map->rank);
  for (int d = 0; d < rank; ++d) c.at[d] = at[d];
  c.smem = window_address(smem, c.bytes(), what);
  if (c.smem % 128) fault("%s: shared address not a multiple of 128", what);
  return c;
}

// What another thread's flag has told this one of, the engines know only behind a fence.
inline void check_acquired(const char* what) {
  if (grid->current->acquired)
    fault("%s: ld_acquire_gpu before it, no fence_proxy_async_global", what);
}
inline void issue_load(const TensorCopy& c, uint64_t* full) {
  check_acquired(c.what);
  MbarrierState& b = load_barrier(full, c.what);
  async_poison(*c.block, c.block->smem + (c.smem - kSharedWindow), c.bytes());
  schedule([c, &b] {
    c.load();
    complete_bytes(b, c.bytes());
  });
}

inline void issue_store(std::function<void(std::vector<char>&)> read,
                        std::function<void(const std::vector<char>&)> write) {
  Fiber* f = grid->current;
  BulkStore s;
  s.read = std::move(read);
  s.write = std::move(write);
  s.group = f->store_groups;
  if (at_once()) {
    s.read(s.data);
    s.was_read = true;
    if (at_once()) {
      s.write(s.data);
      s.write = nullptr;
    }
  }
  f->stores.push_back(std::move(s));
}
inline void issue_store(const TensorCopy& c) {
  issue_store([c](std::vector<char>& data) { c.read(data); },
              [c](const std::vector<char>& data) { c.write(data); });
}

// Brings this thread's store groups before `groups` to having been read, or written as well.
inline void finish_stores(Fiber& f, int groups, bool written) {
  auto& all = f.stores;
  size_t n = 0;
  for (; n < all.size() && all[n].group < groups; ++n) {
    if (!all[n].was_read) all[n].read(all[n].data);
    all[n].was_read = all[n].waited_read = true;
    if (written && all[n].write) all[n].write(all[n].data);
  }
  if (written) all.erase(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(n));
}
// A block must not end while a store may still read its shared memory.
inline void check_stores_at_exit(Fiber& f) {
  for (const BulkStore& s : f.stores) {
    if (!s.waited_read) fault("thread ended before bulk_wait_group_read for its stores");
  }
  for (BulkStore& s : f.stores) {
    if (s.write) s.write(s.data);
  }
  f.stores.clear();
}

}  // namespace mamba2::emulation

namespace mamba2::ptx {

inline void tma_load_3d(void* smem, const TensorMap* map, int c0, int c1, int c2, Mbarrier* full) {
  const int at[3] = {c0, c1, c2};
  emulation::issue_load(emulation::tensor_copy("tma_load_3d", map, 3, at, smem), full);
}
inline void tma_load_4d(void* smem, const TensorMap* map, int c0, int c1, int c2, int c3,
                        Mbarrier* full) {
  const int at[4] = {c0, c1, c2, c3};
  emulation::issue_load(emulation::tensor_copy("tma_load_4d", map, 4, at, smem), full);
}
inline void tma_load_5d(void* smem, const TensorMap* map, int c0, int c1, int c2, int c3, int c4,
                        Mbarrier* full) {
  const int at[5] = {c0, c1, c2, c3, c4};
  emulation::issue_load(emulation::tensor_copy("tma_load_5d", map, 5, at, smem), full);
}
inline void tma_load_4d_once(void* smem, const TensorMap* map, int c0, int c1, int c2, int c3,
                             Mbarrier* full) {
  tma_load_4d(smem, map, c0, c1, c2, c3, full);
}
inline void tma_store_3d(const TensorMap* map, int c0, int c1, int c2, const void* smem) {
  const int at[3] = {c0, c1, c2};
  emulation::issue_store(emulation::tensor_copy("tma_store_3d", map, 3, at, smem));
}
inline void tma_store_4d(const TensorMap* map, int c0, int c1, int c2, int c3, const void* smem) {
  const int at[4] = {c0, c1, c2, c3};
  emulation::issue_store(emulation::tensor_copy("tma_store_4d", map, 4, at, smem));
}

inline void check_bulk(const void* smem, const void* gmem, uint32_t bytes, const char* what) {
  using namespace emulation;
  window_address(smem, bytes, what);
  require_aligned(smem, 16, what);
  require_aligned(gmem, 16, what);
  if (bytes % 16) fault("%s: %u bytes is not a multiple of 16", what, bytes);
}
inline void bulk_load(void* smem, const void* gmem, uint32_t bytes, Mbarrier* full) {
  using namespace emulation;
  check_bulk(smem, gmem, bytes, "bulk_load");
  check_acquired("bulk_load");
  MbarrierState& b = load_barrier(full, "bulk_load");
  Block& block = *grid->current->block;
  async_poison(block, smem, bytes);
  schedule([=, &b, &block] {
    async_write(block, static_cast<char*>(smem), gmem, bytes);
    complete_bytes(b, bytes);
  });
}
inline void bulk_store(void* gmem, const void* smem, uint32_t bytes) {
  check_bulk(smem, gmem, bytes, "bulk_store");
  const char* from = static_cast<const char*>(smem);
  emulation::Block& block = *emulation::grid->current->block;
  emulation::issue_store(
      [=, &block](std::vector<char>& data) {
        data.resize(bytes);
        emulation::async_read(block, data.data(), from, bytes);
      },
      [=](const std::vector<char>& data) { std::memcpy(gmem, data.data(), bytes); });
}
inline void bulk_commit_group() { ++emulation::grid->current->store_groups; }
template <int kPending>
void bulk_wait_group_read() {
  emulation::Fiber& f = *emulation::grid->current;
  emulation::finish_stores(f, f.store_groups - kPending, false);
}
template <int kPending>
void bulk_wait_group() {
  emulation::Fiber& f = *emulation::grid->current;
  emulation::finish_stores(f, f.store_groups - kPending, true);
}
inline void prefetch_tensormap(const TensorMap* map) {
  if (map->rank == 0) emulation::fault("prefetch_tensormap: the map was never encoded");
}
inline void fence_proxy_async_shared() { emulation::grid->current->block->has_proxy_fence = true; }
inline void fence_proxy_async_global() { emulation::grid->current->acquired = false; }

}  // namespace mamba2::ptx
