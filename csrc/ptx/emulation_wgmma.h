// wgmma on the host. A warp's quarter of a product runs at any time between its issue (by the last
// lane) and the wait: shared memory is read then. Accumulators in flight hold NaN for readers.
// Warps are not held together by it, so a missing barrier before it shows.
#pragma once
#include "emulation_sm80.h"

namespace mamba2::emulation {

// ---- operands in shared memory, through their descriptors ----
struct Descriptor {
  uint32_t start, leading, stride;
  explicit Descriptor(uint64_t d)
      : start(static_cast<uint32_t>(d & 0x3fff) << 4),
        leading(static_cast<uint32_t>(d >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(d >> 32 & 0x3fff) << 4) {}
};

inline void check_descriptor(uint64_t d, bool mn_major, int extent) {
  const Descriptor t(d);
  if (d >> 62 != 1) fault("wgmma descriptor: the layout is not the 128-byte swizzle");
  if (t.start & 0x380) {
    fault("wgmma descriptor: start %u is not at row 0 of a 1024-byte swizzle atom", t.start);
  }
  const uint32_t row_bytes = mn_major ? static_cast<uint32_t>(std::min(extent, 64)) * 2 : 32;
  if ((t.start & 127) + row_bytes > 128) {
    fault("wgmma descriptor: start %u makes the tile cross its 128-byte rows", t.start);
  }
}

// out[k][i] = element (i, k) of the tile, i < extent (rows of A or columns of B), k < 16.
template <class T>
void read_tile(Block& block, uint64_t descriptor, bool mn_major, int first, int extent, float* out,
               int pitch) {
  const Descriptor t(descriptor);
  const auto unit = [&](uint32_t address, float (&v)[8]) {
    uint32_t pairs[4];
    async_read(block, pairs, window_pointer(block, swizzle_128(address), 16, "wgmma operand"), 16);
    for (int i = 0; i < 4; ++i) {
      const float2 f = operand<T>(pairs[i]);
      v[2 * i] = f.x;
      v[2 * i + 1] = f.y;
    }
  };
  float v[8];
  if (mn_major) {  // rows of 64 i (128 bytes) at one k
    for (int i = first; i < first + extent; i += 8) {
      for (int k = 0; k < 16; ++k) {
        const uint32_t panel = static_cast<uint32_t>(i / 64), row = static_cast<uint32_t>(k);
        unit(t.start + panel * t.leading + row / 8 * t.stride + row % 8 * 128 +
                 static_cast<uint32_t>(i % 64) * 2,
             v);
        std::memcpy(out + k * pitch + (i - first), v, sizeof v);
      }
    }
  } else {  // rows of 64 k (128 bytes) at one i
    for (int i = first; i < first + extent; ++i) {
      const uint32_t row = static_cast<uint32_t>(i);
      for (int half = 0; half < 2; ++half) {
        unit(t.start + row / 8 * t.stride + row % 8 * 128 + static_cast<uint32_t>(half) * 16, v);
        for (int k = 0; k < 8; ++k) out[(half * 8 + k) * pitch + (i - first)] = v[k];
      }
    }
  }
}

// ---- accumulators: lane t of a warp holds element i at row t/4 + 8 ((i>>1)&1),
//      column 8 (i/4) + 2 (t%4) + (i&1) of the warp's 16 rows ----
template <class F>
void for_each_accumulator(int lane, int n, F&& at) {
  for (int i = 0; i < n / 2; ++i) {
    at(i, (lane / 4 + 8 * (i >> 1 & 1)) * n + 8 * (i / 4) + 2 * (lane % 4) + (i & 1));
  }
}

template <class T>
void execute(const Warp& w, PendingProduct& p) {
  const Product& q = p.product;
  float a[16][16], b[16 * 256];  // [row][k], [k][column]
  if (q.a_in_registers) {
    for (int lane = 0; lane < 32; ++lane) unpack_a<T>(a, lane, p.a[lane]);
  } else {
    float by_k[16][16];
    read_tile<T>(*w.block, q.a, q.transpose_a, w.index % 4 * 16, 16, by_k[0], 16);
    for (int k = 0; k < 16; ++k) {
      for (int row = 0; row < 16; ++row) a[row][k] = by_k[k][row];
    }
  }
  read_tile<T>(*w.block, q.b, q.transpose_b, 0, q.n, b, q.n);
  std::vector<float>& d = p.tile->value;
  if (!q.accumulate) std::fill(d.begin(), d.end(), 0.0f);
  multiply_add(d.data(), a[0], b, q.n);
  p.executed = true;
}
// In order, up to product number `end`, as far as all lanes have issued.
inline void execute_until(Warp& w, int end) {
  for (int i = 0; i < end - w.first_product; ++i) {
    PendingProduct& p = w.products[static_cast<size_t>(i)];
    if (p.executed) continue;
    if (p.product.half_type) {
      execute<f16>(w, p);
    } else {
      execute<bf16>(w, p);
    }
  }
}

// What an accumulator in flight reads as: a signalling NaN, which any arithmetic changes.
constexpr uint32_t kInFlight = 0x7f9a5a5a;

// ---- issue ----
// The tile that this lane's accumulators belong to: one in flight, or a new one.
inline AccumulatorTile* tile_of(Warp& w, int lane, const float* d, int n) {
  auto& tiles = w.tiles;
  for (auto& t : tiles) {
    if (t->in_flight && t->lane[lane] == d && t->n == n) return t.get();
  }
  size_t settled = 0;
  for (auto& t : tiles) settled += !t->in_flight;
  for (size_t i = 0; settled > 16; ++i) {  // forget the oldest
    if (tiles[i]->in_flight) continue;
    tiles.erase(tiles.begin() + static_cast<std::ptrdiff_t>(i--));
    --settled;
  }
  tiles.push_back(std::make_unique<AccumulatorTile>());
  tiles.back()->n = n;
  tiles.back()->value.resize(static_cast<size_t>(16 * n));
  return tiles.back().get();
}

// Without a wgmma_fence since the last wait, registers must be as that wait left them.
inline void check_fence(const Fiber& f, const float* d, const Product& q) {
  if (f.fenced) return;
  const char* message = "wgmma: no wgmma_fence since its registers were last written";
  if (q.a_in_registers || f.products == 0) fault("%s", message);
  for (auto t = f.warp->tiles.rbegin(); t != f.warp->tiles.rend(); ++t) {
    if ((*t)->lane[f.lane] != d || (*t)->n != q.n) continue;
    if ((*t)->in_flight) return;
    bool same = true;
    for_each_accumulator(f.lane, q.n, [&](int i, int at) {
      same &= std::memcmp(&d[i], &(*t)->value[static_cast<size_t>(at)], 4) == 0;
    });
    if (same) return;
    break;
  }
  fault("%s", message);
}

inline void issue_product(const Product& q, float* d, const uint32_t* a) {
  Fiber& f = *grid->current;
  Warp& w = *f.warp;
  const int number = f.products++;
  check_fence(f, d, q);
  if (number == w.first_product + static_cast<int>(w.products.size())) {  // the first lane
    if (grid->threads < (w.index / 4 + 1) * 128) fault("wgmma: not a whole warpgroup");
    if (!q.a_in_registers) check_descriptor(q.a, q.transpose_a, 64);
    check_descriptor(q.b, q.transpose_b, q.n);
    PendingProduct& fresh = w.products.emplace_back();
    fresh.product = q;
    fresh.tile = tile_of(w, f.lane, d, q.n);
    fresh.tile->last_product = number;
    auto& issued = w.block->warpgroup_products[static_cast<size_t>(w.index / 4)];
    if (number == static_cast<int>(issued.size())) {
      issued.push_back(q);
    } else if (!issued[static_cast<size_t>(number)].same_as(q)) {
      fault("wgmma: the warps of a warpgroup issue different products");
    }
  }
  PendingProduct& p = w.products[static_cast<size_t>(number - w.first_product)];
  if (!p.product.same_as(q)) fault("wgmma: the lanes of a warp issue different products");
  if (a) std::memcpy(p.a[f.lane], a, 16);
  AccumulatorTile& t = *p.tile;
  if (!t.lane[f.lane]) {
    t.lane[f.lane] = d;
    for_each_accumulator(f.lane, q.n, [&](int i, int at) {
      t.value[static_cast<size_t>(at)] = d[i];
      std::memcpy(&d[i], &kInFlight, 4);
    });
  } else if (t.lane[f.lane] != d) {
    fault("wgmma: the lanes of a warp disagree about the accumulators");
  }
  p.lanes |= 1u << f.lane;
  if (p.lanes == 0xffffffffu && at_once()) execute_until(w, number + 1);
}

// ---- completion ----
inline void write_back(AccumulatorTile& t) {
  for (int lane = 0; lane < 32; ++lane) {
    for_each_accumulator(lane, t.n, [&](int i, int at) {
      if (std::memcmp(&t.lane[lane][i], &kInFlight, 4) != 0) {
        fault("wgmma: lane %d wrote an accumulator before the product was waited for", lane);
      }
      t.lane[lane][i] = t.value[static_cast<size_t>(at)];
    });
  }
  t.in_flight = false;
}

inline void commit_products() {
  Fiber& f = *grid->current;
  Warp& w = *f.warp;
  for (int i = f.committed_products; i < f.products; ++i) {
    int& group = w.products[static_cast<size_t>(i - w.first_product)].group;
    if (group >= 0 && group != f.product_groups) fault("wgmma: lanes commit different groups");
    group = f.product_groups;
  }
  f.committed_products = f.products;
  ++f.product_groups;
  yield_sometimes();
}

inline void wait_products(int pending) {
  Fiber* mine = grid->current;
  meet_warp("wgmma_wait_group", mine, [pending](void** args) {
    Fiber& f = *static_cast<Fiber*>(args[0]);
    Warp& w = *f.warp;
    for (int i = 1; i < 32; ++i) {
      const Fiber& other = *static_cast<Fiber*>(args[i]);
      if (other.products != f.products || other.product_groups != f.product_groups) {
        fault("wgmma: the lanes of a warp have issued different numbers of products or groups");
      }
    }
    size_t n = 0;
    while (n < w.products.size() && w.products[n].group >= 0 &&
           w.products[n].group < f.product_groups - pending) {
      ++n;
    }
    const int end = w.first_product + static_cast<int>(n);
    execute_until(w, end);
    w.products.erase(w.products.begin(), w.products.begin() + static_cast<std::ptrdiff_t>(n));
    w.first_product = end;
    for (auto& t : w.tiles) {
      if (t->in_flight && t->last_product < end) write_back(*t);
    }
    if (n > 0) {
      for (int i = 0; i < 32; ++i) static_cast<Fiber*>(args[i])->fenced = false;
    }
  });
}

inline void check_products_at_exit(const Block& block) {
  for (const Warp& w : block.warps) {
    if (!w.products.empty()) fault("block ended with wgmma products that nobody waited for");
    const auto& issued = block.warpgroup_products[static_cast<size_t>(w.index / 4)];
    if (w.first_product != static_cast<int>(issued.size())) {
      fault("wgmma: the warps of a warpgroup issued different numbers of products");
    }
  }
}

template <class T, int N>
Product product(uint64_t a, uint64_t b, bool registers, bool ta, bool tb, bool accumulate) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "n of wgmma");
  return {a, b, N, registers, ta, tb, accumulate, std::is_same_v<T, f16>};
}

}  // namespace mamba2::emulation

