// Are the emulator's threads, memory and instructions what CUDA's manuals say? What each function of simt.cuh does,
// against plain loops and the formulas of the PTX manual; then panel.cuh and products.cuh, which are built on them.
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "emulator_checks.h"

namespace vitadapter::test {
namespace emulated {
namespace {

// ---- threads

void check_threads_run_once() {
  const std::pair<int64_t, int> grids[] = {{1, 32}, {3, 64}, {100, 32}, {7, 256}, {2, 1024}};
  for (auto [blocks, threads] : grids) {
    for (int order = 0; order < 3; ++order) {
      settings.order = uint64_t(order);
      std::vector<int> runs(size_t(blocks * threads));
      int wrong = 0;
      const int64_t blocks_before = statistics.blocks;
      run_kernel(blocks, threads, 0, [&, blocks = blocks, threads = threads] {
        const int thread = thread_index();
        wrong += block_count() != blocks || thread_count() != threads || lane_index() != thread % 32 ||
                 warp_index() != thread / 32;
        ++runs[size_t(block_index() * threads + thread)];
      });
      expect(std::count(runs.begin(), runs.end(), 1) == int64_t(runs.size()), "each of %ld × %d threads runs once",
             long(blocks), threads);
      expect(wrong == 0, "threads know who they are");
      expect(statistics.blocks - blocks_before == blocks, "blocks are counted");
    }
  }
}

// Who runs after whom: by its start and after each of two barriers, as block · 1000 + thread.
std::vector<int64_t> interleaving(uint64_t order) {
  std::vector<int64_t> trace;
  settings.order = order;
  run_kernel(4, 96, 0, [&] {
    for (int phase = 0; phase < 3; ++phase) {
      trace.push_back(block_index() * 1000 + thread_index());
      sync_threads();
    }
  });
  return trace;
}

void check_orders() {
  std::set<std::vector<int64_t>> orders;
  std::set<int64_t> first_blocks;
  for (uint64_t order = 0; order < 20; ++order) {
    const std::vector<int64_t> trace = interleaving(order);
    expect(trace == interleaving(order), "order %d is the same again", int(order));
    orders.insert(trace);
    first_blocks.insert(trace[0] / 1000);
  }
  expect(orders.size() == 20, "20 orders are 20 interleavings");
  expect(first_blocks.size() == 4, "every block is the first one in some order");
}

// Threads that write, wait and read what others wrote, `phases` times; how many reads found another phase's value.
int64_t stale_reads(int64_t blocks, int threads, int phases) {
  int64_t stale = 0;
  run_kernel(blocks, threads, threads * int64_t(sizeof(int)), [&] {
    int* const written = reinterpret_cast<int*>(dynamic_shared());
    for (int phase = 0; phase < phases; ++phase) {
      written[thread_index()] = phase;
      sync_threads();
      for (int t = 0; t < threads; ++t) stale += written[t] != phase;
      sync_threads();
    }
  });
  return stale;
}

void check_barriers() {
  settings.order = 1;
  statistics.sites.clear();
  expect(stale_reads(3, 96, 25) == 0, "what is written before a barrier is there after it");
  expect(statistics.sites.size() == 2, "two barriers are two sites, not %zu", statistics.sites.size());
  const auto sites = statistics.sites;
  for (const auto& [site, times] : sites) {
    expect(times == 3 * 96 * 25, "a site is counted: %ld times", long(times));
    expect(!std::strcmp(site.file, __FILE__), "a site is where the kernel is");
    settings.ignored_site = site;
    statistics.sites.clear();
    expect(stale_reads(3, 96, 25) > 0, "an ignored barrier in line %d is missed", site.line);
    expect(statistics.sites == sites, "an ignored barrier is counted");
  }
  settings.ignored_site = {};

  // Barriers of one warp while the others are in other rounds.
  int wrong = 0;
  run_kernel(2, 128, 128 * sizeof(int), [&] {
    int* const written = reinterpret_cast<int*>(dynamic_shared()) + warp_index() * 32;
    for (int round = 0; round < 4 + 5 * warp_index(); ++round) {
      written[lane_index()] = round;
      sync_warp();
      for (int lane = 0; lane < 32; ++lane) wrong += written[lane] != round;
      sync_warp();
    }
  });
  expect(wrong == 0, "what a warp writes before __syncwarp is there after it");
}

void check_exchanges() {
  for (int order = 0; order < kOrders; ++order) {
    settings.order = uint64_t(order);
    constexpr int kThreads = 96;
    std::vector<uint32_t> values(kThreads), sources(kThreads), got(kThreads), crossed(kThreads * 32u), votes(kThreads);
    for (uint32_t& value : values) value = random_word();
    for (uint32_t& source : sources) source = uint32_t(draw(0, 63));
    run_kernel(1, kThreads, 0, [&] {
      const size_t thread = size_t(thread_index());
      got[thread] = shuffle(values[thread], int(sources[thread]));
      for (int mask = 0; mask < 32; ++mask) {
        crossed[thread * 32 + size_t(mask)] = shuffle_xor(values[thread], mask);
      }
      votes[thread] = ballot(values[thread] & 1);
    });
    int wrong = 0;
    for (size_t thread = 0; thread < kThreads; ++thread) {
      const size_t warp = thread / 32 * 32;
      // A source lane beyond the warp counts modulo 32.
      wrong += got[thread] != values[warp + sources[thread] % 32];
      for (size_t mask = 0; mask < 32; ++mask) {
        wrong += crossed[thread * 32 + mask] != values[warp + (thread % 32 ^ mask)];
      }
      uint32_t expected = 0;
      for (size_t lane = 0; lane < 32; ++lane) expected += (values[warp + lane] & 1) << lane;
      wrong += votes[thread] != expected;
    }
    expect(wrong == 0, "shuffles and votes, order %d", order);
  }

  int came = 0, last = 0;
  run_kernel(3, 64, 0, [&] { last += warp_index() == 1 && is_last_warp(&came, 3); });
  expect(came == 3 && last == 32, "one warp is the last to come, with all its lanes");
}

void check_shared_memory() {
  int wrong = 0;
  run_kernel(5, 64, 1000, [&] {
    VA_SHARED(Floats, one);
    VA_SHARED(Floats, other);
    wrong += !is_poison(&one, sizeof one) || !is_poison(&other, sizeof other);
    wrong += !is_poison(dynamic_shared(), 1000) || reinterpret_cast<uintptr_t>(dynamic_shared()) % 128;
    wrong += !std::isnan(one.value[32]) || !std::isnan(*reinterpret_cast<float*>(dynamic_shared()));
    sync_threads();
    if (thread_index() == 40) {
      for (float& value : one.value) value = 1;
      for (float& value : other.value) value = 2;
      memset(dynamic_shared(), 3, 1000);
    }
    sync_threads();
    for (int i = 0; i < 33; ++i) wrong += one.value[i] != 1 || other.value[i] != 2;
    for (int i = 0; i < 1000; ++i) wrong += dynamic_shared()[i] != 3;
  });
  expect(wrong == 0, "shared memory is one per block, NaN at first, aligned, and a place for each variable");
}

void check_settings() {
  std::set<int64_t> ran;
  const int64_t blocks_before = statistics.blocks;
  settings.last_blocks = 2;
  run_kernel(7, 32, 0, [&] { ran.insert(block_index() * 100 + block_count()); });
  run_kernel(1, 32, 0, [&] { ran.insert(block_index() * 100 + block_count()); });
  expect(ran == std::set<int64_t>{507, 607, 1} && statistics.blocks == blocks_before + 3,
         "last_blocks runs those blocks alone");
  settings = {};
  settings.multiprocessors = 11;
  settings.shared_bytes = 5000;
  settings.capability = 80;
  settings.resident_blocks = 3;
  using Any = Kernel<std::function<void()>>;
  expect(device().multiprocessors == 11 && device().shared_bytes == 5000 && device().capability == 80,
         "the device is as set");
  expect(resident_blocks<Any>(32, 5000) == 3 && resident_blocks<Any>(32, 5001) == 0, "resident_blocks is as set");
  settings = {};
}

// ---- cp.async

void check_copies() {
  // Every size, from a source of just that size.
  std::vector<Bytes> sources;
  for (size_t count = 0; count <= 16; ++count) sources.emplace_back(count);
  int early = 0, late = 0;
  run_kernel(1, 32, 17 * 16, [&] {
    unsigned char* const shared = dynamic_shared();
    if (thread_index() == 0) {
      memset(shared, 1, 17 * 16);
      for (int i = 0; i <= 16; ++i) cp_async16(shared + 16 * i, sources[size_t(i)].block.get(), i);
      early += !is_poison(shared, 17 * 16);
      cp_async_wait(0);  // what is in no group yet is not waited for
      early += !is_poison(shared, 17 * 16);
      cp_async_commit();
      early += !is_poison(shared, 17 * 16);
      cp_async_wait(1);
      early += !is_poison(shared, 17 * 16);
      cp_async_wait(0);
      for (int i = 0; i <= 16; ++i) late += !sources[size_t(i)].are_at(shared + 16 * i);
    }
  });
  expect(early == 0, "the target of cp.async is NaN until the wait");
  expect(late == 0, "cp.async of 0 to 16 bytes, zeros for the rest");

  // Groups come in order, an empty one counts as one, and each thread waits for its own.
  constexpr int kGroups = 7, kEmpty = 3, kCopies = 3, kThreads = 64;
  std::vector<Bytes> rows;
  for (int i = 0; i < kThreads * kGroups * kCopies; ++i) rows.emplace_back(16);
  for (int order = 0; order < kOrders; ++order) {
    settings.order = uint64_t(order);
    int wrong = 0;
    run_kernel(2, kThreads, int64_t(rows.size()) * 16, [&] {
      const int first = thread_index() * kGroups * kCopies;
      const auto there = [&](int group, int copy) {
        const int row = first + group * kCopies + copy;
        const unsigned char* const at = dynamic_shared() + 16 * row;
        return rows[size_t(row)].are_at(at) ? 1 : is_poison(at, 16) ? 0 : -1;
      };
      for (int group = 0; group < kGroups; ++group) {
        for (int copy = 0; copy < kCopies && group != kEmpty; ++copy) {
          const int row = first + group * kCopies + copy;
          cp_async16(dynamic_shared() + 16 * row, rows[size_t(row)].block.get(), 16);
        }
        cp_async_commit();
      }
      for (int pending = kGroups + 1; pending >= 0; --pending) {
        cp_async_wait(pending);
        for (int group = 0; group < kGroups; ++group) {
          for (int copy = 0; copy < kCopies; ++copy) {
            wrong += there(group, copy) != (group < kGroups - pending && group != kEmpty);
          }
        }
        if (pending % 3 == 0) sync_threads();
      }
    });
    expect(wrong == 0, "cp_async_wait(n) leaves the last n groups, order %d", order);
  }
  settings = {};

  bool last_wins = false;
  run_kernel(1, 32, 16, [&] {
    if (thread_index() != 5) return;
    for (size_t i = 0; i < 2; ++i) {
      cp_async16(dynamic_shared(), rows[i].block.get(), 16);
      cp_async_commit();
    }
    cp_async_wait(0);
    last_wins = rows[1].are_at(dynamic_shared());
  });
  expect(last_wins, "of two groups for one place the later is delivered later");
}

// ---- matrices

void check_ldmatrix() {
  for (int order = 0; order < kOrders; ++order) {
    settings.order = uint64_t(order);
    // 32 rows of 8 elements in an order of their own among 40 places.
    uint16_t matrices[4][8][8];
    for (auto& matrix : matrices) {
      for (auto& row : matrix) {
        for (uint16_t& element : row) element = uint16_t(random_word());
      }
    }
    std::vector<int> places(40);
    std::iota(places.begin(), places.end(), 0);
    std::shuffle(places.begin(), places.end(), generator);
    uint32_t plain[32][4], transposed[32][4];
    run_kernel(1, 32, 40 * 16, [&] {
      const size_t lane = size_t(lane_index());
      unsigned char* const row = dynamic_shared() + places[lane] * 16;
      memcpy(row, matrices[lane / 8][lane % 8], 16);
      sync_warp();
      ldmatrix(plain[lane], row);
      ldmatrix_trans(transposed[lane], row);
    });
    // PTX, "Warp-level matrix load instruction: ldmatrix": threads 8i to 8i + 7 give the rows of matrix i; a fragment
    // of a row is in four threads, two elements in each.
    int wrong = 0;
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        for (int i = 0; i < 2; ++i) {
          const int row = lane / 4, column = 2 * (lane % 4) + i;
          wrong += uint16_t(plain[lane][matrix] >> 16 * i) != matrices[matrix][row][column];
          wrong += uint16_t(transposed[lane][matrix] >> 16 * i) != matrices[matrix][column][row];
        }
      }
    }
    expect(wrong == 0, "ldmatrix and ldmatrix.trans, order %d", order);
  }
  settings = {};

