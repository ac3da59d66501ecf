// How does a CUDA kernel run without a GPU? Every thread of a block is a fiber of one host thread, 32 of them are a
// warp, and blocks run one after the other. A fiber runs until it waits for others, and a generator with a seed says
// who is next: many seeds are many orders, and where a barrier is missing some order shows it. Made to be strict:
//
//   - shared memory begins as NaN in every block and ends where its heap block ends, under AddressSanitizer;
//   - cp.async makes its target NaN and delivers only in the wait;
//   - what the instruction demands is checked: alignment, 16 bytes in shared memory, that all lanes of a warp take part
//     and in the same operation, that everybody comes to the barrier;
//   - `settings.ignored_site` takes one barrier or wait out of a kernel, so that a test can prove that it is missed.
//
// Not shown: threads that meet anywhere but where they wait (a sum read, added to and written back by two of them),
// memory that is slow to become visible, threads that spin on a flag, and anything about time.
#pragma once

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <source_location>
#include <typeinfo>
#include <utility>
#include <vector>

#include "../common/dtype.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define VA_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define VA_ADDRESS_SANITIZER 1
#endif
#endif
#if defined(VA_ADDRESS_SANITIZER)
#include <sanitizer/common_interface_defs.h>
#endif

namespace vitadapter::cuda::emulator {

using Where = std::source_location;

// A barrier or a wait in a kernel's source.
struct Site {
  const char* file = "";
  int line = 0;