namespace mamba2::ptx {

template <class T, int N, bool kTransposeB>
struct WgmmaRs {
  static void run(float (&d)[N / 2], const uint32_t* a, uint64_t b, bool accumulate) {
    emulation::issue_product(emulation::product<T, N>(0, b, true, false, kTransposeB, accumulate),
                             d, a);
  }
};
template <class T, int N, bool kTransposeA, bool kTransposeB>
struct WgmmaSs {
  static void run(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    emulation::issue_product(
        emulation::product<T, N>(a, b, false, kTransposeA, kTransposeB, accumulate), d, nullptr);
  }
};

inline void wgmma_fence() { emulation::grid->current->fenced = true; }
inline void wgmma_commit_group() { emulation::commit_products(); }
template <int kPending>
void wgmma_wait_group() {
  emulation::wait_products(kPending);
}
template <class Register, int N>
void wgmma_fence_operand(Register (&)[N]) {}

inline uint64_t wgmma_descriptor(const void* tile, uint32_t leading_bytes, uint32_t stride_bytes) {
  return uint64_t((smem_address(tile) & 0x3FFFF) >> 4) | uint64_t(leading_bytes >> 4) << 16 |
         uint64_t(stride_bytes >> 4) << 32 | uint64_t(1) << 62;
}

inline void stmatrix_x4(void* smem_row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  emulation::store_matrices(smem_row, {r0, r1, r2, r3}, false, "stmatrix_x4");
}
inline void stmatrix_x4_trans(void* smem_row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  emulation::store_matrices(smem_row, {r0, r1, r2, r3}, true, "stmatrix_x4_trans");
}

}  // namespace mamba2::ptx