  // Rows of 128 bytes without an exchange of units: the 8 rows of each of the 4 matrices share 4 banks.
  const int64_t before = statistics.ldmatrix_conflicts;
  run_kernel(1, 32, 32 * 128, [] {
    uint32_t to[4];
    ldmatrix(to, dynamic_shared() + lane_index() * 128);
  });
  expect(statistics.ldmatrix_conflicts - before == 4 * 7, "bank conflicts of ldmatrix are counted");
}

// The fragments of PTX, "Matrix Fragments for mma.m16n8k16 with floating point type" and "... mma.m16n8k8" (.tf32), in
// its words: element i of a thread's fragment is at (row, col) of the matrix.
struct Place {
  int row, col;
};
struct Lane {
  int groupID, threadID_in_group;

  explicit Lane(int laneid) : groupID(laneid >> 2), threadID_in_group(laneid % 4) {}
  Place a16(int i) const {
    return {i < 2 || (4 <= i && i < 6) ? groupID : groupID + 8, threadID_in_group * 2 + (i & 1) + (i < 4 ? 0 : 8)};
  }
  Place b16(int i) const { return {threadID_in_group * 2 + (i & 1) + (i < 2 ? 0 : 8), groupID}; }
  Place a_tf32(int i) const {
    return {i == 0 || i == 2 ? groupID : groupID + 8, i < 2 ? threadID_in_group : threadID_in_group + 4};
  }
  Place b_tf32(int i) const { return {i == 0 ? threadID_in_group : threadID_in_group + 4, groupID}; }
  Place c(int i) const { return {i < 2 ? groupID : groupID + 8, threadID_in_group * 2 + (i & 1)}; }
};

// Whole numbers, of which no sum is rounded: c + a · b.
struct Product {
  static constexpr int kMostDepth = 16;
  float a[16][kMostDepth], b[kMostDepth][8], c[16][8], expected[16][8];

