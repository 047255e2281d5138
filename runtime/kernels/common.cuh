// What every kernel here shares. No CUDA header is needed: the text compiles with NVRTC anywhere, and with g++ under the
// test shim. Elements are stored in their own type and computed in fp32; indices are 64-bit.
//
// Kernel parameters are pointers, `i64` and `float`, nothing else (the loader passes exactly these).

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;

#define FULL_WARP 0xffffffffu

// ---- element types ------------------------------------------------------------------------------------------------

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};
typedef float f32;

// The same bits under another type; a register move at most.
template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  return reinterpret_cast<const To&>(from);
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
__device__ __forceinline__ float to_float(f16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return shim::float_of_half(x.bits);
#endif
}

// Round to nearest even in integers, for chips (and the shim) without the instruction; a NaN stays one.
__device__ __forceinline__ u32 bf16_bits(float x) {
  u32 bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Two elements of a 16-bit type in one word, `low` at the lower address.
template <class T>
__device__ __forceinline__ u32 two(float low, float high);
template <>
__device__ __forceinline__ u32 two<bf16>(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  u32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return bf16_bits(low) | bf16_bits(high) << 16;
#endif
}
template <>
__device__ __forceinline__ u32 two<f16>(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  u32 word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#elif defined(__CUDA_ARCH__)
  u16 a, b;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(a) : "f"(low));
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(b) : "f"(high));
  return u32(a) | u32(b) << 16;
#else
  return u32(shim::half_of_float(low)) | u32(shim::half_of_float(high)) << 16;
#endif
}

template <class T>
__device__ __forceinline__ T from_float(float x) {
  T y;
  y.bits = u16(two<T>(x, 0.f));
  return y;
}
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

// ---- N neighbours at once -----------------------------------------------------------------------------------------

// N elements, moved by accesses of at most 16 bytes. An address must be a multiple of min(16, sizeof(Pack)).
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};

template <int N>
struct Floats {
  float at[N];
};

template <class T, int N>
__device__ __forceinline__ Floats<N> floats(const Pack<T, N>& pack) {
  Floats<N> out;
#pragma unroll
  for (int j = 0; j < N; ++j) out.at[j] = to_float(pack.at[j]);
  return out;
}

template <class T, int N>
struct Rounder {
  static __device__ __forceinline__ Pack<T, N> round(const Floats<N>& in) {
    Pack<T, N> out;
    u32* words = reinterpret_cast<u32*>(&out);
#pragma unroll
    for (int j = 0; j < N / 2; ++j) words[j] = two<T>(in.at[2 * j], in.at[2 * j + 1]);
    return out;
  }
};
template <class T>
struct Rounder<T, 1> {
  static __device__ __forceinline__ Pack<T, 1> round(const Floats<1>& in) { return {{from_float<T>(in.at[0])}}; }
};
template <int N>
struct Rounder<float, N> {
  static __device__ __forceinline__ Pack<float, N> round(const Floats<N>& in) {
    Pack<float, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) out.at[j] = in.at[j];
    return out;
  }
};
template <>
struct Rounder<float, 1> {
  static __device__ __forceinline__ Pack<float, 1> round(const Floats<1>& in) { return {{in.at[0]}}; }
};

template <class T, int N>
__device__ __forceinline__ Pack<T, N> rounded(const Floats<N>& in) {
  return Rounder<T, N>::round(in);
}

#if defined(ZEROCAST_SHIM)
#define CHECK_ALIGNED(pointer, pack) shim::check_aligned(pointer, alignof(pack))
#else
#define CHECK_ALIGNED(pointer, pack)
#endif

// Cached load: weights, tables, what another block reads too.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* p) {
  typedef Pack<T, N> P;
  CHECK_ALIGNED(p, P);
  return *reinterpret_cast<const P*>(p);
}

// A load that leaves the first-level cache to others: for streams that are read once.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_once(const T* p) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) * N == 16) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return bits_as<Pack<T, N>>(v);
  }
#endif
  return load<N>(p);
}

// To global memory. As words: for sm_80 and sm_90 the compiler takes some stores of 16-bit elements apart into seven, where their
// arithmetic is shared with `store_part`'s.
template <int N, class T>
__device__ __forceinline__ void store(T* p, const Pack<T, N>& pack) {
  typedef Pack<T, N> P;
  CHECK_ALIGNED(p, P);
#if defined(__CUDA_ARCH__)
  const u32* w = reinterpret_cast<const u32*>(&pack);
  if constexpr (sizeof(P) % 16 == 0) {
#pragma unroll
    for (int k = 0; k < int(sizeof(P) / 4); k += 4)
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(reinterpret_cast<u32*>(p) + k), "r"(w[k]),
                   "r"(w[k + 1]), "r"(w[k + 2]), "r"(w[k + 3])
                   : "memory");
    return;
  } else if constexpr (sizeof(P) == 8) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(w[0]), "r"(w[1]) : "memory");
    return;
  } else if constexpr (sizeof(P) == 4) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(p), "r"(w[0]) : "memory");
    return;
  }
#endif
  *reinterpret_cast<P*>(p) = pack;
}

// The same for elements [i, i + N) of a tensor of n elements, where i may be negative and i + N past the end: the head
// and the tail of an unaligned tensor. What lies outside is read as zero and never written.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_part(const T* p, i64 i, i64 n) {
  if (i >= 0 && i + N <= n) return load_once<N>(p + i);
  Pack<T, N> pack = {};
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (i + j >= 0 && i + j < n) pack.at[j] = p[i + j];
  return pack;
}

template <int N, class T>
__device__ __forceinline__ void store_part(T* p, i64 i, i64 n, const Pack<T, N>& pack) {
  if (i >= 0 && i + N <= n) return store<N>(p + i, pack);
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (i + j >= 0 && i + j < n) p[i + j] = pack.at[j];
}

// ---- sums over threads: fixed order, so the same bits every time ------------------------------------------------------

// Sum over groups of Lanes neighbouring lanes (a power of two up to 32), given to each of them.
template <int Lanes>
__device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
  for (int step = Lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
  return x;
}

// Sums of K values over groups of Lanes neighbouring threads, given to each of them. Groups wider than a warp are the
// whole block. `scratch` is shared memory of at least 2 * K * 32 floats; `turn` counts the calls of this thread.
template <int Lanes, int K>
__device__ __forceinline__ void group_sum(float (&x)[K], float* scratch, int& turn) {
#pragma unroll
  for (int k = 0; k < K; ++k) x[k] = lanes_sum<(Lanes < 32 ? Lanes : 32)>(x[k]);
  if constexpr (Lanes > 32) {
    constexpr int n_warps = Lanes / 32;
    // Two halves by turns: one barrier per sum is enough.
    float* mine = scratch + (turn++ & 1) * K * 32;
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) mine[k * 32 + threadIdx.x / 32] = x[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      float sum = threadIdx.x % 32 < n_warps ? mine[k * 32 + threadIdx.x % 32] : 0.f;
      x[k] = lanes_sum<32>(sum);
    }
  }
}

// ---- arithmetic ---------------------------------------------------------------------------------------------------

// a / b by the approximate reciprocal (2 ulp).
__device__ __forceinline__ float quick_divide(float a, float b) { return __fdividef(a, b); }

// Dynamic shared memory of the block as an array.
#if defined(ZEROCAST_SHIM)
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(shim::dynamic_shared())
#else
#define DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(16) unsigned char dynamic_shared_[]; \
  type* name = reinterpret_cast<type*>(dynamic_shared_)
#endif
