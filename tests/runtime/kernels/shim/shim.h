// Runs CUDA C++ kernels on the CPU, for tests. Blocks run one after another; the threads of a block are fibers that give
// way at barriers and warp operations, in an order that the caller chooses, so that a missing barrier shows as a
// difference between orders. It refuses what a GPU leaves undefined: threads waiting at different barriers, lanes missing
// from a warp operation, misaligned accesses. Shared memory starts as NaN in every block.
#pragma once
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <ucontext.h>

#define ZEROCAST_SHIM 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static __attribute__((section("shim_shared")))

struct uint3 { unsigned x, y, z; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
typedef uint3 dim3;

// At least one byte of static shared memory, so that the linker provides the section's ends.
static __attribute__((section("shim_shared"), used)) unsigned char shim_some_shared[16];
extern "C" unsigned char __start_shim_shared[], __stop_shim_shared[];

namespace shim {

constexpr unsigned MAX_THREADS = 1024;
constexpr size_t STACK_BYTES = 64 * 1024;
constexpr size_t DYNAMIC_GUARD_BYTES = 16 * 1024;

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  bool started, done;
  uint3 thread;
  unsigned index;
  unsigned long warp_calls;
};

struct Warp {
  uint64_t slot[2][32];
  char kind[2][32];
};

static Fiber fibers[MAX_THREADS];
static Warp warps[MAX_THREADS / 32];
static unsigned char* stacks;
static Fiber* current;
static jmp_buf scheduler;
static ucontext_t scheduler_context;
static uint3 grid_size, block_size, block_at;
static unsigned n_threads, n_alive, n_arrived, barrier_line, barrier_turn;
static unsigned long progress;
static int vote[2];
static unsigned char* dynamic_bytes;
static char message[512];
static bool failed;
static void (*run_kernel)(void**);
static void** kernel_arguments;

[[noreturn]] inline void fail(const char* what) {
  if (!failed)
    snprintf(message, sizeof message, "%s (block %u,%u, thread %u)", what, block_at.x, block_at.y, current->index);
  failed = true;
  _longjmp(scheduler, 1);
}

inline void check_aligned(const void* p, size_t n) {
  if (reinterpret_cast<uintptr_t>(p) % n) fail("misaligned access");
}

inline void* dynamic_shared() { return dynamic_bytes; }

inline void yield() {
  if (_setjmp(current->jump) == 0) _longjmp(scheduler, 1);
}

inline void release_barrier() {
  n_arrived = 0;
  ++barrier_turn;
  ++progress;
}

inline void barrier(unsigned line) {
  if (n_arrived && barrier_line != line) fail("threads wait at different barriers");
  barrier_line = line;
  unsigned turn = barrier_turn;
  ++progress;
  if (++n_arrived == n_alive) release_barrier();
  while (barrier_turn == turn) yield();
}

inline int barrier_or(int predicate, unsigned line) {
  unsigned turn = barrier_turn & 1;
  vote[turn] |= predicate != 0;
  barrier(line);
  int result = vote[turn];
  barrier(line);
  vote[turn] = 0;
  return result;
}

// Every lane shows a value; afterwards every lane may look at all of them (until its next call but one).
inline const uint64_t* exchange(unsigned mask, uint64_t value, char kind) {
  if (mask != 0xffffffffu) fail("warp operation with a partial mask");
  if (n_threads % 32) fail("warp operation in a block that is not whole warps");
  unsigned lane = current->index % 32, first = current->index - lane;
  Warp& warp = warps[first / 32];
  unsigned long call = current->warp_calls++;
  warp.slot[call & 1][lane] = value;
  warp.kind[call & 1][lane] = kind;
  ++progress;
  for (unsigned i = 0; i < 32; ++i) {
    while (fibers[first + i].warp_calls <= call) {
      if (fibers[first + i].done) fail("a lane ended before a warp operation of its warp");
      yield();
    }
    if (warp.kind[call & 1][i] != kind) fail("lanes of a warp at different warp operations");
  }
  return warp.slot[call & 1];
}

template <class V>
inline uint64_t to_slot(V v) {
  static_assert(sizeof(V) <= 8, "too wide for a shuffle");
  uint64_t slot = 0;
  memcpy(&slot, &v, sizeof v);
  return slot;
}

template <class V>
inline V shuffle(unsigned mask, V v, int from, int width, char kind) {
  const uint64_t* slots = exchange(mask, to_slot(v), kind);
  int lane = int(current->index % 32), start = lane / width * width;
  V out;
  memcpy(&out, &slots[from >= start && from < start + width ? from : lane], sizeof out);
  return out;
}

inline unsigned ballot(unsigned mask, int predicate) {
  const uint64_t* slots = exchange(mask, predicate != 0, 'b');
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= unsigned(slots[i]) << i;
  return bits;
}

inline void fiber_main() {
  run_kernel(kernel_arguments);
  current->done = true;
  --n_alive;
  ++progress;
  if (n_alive && n_arrived == n_alive) release_barrier();
  _longjmp(scheduler, 1);
}

inline void resume(Fiber& fiber, unsigned char* stack) {
  current = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.jump, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = STACK_BYTES;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  swapcontext(&scheduler_context, &fiber.context);
}

inline void run_block(unsigned order) {
  memset(__start_shim_shared, 0xff, __stop_shim_shared - __start_shim_shared);
  n_alive = n_threads;
  n_arrived = barrier_turn = 0;
  vote[0] = vote[1] = 0;
  for (unsigned i = 0; i < n_threads; ++i) {
    fibers[i].started = fibers[i].done = false;
    fibers[i].index = i;
    fibers[i].thread = {i, 0, 0};
    fibers[i].warp_calls = 0;
  }
  // Order 0: first thread first; 1: last first; else: strides that reach every thread (odd against a power of two).
  while (n_alive && !failed) {
    unsigned long before = progress;
    for (unsigned i = 0; i < n_threads && !failed; ++i) {
      unsigned at = order == 0 ? i : n_threads - 1 - i;
      if (order > 1 && (n_threads & (n_threads - 1)) == 0) at = (i * (2 * order + 1) + order) & (n_threads - 1);
      if (!fibers[at].done) resume(fibers[at], stacks + at * STACK_BYTES);
    }
    if (progress == before && n_alive && !failed) {
      snprintf(message, sizeof message, "deadlock: threads wait for others that never come (block %u,%u)", block_at.x, block_at.y);
      failed = true;
    }
  }
}

// sizes: grid x, grid y, threads of a block, bytes of dynamic shared memory, order. Returns nullptr or what went wrong.
inline const char* run(void (*kernel)(void**), void** arguments, const unsigned* sizes) {
  if (!stacks)
    stacks = static_cast<unsigned char*>(mmap(nullptr, MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (sizes[2] == 0 || sizes[2] > MAX_THREADS) return "a block has 1 to 1024 threads";
  run_kernel = kernel;
  kernel_arguments = arguments;
  grid_size = {sizes[0], sizes[1], 1};
  block_size = {sizes[2], 1, 1};
  n_threads = sizes[2];
  failed = false;
  unsigned n_blocks = sizes[0] * sizes[1];
  size_t dynamic_room = (sizes[3] + 15) / 16 * 16 + DYNAMIC_GUARD_BYTES;
  dynamic_bytes = static_cast<unsigned char*>(aligned_alloc(16, dynamic_room));
  for (unsigned b = 0; b < n_blocks && !failed; ++b) {
    unsigned at = sizes[4] % 2 ? n_blocks - 1 - b : b;
    block_at = {at % sizes[0], at / sizes[0], 0};
    memset(dynamic_bytes, 0xff, dynamic_room);
    run_block(sizes[4]);
    for (unsigned i = sizes[3]; i < dynamic_room && !failed; ++i)
      if (dynamic_bytes[i] != 0xff) {
        snprintf(message, sizeof message, "wrote past the end of dynamic shared memory");
        failed = true;
      }
  }
  free(dynamic_bytes);
  return failed ? message : nullptr;
}

template <class A> struct Code;
template <class P> struct Code<P*> { static constexpr char value = 'p'; };
template <> struct Code<long long> { static constexpr char value = 'i'; };
template <> struct Code<float> { static constexpr char value = 'f'; };

template <unsigned... I> struct Indices {};
template <unsigned N, unsigned... I> struct Count : Count<N - 1, N - 1, I...> {};
template <unsigned... I> struct Count<0, I...> { typedef Indices<I...> type; };

template <class... A> struct Signature {
  static constexpr char codes[] = {Code<A>::value..., 0};
  template <unsigned... I>
  static void call(void (*kernel)(A...), void** arguments, Indices<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
  }
  static void call(void (*kernel)(A...), void** arguments) {
    call(kernel, arguments, typename Count<sizeof...(A)>::type());
  }
};
template <class... A> constexpr char Signature<A...>::codes[];
template <class... A> Signature<A...> signature_of(void (*)(A...)) { return {}; }

// Software fp16, round to nearest even.
inline float float_of_half(uint16_t h) {
  int exponent = h >> 10 & 31, fraction = h & 1023;
  float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                : exponent ? std::ldexp(float(fraction + 1024), exponent - 25) : std::ldexp(float(fraction), -24);
  return h & 0x8000 ? -value : value;
}
inline uint16_t half_of_float(float f) {
  uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  double a = std::fabs(double(f));
  if (a != a) return 0x7fff;
  if (a >= 65520.0) return sign | 0x7c00;
  int exponent = a < 6.103515625e-05 ? -14 : std::ilogb(a);
  long steps = std::lrint(std::ldexp(a, 10 - exponent));  // exact: a is an fp32 number
  return sign | uint16_t(steps + ((exponent + 14L) << 10));
}

}  // namespace shim

#define threadIdx (shim::current->thread)
#define blockIdx shim::block_at
#define blockDim shim::block_size
#define gridDim shim::grid_size
#define warpSize 32
#define __syncthreads() shim::barrier(__LINE__)
#define __syncthreads_or(p) shim::barrier_or(p, __LINE__)
#define __syncwarp() ((void)shim::exchange(0xffffffffu, 0, 'w'))

inline int shim_lane() { return int(shim::current->index % 32); }
template <class V> V __shfl_sync(unsigned m, V v, int lane, int width = 32) {
  return shim::shuffle(m, v, shim_lane() / width * width + lane % width, width, 'i');
}
template <class V> V __shfl_xor_sync(unsigned m, V v, int step, int width = 32) {
  return shim::shuffle(m, v, shim_lane() ^ step, width, 'x');
}
template <class V> V __shfl_down_sync(unsigned m, V v, unsigned step, int width = 32) {
  return shim::shuffle(m, v, shim_lane() + int(step), width, 'd');
}
template <class V> V __shfl_up_sync(unsigned m, V v, unsigned step, int width = 32) {
  return shim::shuffle(m, v, shim_lane() - int(step), width, 'u');
}
inline unsigned __ballot_sync(unsigned m, int p) { return shim::ballot(m, p); }
inline int __any_sync(unsigned m, int p) { return shim::ballot(m, p) != 0; }
inline int __all_sync(unsigned m, int p) { return shim::ballot(m, p) == 0xffffffffu; }

template <class V, class U> V atomicAdd(V* p, U v) { V old = *p; *p += V(v); return old; }
template <class V, class U> V atomicMax(V* p, U v) { V old = *p; if (V(v) > old) *p = V(v); return old; }
template <class V, class U> V atomicMin(V* p, U v) { V old = *p; if (V(v) < old) *p = V(v); return old; }
template <class V, class U> V atomicOr(V* p, U v) { V old = *p; *p |= V(v); return old; }
template <class V, class U> V atomicExch(V* p, U v) { V old = *p; *p = V(v); return old; }
template <class V, class U> V atomicCAS(V* p, U expected, U v) { V old = *p; if (old == V(expected)) *p = V(v); return old; }
inline void __threadfence() {}
inline void __threadfence_block() {}

inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { int y; memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float rsqrtf(float x) { return float(1.0 / std::sqrt(double(x))); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }
inline int __float2int_rn(float x) { return int(lrintf(x)); }
inline float __int2float_rn(int x) { return float(x); }
template <class V> V __ldg(const V* p) { return *p; }
template <class A, class B> auto min(A a, B b) -> decltype(a + b) { return a < b ? a : b; }
template <class A, class B> auto max(A a, B b) -> decltype(a + b) { return a > b ? a : b; }
using std::isfinite;
using std::isinf;
using std::isnan;

// The parameter kinds of a kernel ("ppif": pointers, long long, float) and a function that runs it.
#define SHIM_EXPORT(name)                                                                                        \
  extern "C" const char* shim_codes_##name() { return decltype(shim::signature_of(&name))::codes; }              \
  static void shim_call_##name(void** a) { decltype(shim::signature_of(&name))::call(&name, a); }                \
  extern "C" const char* shim_run_##name(void** a, const unsigned* sizes) { return shim::run(shim_call_##name, a, sizes); }