  explicit Product(int depth) {
    for (auto& row : a) {
      for (float& value : row) value = float(draw(-9, 9));
    }
    for (auto& row : b) {
      for (float& value : row) value = float(draw(-9, 9));
    }
    for (int r = 0; r < 16; ++r) {
      for (int n = 0; n < 8; ++n) {
        expected[r][n] = c[r][n] = float(draw(-1000, 1000));
        for (int k = 0; k < depth; ++k) expected[r][n] += a[r][k] * b[k][n];
      }
    }
  }
  void give(float (&to)[4], int lane) const {
    for (int i = 0; i < 4; ++i) to[i] = c[Lane(lane).c(i).row][Lane(lane).c(i).col];
  }
  int wrong(const float (&from)[4], int lane) const {
    int count = 0;
    for (int i = 0; i < 4; ++i) count += from[i] != expected[Lane(lane).c(i).row][Lane(lane).c(i).col];
    return count;
  }
};

template <typename Math>
uint16_t half_from(float value) {
  return uint16_t(Math::pack(value, 0));
}

template <typename Math>
void check_mma16(const char* name) {
  for (int order = 0; order < kOrders; ++order) {
    settings.order = uint64_t(order);
    const Product product(16);
    int wrong = 0;
    run_kernel(1, 64, 0, [&] {
      const Lane lane(lane_index());
      uint32_t a[4] = {}, b[2] = {};
      for (int i = 0; i < 8; ++i) {
        a[i / 2] |= uint32_t(half_from<Math>(product.a[lane.a16(i).row][lane.a16(i).col])) << 16 * (i % 2);
      }
      for (int i = 0; i < 4; ++i) {
        b[i / 2] |= uint32_t(half_from<Math>(product.b[lane.b16(i).row][lane.b16(i).col])) << 16 * (i % 2);
      }
      float c[4];
      product.give(c, lane_index());
      Math::mma(c, a, b);
      wrong += product.wrong(c, lane_index());
    });
    expect(wrong == 0, "mma.m16n8k16 of %s, order %d: %d wrong", name, order, wrong);

    // As kernels do it: a (16 × 16) in rows; b once as its columns, once in rows and transposed on the way.
    wrong = 0;
    constexpr int kStride = 24;  // elements: 48 bytes
    run_kernel(1, 32, (16 + 8 + 16) * kStride * 2, [&] {
      const int lane = lane_index();
      uint16_t* const a = reinterpret_cast<uint16_t*>(dynamic_shared());
      uint16_t *const b_columns = a + 16 * kStride, *const b_rows = b_columns + 8 * kStride;
      for (int i = lane; i < 256; i += 32) a[i / 16 * kStride + i % 16] = half_from<Math>(product.a[i / 16][i % 16]);
      for (int i = lane; i < 128; i += 32) {
        b_columns[i % 8 * kStride + i / 8] = b_rows[i / 8 * kStride + i % 8] = half_from<Math>(product.b[i / 8][i % 8]);
      }
      sync_warp();
      uint32_t a_words[4], b_words[4], b_transposed[4];
      ldmatrix(a_words, a + lane % 16 * kStride + lane / 16 * 8);
      ldmatrix(b_words, b_columns + lane % 8 * kStride + lane / 8 % 2 * 8);
      ldmatrix_trans(b_transposed, b_rows + lane % 16 * kStride);
      for (const auto& words : {b_words, b_transposed}) {
        float c[4];
        product.give(c, lane);
        Math::mma(c, a_words, words);
        wrong += product.wrong(c, lane);
      }
    });
    expect(wrong == 0, "ldmatrix and mma.m16n8k16 of %s, order %d: %d wrong", name, order, wrong);
  }
  settings = {};
}

void check_mma_tf32() {
  for (int order = 0; order < kOrders; ++order) {
    settings.order = uint64_t(order);
    const Product product(8);
    int wrong = 0;
    run_kernel(1, 64, 0, [&] {
      const Lane lane(lane_index());
      uint32_t a[4], b[2];
      // Anything in the lower 13 bits.
      for (int i = 0; i < 4; ++i) {
        a[i] = bits_of(product.a[lane.a_tf32(i).row][lane.a_tf32(i).col]) | (random_word() & 0x1fffu);
      }
      for (int i = 0; i < 2; ++i) {
        b[i] = bits_of(product.b[lane.b_tf32(i).row][lane.b_tf32(i).col]) | (random_word() & 0x1fffu);
      }
      float c[4];
      product.give(c, lane_index());
      mma_tf32(c, a, b);
      wrong += product.wrong(c, lane_index());
    });
    expect(wrong == 0, "mma.m16n8k8 of tf32, order %d: %d wrong", order, wrong);
  }
  settings = {};
}

// ---- conversions

// To a floating-point format with this many bits in its significand and this least exponent: by a division into steps,
// nearest, ties to even or away from zero. Infinite from half a step above the largest number on.
double round_to_format(double value, int bits, int least_exponent, double largest, bool ties_away) {
  if (value == 0 || !std::isfinite(value)) return value;
  const double step = std::ldexp(1.0, std::max(std::ilogb(value), least_exponent) - (bits - 1));
  const double result = (ties_away ? std::round(value / step) : std::nearbyint(value / step)) * step;
  return std::abs(result) > largest ? std::copysign(std::numeric_limits<double>::infinity(), value) : result;
}
double value_of_half(uint32_t bits, int fraction_bits, int bias) {
  const uint32_t exponents = (1u << (15 - fraction_bits)) - 1;
  const int exponent = int(bits >> fraction_bits & exponents), fraction = int(bits & ((1u << fraction_bits) - 1));
  const double sign = bits & 0x8000u ? -1 : 1;
  if (exponent == int(exponents))
    return fraction ? double(quiet_nan()) : sign * std::numeric_limits<double>::infinity();
  return sign * (exponent ? std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits)
                          : std::ldexp(fraction, 1 - bias - fraction_bits));
}
// Equal with the same sign of zero, or both NaN.
bool same(double one, double other) {
  if (std::isnan(one) || std::isnan(other)) return std::isnan(one) && std::isnan(other);
  return one == other && std::signbit(one) == std::signbit(other);
}