  Site() = default;
  Site(const Where& where) : file(where.file_name()), line(int(where.line())) {}
  bool operator==(const Site& other) const { return line == other.line && !std::strcmp(file, other.file); }
  bool operator<(const Site& other) const {
    return line != other.line ? line < other.line : std::strcmp(file, other.file) < 0;
  }
};

struct Settings {
  uint64_t order = 0;                 // of threads and blocks: one order for each number
  int multiprocessors = 2;            // what the kernels' host code asks of the device
  int resident_blocks = 1;            //
  int64_t shared_bytes = 227 * 1024;  //
  int capability = 90;                //
  int64_t last_blocks = 0;            // run no more of each launch than so many, its last; 0: all
  bool dry = false;                   // run nothing, and keep the statistics
  Site ignored_site;                  // as if it were not there
};
inline thread_local Settings settings;

struct Launch {
  const std::type_info* kernel;
  int threads;
  int64_t shared_bytes;
};
struct Statistics {
  int64_t blocks = 0, ldmatrix_conflicts = 0;
  std::map<Site, int64_t> sites;  // how often each was come by
  std::vector<Launch> launches;
};
inline thread_local Statistics statistics;

struct Fiber {
  static constexpr size_t kStackBytes = 256 << 10;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  std::unique_ptr<char[]> stack;
  // For the sanitizer, which has to know on which stack it is.
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;
};

struct Copy {
  void* to;
  std::array<unsigned char, 16> bytes;
};

struct Thread {
  Fiber fiber;
  int index = 0;
  bool finished = false;
  const char* waits_in = nullptr;
  std::vector<Copy> open;                   // cp.async since the last commit
  std::deque<std::vector<Copy>> in_flight;  // committed groups
};

struct Warp {
  int arrived = 0;
  const char* operation = nullptr;
  std::array<void*, 32> requests;
};

// The block that is running, and the fibers that all blocks run on.
struct Machine {
  std::deque<Thread> threads;  // a deque: a fiber must stay where it is
  std::vector<Warp> warps;
  std::vector<Thread*> ready;
  Fiber host;
  Fiber* previous = nullptr;
  Thread* current = nullptr;
  int thread_count = 0, arrived = 0;
  Site barrier;  // where those wait who arrived
  int64_t block = 0, block_count = 0, shared_bytes = 0;
  unsigned char* shared = nullptr;
  std::map<Site, std::vector<unsigned char>> statics;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
  uint64_t random = 0;
  // Of several that could go on, the next is the best of 1 + `preference` in an order of warps that each block draws:
  // with chance alone all warps keep pace, and none runs far ahead.
  int preference = 0;
  uint32_t warp_key = 0;
  uint32_t rank(const Thread& thread) const {
    return (uint32_t(thread.index / 32) * 0x9e3779b1u ^ warp_key) * 0x85ebca6bu;
  }
};
inline thread_local Machine machine;

[[noreturn, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::printf("emulator: block %ld, thread %d: ", long(machine.block), machine.current ? machine.current->index : -1);
  std::vprintf(format, values);
  std::printf("\n");
  std::fflush(stdout);
  va_end(values);
  std::abort();
}

// SplitMix64.
inline uint64_t next_random(uint64_t& state) {
  uint64_t z = state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

// ---- fibers

#if defined(__x86_64__)

// Every product of a warp is 31 switches, so they are done here: swapcontext() makes a system call in each.
[[gnu::naked, gnu::noinline]] inline void switch_stack(void** /*from: rdi*/, void* /*to: rsi*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret");
}
inline void switch_context(Fiber& from, Fiber& to) { switch_stack(&from.stack_pointer, to.stack_pointer); }

inline void prepare(Fiber& fiber, void (*run)()) {
  // What the first switch pops: six registers and where to go on, then a place for nobody's return address.
  void** top = reinterpret_cast<void**>(fiber.stack.get() + Fiber::kStackBytes) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(run);
  fiber.stack_pointer = top;
}

#else

inline void switch_context(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

inline void prepare(Fiber& fiber, void (*run)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = Fiber::kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run, 0);
}

#endif

inline void switch_fiber(Fiber& from, Fiber& to) {
  machine.previous = &from;
#if defined(VA_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
  switch_context(from, to);
#if defined(VA_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(from.fake_stack, &machine.previous->bottom, &machine.previous->size);
#endif
}

// Runs somebody who can run; the host when nobody can.
inline void suspend() {
  std::vector<Thread*>& ready = machine.ready;
  Thread *const from = machine.current, *to = nullptr;
  if (!ready.empty()) {
    size_t next = next_random(machine.random) % ready.size();
    for (int i = 0; i < machine.preference; ++i) {
      const size_t other = next_random(machine.random) % ready.size();
      if (machine.rank(*ready[other]) < machine.rank(*ready[next])) next = other;
    }
    std::swap(ready[next], ready.back());
    to = ready.back();
    ready.pop_back();
  }
  machine.current = to;
  switch_fiber(from ? from->fiber : machine.host, to ? to->fiber : machine.host);
}

inline void run_thread() {
#if defined(VA_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(nullptr, &machine.previous->bottom, &machine.previous->size);
#endif
  // A fiber lives on and serves the thread of the same index in the next blocks.
  for (;;) {
    machine.body(machine.argument);
    Thread& self = *machine.current;
    const bool copies = std::any_of(self.in_flight.begin(), self.in_flight.end(), [](auto& g) { return !g.empty(); });
    if (copies || !self.open.empty()) fail("ends with copies that it never waited for");
    self.in_flight.clear();
    self.finished = true;
    suspend();
  }
}

inline void add_threads(int count) {
  while (int(machine.threads.size()) < count) {
    Thread& thread = machine.threads.emplace_back();
    thread.index = int(machine.threads.size()) - 1;
    Fiber& fiber = thread.fiber;
    fiber.stack.reset(new char[Fiber::kStackBytes]);
    fiber.bottom = fiber.stack.get();
    fiber.size = Fiber::kStackBytes;
    prepare(fiber, run_thread);
  }
}

inline void run_block(int64_t block) {
  Machine& m = machine;
  m.block = block;
  m.arrived = 0;
  m.warp_key = uint32_t(next_random(m.random));
  m.preference = int(next_random(m.random) % 3) * 4;
  m.warps.assign(size_t(m.thread_count / 32), Warp{});
  m.statics.clear();
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, size_t(std::max<int64_t>(m.shared_bytes, 1)))) std::abort();
  const std::unique_ptr<void, decltype(&std::free)> owner(shared, &std::free);
  m.shared = static_cast<unsigned char*>(shared);
  memset(m.shared, 0xff, size_t(m.shared_bytes));
  for (int t = 0; t < m.thread_count; ++t) {
    m.threads[size_t(t)].finished = false;
    m.threads[size_t(t)].waits_in = nullptr;
    m.ready.push_back(&m.threads[size_t(t)]);
  }
  suspend();
  for (int t = 0; t < m.thread_count; ++t) {
    if (m.threads[size_t(t)].finished) continue;
    m.current = &m.threads[size_t(t)];
    fail("waits for ever in %s", m.current->waits_in);
  }
  ++statistics.blocks;
}

// One launch: body(argument) for every thread.
inline void launch(const std::type_info& kernel, int64_t blocks, int threads, int64_t shared_bytes,
                   void (*body)(const void*), const void* argument) {
  Machine& m = machine;
  statistics.launches.push_back({&kernel, threads, shared_bytes});
  if (blocks < 1 || blocks > INT32_MAX) fail("a grid of %ld blocks", long(blocks));
  if (threads < 32 || threads > 1024 || threads % 32) fail("a block of %d threads", threads);
  if (shared_bytes > settings.shared_bytes) fail("%ld bytes of shared memory", long(shared_bytes));
  add_threads(threads);
  m.thread_count = threads;
  m.block_count = blocks;
  m.shared_bytes = shared_bytes;
  m.body = body;
  m.argument = argument;
  m.random = settings.order;
  if (settings.dry) return;
  const int64_t left_out = settings.last_blocks > 0 ? std::max<int64_t>(0, blocks - settings.last_blocks) : 0;
  std::vector<int64_t> order(static_cast<size_t>(blocks - left_out));
  std::iota(order.begin(), order.end(), left_out);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random(m.random) % i]);
  for (int64_t block : order) run_block(block);
}

inline int thread_index() { return machine.current->index; }
inline int thread_count() { return machine.thread_count; }
inline int64_t block_index() { return machine.block; }
inline int64_t block_count() { return machine.block_count; }

// ---- waiting for others

// Counts the barrier or wait at this place of the source; whether to go on as if it were not there.
inline bool ignored(const Where& where) {
  ++statistics.sites[where];
  return Site(where) == settings.ignored_site;
}

inline void wait_in(const char* what) {
  machine.current->waits_in = what;
  suspend();
}

inline void sync_threads(const Where& where = Where::current()) {
  Machine& m = machine;
  if (ignored(where)) return;
  if (m.arrived && !(m.barrier == where)) {
    fail("is at the barrier in line %d, others at that in line %d", int(where.line()), m.barrier.line);
  }
  m.barrier = where;
  if (++m.arrived < m.thread_count) return wait_in("__syncthreads");
  m.arrived = 0;
  for (int t = 0; t < m.thread_count; ++t) {
    if (t != m.current->index) m.ready.push_back(&m.threads[size_t(t)]);
  }
}

// The lanes of a warp bring a request each; the last one to come resolves all 32.
template <typename Request, typename Resolve>
void collective(const char* operation, Request& request, const Resolve& resolve) {
  Machine& m = machine;
  const int first = m.current->index & ~31;
  Warp& warp = m.warps[size_t(first / 32)];
  if (warp.arrived && warp.operation != operation && std::strcmp(warp.operation, operation)) {
    fail("is in %s while another lane of its warp is in %s", operation, warp.operation);
  }
  warp.operation = operation;
  warp.requests[size_t(m.current->index - first)] = &request;
  if (++warp.arrived < 32) return wait_in(operation);
  warp.arrived = 0;
  resolve([&](int lane) -> Request& { return *static_cast<Request*>(warp.requests[size_t(lane)]); });
  for (int t = first; t < first + 32; ++t) {
    if (t != m.current->index) m.ready.push_back(&m.threads[size_t(t)]);
  }
}

inline void sync_warp(const Where& where = Where::current()) {
  if (ignored(where)) return;
  char none = 0;
  collective("__syncwarp", none, [](auto) {});
}

struct Shuffle {
  uint32_t value;
  int source;
  uint32_t result = 0;
};

inline uint32_t shuffle(uint32_t value, int source_lane) {
  Shuffle mine{value, source_lane};
  collective("__shfl", mine, [](auto lane) {
    for (int l = 0; l < 32; ++l) lane(l).result = lane(lane(l).source & 31).value;
  });
  return mine.result;
}
inline uint32_t shuffle_xor(uint32_t value, int lanes) { return shuffle(value, (machine.current->index & 31) ^ lanes); }

inline uint32_t ballot(bool predicate) {
  Shuffle mine{predicate, 0};
  collective("__ballot", mine, [](auto lane) {
    uint32_t votes = 0;
    for (int l = 0; l < 32; ++l) votes |= lane(l).value << l;
    for (int l = 0; l < 32; ++l) lane(l).result = votes;
  });
  return mine.result;
}

// ---- memory

inline unsigned char* dynamic_shared() { return machine.shared; }

// A __shared__ variable: one a block for each place in the source.
template <typename T>
T& static_shared(const Where& where = Where::current()) {
  static_assert(alignof(T) <= 16);
  // As badly aligned as T allows: CUDA promises no more.
  constexpr size_t kSkipped = alignof(T) % 16;
  std::vector<unsigned char>& bytes = machine.statics[where];
  if (bytes.empty()) bytes.assign(kSkipped + sizeof(T), 0xff);
  if (bytes.size() != kSkipped + sizeof(T)) fail("two shared variables in line %d", int(where.line()));
  return *reinterpret_cast<T*>(bytes.data() + kSkipped);
}

inline bool is_shared(const void* begin, size_t bytes) {
  const auto inside = [&](const unsigned char* block, size_t size) {
    return begin >= block && static_cast<const unsigned char*>(begin) + bytes <= block + size;
  };
  if (inside(machine.shared, size_t(machine.shared_bytes))) return true;
  return std::any_of(machine.statics.begin(), machine.statics.end(),
                     [&](const auto& each) { return inside(each.second.data(), each.second.size()); });
}

inline void check_aligned(const char* what, const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) fail("%s of %zu bytes at the address %p", what, bytes, address);
}

template <typename T>
T load_aligned(const void* from) {
  check_aligned("a load", from, sizeof(T));
  T value;
  memcpy(&value, from, sizeof(T));
  return value;
}
template <typename T>
void store_aligned(void* to, const T& value) {
  check_aligned("a store", to, sizeof(T));
  memcpy(to, &value, sizeof(T));
}

inline void cp_async16(void* shared, const void* global, int bytes) {
  check_aligned("cp.async to shared memory", shared, 16);
  check_aligned("cp.async from global memory", global, 16);
  if (!is_shared(shared, 16)) fail("cp.async to what is not shared memory");
  if (bytes < 0 || bytes > 16) fail("cp.async of %d bytes", bytes);
  Copy copy{shared, {}};
  if (bytes > 0) memcpy(copy.bytes.data(), global, size_t(bytes));
  memset(shared, 0xff, 16);
  machine.current->open.push_back(copy);
}
inline void cp_async_commit() { machine.current->in_flight.push_back(std::exchange(machine.current->open, {})); }
inline void cp_async_wait(int pending, const Where& where = Where::current()) {
  if (pending < 0) fail("waits for more groups than there are");
  if (ignored(where)) return;
  std::deque<std::vector<Copy>>& groups = machine.current->in_flight;
  for (; int(groups.size()) > pending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) memcpy(copy.to, copy.bytes.data(), 16);
  }
}

struct MatrixRows {
  const unsigned char* row;
  uint32_t* to;
};

inline void load_matrices(const char* operation, uint32_t (&to)[4], const void* row, bool transposed) {
  check_aligned(operation, row, 16);
  if (!is_shared(row, 16)) fail("%s from what is not shared memory", operation);
  MatrixRows mine{static_cast<const unsigned char*>(row), to};
  collective(operation, mine, [transposed](auto lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t elements[8][8];
      uint32_t banks = 0;
      for (int r = 0; r < 8; ++r) {
        const unsigned char* from = lane(8 * matrix + r).row;
        memcpy(elements[r], from, 16);
        const uint32_t bank = 1u << (reinterpret_cast<uintptr_t>(from) / 16 % 8);
        statistics.ldmatrix_conflicts += (banks & bank) != 0;
        banks |= bank;
      }
      for (int l = 0; l < 32; ++l) {
        const int r = l / 4, c = l % 4 * 2;
        const uint16_t low = transposed ? elements[c][r] : elements[r][c];
        const uint16_t high = transposed ? elements[c + 1][r] : elements[r][c + 1];
        lane(l).to[matrix] = uint32_t(high) << 16 | low;
      }
    }
  });
}
inline void ldmatrix(uint32_t (&to)[4], const void* row) { load_matrices("ldmatrix", to, row, false); }
inline void ldmatrix_trans(uint32_t (&to)[4], const void* row) { load_matrices("ldmatrix.trans", to, row, true); }

// ---- matrix products

struct Mma {
  float* c;
  const uint32_t *a, *b;
};

// Most of the work of all tests, and no place for an error of a kernel: so without the sanitizers.
template <int kDepth>
[[gnu::no_sanitize("address", "undefined")]] void multiply(const float (&left)[16][kDepth],
                                                           const float (&right)[kDepth][8], double (&sums)[16][8]) {
  for (int r = 0; r < 16; ++r) {
    double row[8] = {};
    for (int k = 0; k < kDepth; ++k) {
      for (int n = 0; n < 8; ++n) row[n] += double(left[r][k]) * double(right[k][n]);
    }
    for (int n = 0; n < 8; ++n) sums[r][n] = row[n];
  }
}

// c += a · b in the fragments of m16n8k(kDepth), with element(word, k) one operand as a float.
template <int kDepth, typename Element>
void mma(const char* operation, float (&c)[4], const uint32_t (&a)[4], const uint32_t* b, const Element& element) {
  Mma mine{c, a, b};
  collective(operation, mine, [&element](auto lane) {
    constexpr int kInWord = kDepth / 8, kHalf = kDepth / 2;  // operands in a word; depth of one register
    float left[16][kDepth], right[kDepth][8];
    for (int k = 0; k < kDepth; ++k) {
      const int in_group = k % kHalf / kInWord, upper = k / kHalf;
      for (int r = 0; r < 16; ++r) left[r][k] = element(lane(r % 8 * 4 + in_group).a[r / 8 + 2 * upper], k);
      for (int n = 0; n < 8; ++n) right[k][n] = element(lane(n * 4 + in_group).b[upper], k);
    }
    double sums[16][8];
    multiply(left, right, sums);
    for (int r = 0; r < 16; ++r) {
      for (int n = 0; n < 8; ++n) {
        float& out = lane(r % 8 * 4 + n / 2).c[n % 2 + 2 * (r / 8)];
        out = float(double(out) + sums[r][n]);
      }
    }
  });
}

inline uint16_t half_of(uint32_t word, int k) { return uint16_t(k % 2 ? word >> 16 : word); }

inline void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  mma<16>("mma.bf16", c, a, b, [](uint32_t word, int k) { return from_bfloat16(half_of(word, k)); });
}
inline void mma_float16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  mma<16>("mma.f16", c, a, b, [](uint32_t word, int k) { return from_float16(half_of(word, k)); });
}
// The tensor cores do not look at the lower 13 bits.
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  mma<8>("mma.tf32", c, a, b, [](uint32_t word, int) { return float_of(word & ~0x1fffu); });
}

}  // namespace vitadapter::cuda::emulator