void check_conversions() {
  int wrong_halves = 0;
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    wrong_halves += !same(double(BFloat16::unpack(uint16_t(bits))), value_of_half(bits, 7, 127));
    wrong_halves += !same(double(Float16::unpack(uint16_t(bits))), value_of_half(bits, 10, 15));
  }
  expect(wrong_halves == 0, "unpacking of all bfloat16 and float16: %d wrong", wrong_halves);

  std::vector<float> values = {0.0f, -0.0f, 65504.0f, 65519.99f, 65520.0f, -65520.0f, 3.4e38f, -3.4028235e38f, 1e-45f};
  values.insert(values.end(), {quiet_nan(), std::numeric_limits<float>::infinity(), 0x1p-24f, 0x1p-25f, 0x1.8p-24f});
  for (int i = 0; i < 20000; ++i) {
    uint32_t bits = random_word();
    const int kind = i % 4;
    if (kind == 1) bits = (bits & 0xffff0000u) | 0x8000u;                                 // a tie of bfloat16
    if (kind == 2) bits = (bits & 0xffffe000u) | 0x1000u;                                 // a tie of float16 and tf32
    if (kind == 3) bits = (bits & 0x8fffffffu) | (bits & 1 ? 0x30000000u : 0x40000000u);  // where float16 has numbers
    values.push_back(float_of(bits));
  }
  int wrong_bfloat16 = 0, wrong_float16 = 0, wrong_tf32 = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const float low = values[i], high = values[(i + 7) % values.size()];
    const uint32_t bfloat16 = pack_bfloat16(low, high), float16 = pack_float16(low, high);
    for (int half = 0; half < 2; ++half) {
      const double value = half ? double(high) : double(low);
      wrong_bfloat16 += !same(value_of_half(bfloat16 >> 16 * half & 0xffffu, 7, 127),
                              round_to_format(value, 8, -126, 0x1.fep127, false));
      wrong_float16 +=
          !same(value_of_half(float16 >> 16 * half & 0xffffu, 10, 15), round_to_format(value, 11, -14, 65504, false));
    }
    const uint32_t tf32 = to_tf32(low);
    wrong_tf32 += !same(double(float_of(tf32)), round_to_format(double(low), 11, -126, 0x1.ffcp127, true));
    wrong_tf32 += !std::isnan(low) && (tf32 & 0x1fffu);
  }
  expect(wrong_bfloat16 == 0, "pack_bfloat16: %d wrong", wrong_bfloat16);
  expect(wrong_float16 == 0, "pack_float16: %d wrong", wrong_float16);
  expect(wrong_tf32 == 0, "to_tf32: %d wrong", wrong_tf32);

  double worst = 0;
  for (int i = 0; i < 10000; ++i) {
    // Where the power and the inverse are normal numbers.
    const float x = std::clamp(random_float(30), -125.0f, 125.0f);
    const float power = approximate_exp2(x), inverse = approximate_reciprocal(x);
    worst = std::max({worst, std::abs(double(power) / std::exp2(double(x)) - 1), std::abs(double(inverse) * x - 1)});
  }
  expect(worst < 0x1p-22, "exp2 and reciprocal, off by %g", worst);
}

// ---- panel.cuh

template <int kRowBytes>
void check_bijection() {
  for (int rows : {8, 16, 40}) {
    for (int planes : {1, 2, 3}) {
      std::vector<unsigned char> bytes(size_t(planes * rows * kRowBytes));
      const Panel<kRowBytes> panel{bytes.data(), rows};
      std::vector<int> met(bytes.size() / 16);
      int wrong = 0;
      for (int row = 0; row < rows; ++row) {
        for (int unit = 0; unit < planes * panel.kUnits; ++unit) {
          const int64_t offset = panel.unit(row, unit) - panel.base;
          if (offset < 0 || offset % 16 || offset + 16 > int64_t(bytes.size())) {
            ++wrong;
          } else {
            ++met[size_t(offset / 16)];
          }
        }
      }
      expect(wrong == 0 && std::count(met.begin(), met.end(), 1) == int64_t(met.size()),
             "the units of %d rows of %d bytes in %d planes are all places once", rows, kRowBytes, planes);
    }
  }
}

// Into how many accesses do the banks split one? Shared memory has 32 banks of 4 bytes, a bank gives one word at a
// time, and lanes that read the same word share it.
int splits(const std::vector<int64_t>& offsets, int bytes) {
  std::set<int64_t> words[32];
  for (int64_t offset : offsets) {
    for (int64_t word = offset / 4; word < (offset + bytes) / 4; ++word) words[word % 32].insert(word);
  }
  size_t most = 0;
  for (const auto& bank : words) most = std::max(most, bank.size());
  return int(most);
}

// The most that any access of a warp is split into, over all rows and units where it may begin. The hardware takes 16
// bytes a lane by 8 lanes at a time, and 8 bytes a lane by 16.
struct Splits {
  int one_unit_of_8_rows = 0;    // ldmatrix
  int four_units_of_2_rows = 0;  // 16 bytes a lane: rows g and g + 1
  int two_units_of_4_rows = 0;   // 8 bytes a lane
  int one_unit_of_each_2nd = 0;  // 16 bytes a lane: rows 2t, the same for all g
  int halves_of_even_units = 0;  // 8 bytes a lane: both halves of every second unit of 2 rows
  bool operator==(const Splits&) const = default;
};

template <int kRowBytes>
Splits splits_of_panel() {
  constexpr int kRows = 32, kUnits = 16;
  std::vector<unsigned char> bytes(kRows * kUnits * 16 + 128);
  const Panel<kRowBytes> panel{bytes.data(), kRows};
  Splits most;
  // The lanes of one access: `count` rows, each `row_step` after the last, and from each `units` units in pieces.
  const auto worst = [&](int count, int row_step, int units, int piece, int start_step) {
    int result = 0;
    for (int row = 0; row + count * row_step <= kRows + row_step - 1; row += start_step) {
      for (int unit = 0; unit < kUnits; unit += units) {
        std::vector<int64_t> offsets;
        for (int r = 0; r < count; ++r) {
          for (int i = 0; i < units * 16; i += piece) {
            offsets.push_back(panel.unit(row + r * row_step, unit + i / 16) - panel.base + i % 16);
          }
        }
        result = std::max(result, splits(offsets, piece));
      }
    }
    return result;
  };
  most.one_unit_of_8_rows = worst(8, 1, 1, 16, 8);
  most.four_units_of_2_rows = worst(2, 1, 4, 16, 2);
  most.two_units_of_4_rows = worst(4, 1, 2, 8, 4);
  for (int row = 0; row < kRows && kRowBytes == 128; row += 2) {
    std::vector<int64_t> offsets;
    for (int i = 0; i < 16; ++i) offsets.push_back(panel.unit(row + i / 8, i % 8 & ~1) - panel.base + i % 2 * 8);
    most.halves_of_even_units = std::max(most.halves_of_even_units, splits(offsets, 8));
  }
  most.one_unit_of_each_2nd = std::max(worst(4, 2, 1, 16, 8), worst(4, 2, 1, 16, 1));
  return most;
}

void check_panels() {
  check_bijection<32>();
  check_bijection<64>();
  check_bijection<128>();

  // As found. Without conflicts: rows of 128 bytes, all; rows of 64 bytes, all but 8 bytes a lane from 4 rows × 2
  // units, which takes 2 accesses; rows of 32 bytes, all but 16 bytes a lane from 2 rows × 4 units, which takes 2
  // accesses because 4 units are in 2 planes.
  const auto check = [](int row_bytes, const Splits& found, const Splits& expected) {
    expect(found == expected, "rows of %d bytes: accesses are split into %d, %d, %d, %d", row_bytes,
           found.one_unit_of_8_rows, found.four_units_of_2_rows, found.two_units_of_4_rows, found.one_unit_of_each_2nd);
  };
  check(128, splits_of_panel<128>(), {1, 1, 1, 1, 1});
  check(64, splits_of_panel<64>(), {1, 1, 2, 1});
  check(32, splits_of_panel<32>(), {1, 2, 1, 1});

  int wrong = 0;
  for (int first = 0; first < 64; first += 16) {
    std::set<int> columns;
    for (int place = first; place < first + 16; ++place) columns.insert(quad_order(place));
    wrong += columns.size() != 16 || *columns.begin() != first || *columns.rbegin() != first + 15;
    for (int t = 0; t < 4; ++t) {
      for (int i = 0; i < 4; ++i) wrong += quad_order(first + i / 2 * 8 + 2 * t + i % 2) != first + 4 * t + i;
    }
  }
  expect(wrong == 0, "quad_order gives lane t of two mma the columns 4t to 4t + 3");
}

// ---- products.cuh

// As an operand of `Stored` holds it.
template <typename Stored>
double rounded_to(double value) {
  if constexpr (kSame<Stored, Tf32>) return round_to_format(value, 11, -126, 0x1.ffcp127, true);
  return rounded(value, Stored::kDType);
}
template <typename Stored>
void put(unsigned char* at, double value) {
  if constexpr (Stored::kBytes == 4) {
    const float single = float(value);
    memcpy(at, &single, 4);
  } else {
    const uint16_t half = half_from<Stored>(float(value));
    memcpy(at, &half, 2);
  }
}

// Two warps, each with rows of its own on the left and columns of its own on the right.
template <typename Math, typename Left, int kDepth, int kM, int kN, int kLeftBytes, int kRightBytes>
void check_multiply(const char* name, int order) {
  constexpr int kWarps = 2, kLeftRows = kWarps * 16 * kM + 16, kRightRows = kWarps * 8 * kN + 8;
  constexpr int kLeftPlanes = std::max(1, kDepth * Left::kBytes / kLeftBytes);
  constexpr int kRightPlanes = std::max(1, kDepth * Math::kBytes / kRightBytes);
  constexpr int kLeftSize = kLeftPlanes * kLeftRows * kLeftBytes, kRightSize = kRightPlanes * kRightRows * kRightBytes;
  constexpr bool kInQuads = kSame<Left, Float32> && Math::kBytes == 2;
  settings.order = uint64_t(order);

  std::vector<double> left(kLeftRows * kDepth), right(kRightRows * kDepth), start(kWarps * 16 * kM * 8 * kN);
  for (double& value : left) value = rounded_to<Left>(double(random_float()));
  for (double& value : right) value = rounded_to<Math>(double(random_float()));
  for (double& value : start) value = double(random_float());
  std::vector<double> results(start.size(), double(quiet_nan()));
  run_kernel(1, 32 * kWarps, kLeftSize + kRightSize, [&] {
    const Panel<kLeftBytes> left_panel{dynamic_shared(), kLeftRows};
    const Panel<kRightBytes> right_panel{dynamic_shared() + kLeftSize, kRightRows};
    for (int i = thread_index(); i < kLeftRows * kDepth; i += thread_count()) {
      put<Left>(element<Left>(left_panel, i / kDepth, i % kDepth), left[size_t(i)]);
    }
    for (int i = thread_index(); i < kRightRows * kDepth; i += thread_count()) {
      const int place = i % kDepth, column = kInQuads ? quad_order(place) : place;
      put<Math>(element<Math>(right_panel, i / kDepth, place), right[size_t(i - place + column)]);
    }
    sync_threads();
    const int warp = warp_index();
    float c[kM][kN][4];
    // c (16 kM × 8 kN) of each warp, in rows.
    const auto index = [&](int m, int n, int i) {
      const Place place = Lane(lane_index()).c(i);
      return size_t(((warp * kM + m) * 16 + place.row) * 8 * kN + n * 8 + place.col);
    };
    for (int m = 0; m < kM; ++m) {
      for (int n = 0; n < kN; ++n) {
        for (int i = 0; i < 4; ++i) c[m][n][i] = float(start[index(m, n, i)]);
      }
    }
    multiply<Math, kDepth>(c, LeftPanel<Left, kInQuads, kLeftBytes>{left_panel, 16 + warp * 16 * kM},
                           RightPanel<false, kRightBytes>{right_panel, 8 + warp * 8 * kN});
    for (int m = 0; m < kM; ++m) {
      for (int n = 0; n < kN; ++n) {
        for (int i = 0; i < 4; ++i) results[index(m, n, i)] = double(c[m][n][i]);
      }
    }
  });
  double worst = 0;
  for (int row = 0; row < kWarps * 16 * kM; ++row) {
    const int warp = row / (16 * kM);
    for (int column = 0; column < 8 * kN; ++column) {
      const size_t at = size_t(row * 8 * kN + column);
      double sum = start[at], magnitude = std::abs(sum);
      for (int k = 0; k < kDepth; ++k) {
        double factor = left[size_t((16 + row) * kDepth + k)];
        // What multiply() rounds in registers.
        if constexpr (!kSame<Math, Float32>) factor = rounded_to<Math>(factor);
        const double term = factor * right[size_t((8 + warp * 8 * kN + column) * kDepth + k)];
        sum += term;
        magnitude += std::abs(term);
      }
      const double error = std::abs(results[at] - sum) / magnitude;
      worst = error <= worst ? worst : std::isnan(error) ? HUGE_VAL : error;
    }
  }
  expect(worst < 1e-6, "multiply<%s> of %d × %d × %d in rows of %d and %d bytes: off by %g", name, 16 * kM, 8 * kN,
         kDepth, kLeftBytes, kRightBytes, worst);
}

template <typename Math, typename Left>
void check_products_of(const char* name) {
  check_multiply<Math, Left, 16, 1, 2, 32, 32>(name, 1);
  check_multiply<Math, Left, 32, 1, 4, 64, 128>(name, 2);
  check_multiply<Math, Left, 64, 2, 2, 128, 64>(name, 3);
  check_multiply<Math, Left, 32, 2, 4, 32, 64>(name, 4);
}

void check_products() {
  const int64_t conflicts_before = statistics.ldmatrix_conflicts;
  check_products_of<BFloat16, BFloat16>("BFloat16, BFloat16");
  check_products_of<BFloat16, Float32>("BFloat16, Float32");
  check_products_of<Float16, Float16>("Float16, Float16");
  check_products_of<Float16, Float32>("Float16, Float32");
  check_products_of<Tf32, Float32>("Tf32, Float32");
  check_products_of<Tf32, Tf32>("Tf32, Tf32");
  check_products_of<Float32, Float32>("Float32, Float32");
  check_products_of<Float32, BFloat16>("Float32, BFloat16");
  check_products_of<Float32, Float16>("Float32, Float16");
  expect(statistics.ldmatrix_conflicts == conflicts_before, "no bank conflicts in ldmatrix of panels");
  settings = {};

  int wrong = 0;
  run_kernel(1, 32, 0, [&] {
    const int g = lane_index() / 4, t = lane_index() % 4;
    float tiles[4][4];
    for (int tile = 0; tile < 4; ++tile) {
      for (int i = 0; i < 4; ++i) {
        const Place place = Lane(lane_index()).c(i);
        tiles[tile][i] = float(100 * place.row + quad_order(8 * tile + place.col));
      }
    }
    for (int tile = 0; tile < 4; tile += 2) {
      for (int half = 0; half < 2; ++half) {
        float quad[4];
        take_quad(quad, tiles, tile, half);
        for (int i = 0; i < 4; ++i) wrong += quad[i] != float(100 * (8 * half + g) + 8 * tile + 4 * t + i);
      }
    }
  });
  expect(wrong == 0, "take_quad gives four neighbouring columns");
}

}  // namespace
}  // namespace emulated

int check_emulator() {
  using namespace emulated;
  const auto settings_before = settings;
  const auto statistics_before = statistics;
  void (*const all[])() = {check_threads_run_once,
                           check_orders,
                           check_barriers,
                           check_exchanges,
                           check_shared_memory,
                           check_settings,
                           check_copies,
                           check_ldmatrix,
                           [] { check_mma16<BFloat16>("bfloat16"); },
                           [] { check_mma16<Float16>("float16"); },
                           check_mma_tf32,
                           check_conversions,
                           check_panels,
                           check_products,
                           check_planted_faults,
                           check_demands};
  int number = 0;
  for (const auto check : all) {
    settings = {};
    begin_case(kSeed, number++);
    check();
  }
  settings = settings_before;
  statistics = statistics_before;
  std::printf("emulator: %d checks, %d planted faults caught\n", checks, caught);
  return wrong_checks;
}

}  // namespace vitadapter::test
