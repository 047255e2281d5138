// Blocks of BLOCK elements that share a scale (symmetric: scale = largest magnitude / largest code), and their codes: int8,
// int4 (two to a byte, the even element in the low half) or 8-bit floats (Micikevicius et al. 2022).

#include "common.cuh"

typedef X_TYPE X;
typedef unsigned char u8;

#define INT8 0
#define INT4 1
#define E4M3 2
#define E5M2 3

#if FORMAT == INT8
#define LARGEST 127.f
#elif FORMAT == INT4
#define LARGEST 7.f
#elif FORMAT == E4M3
#define LARGEST 448.f
#define MANTISSA 3
#define BIAS 7
#define LARGEST_CODE 0x7eu
#elif FORMAT == E5M2
#define LARGEST 57344.f
#define MANTISSA 2
#define BIAS 15
#define LARGEST_CODE 0x7bu
#else
#error "FORMAT is not one of the above"
#endif

#define PACK (16 / int(sizeof(X)))
#define CODE_BYTES (FORMAT == INT4 ? PACK / 2 : PACK)

// 2^k as fp32, -126 <= k <= 127.
__device__ __forceinline__ float power_of_two(int k) { return __int_as_float((k + 127) << 23); }

// Elements [i, i + N) of n; one by one where addresses are odd.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> read(const T* p, i64 i, i64 n) {
#if ALIGNED
  return load_part<N>(p, i, n);
#else
  Pack<T, N> pack = {};
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (i + j < n) pack.at[j] = p[i + j];
  return pack;
#endif
}

template <int N, class T>
__device__ __forceinline__ void write(T* p, i64 i, i64 n, const Pack<T, N>& pack) {
#if ALIGNED
  store_part(p, i, n, pack);
#else
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (i + j < n) p[i + j] = pack.at[j];
#endif
}

__device__ __forceinline__ i64 code_bytes(i64 n) { return FORMAT == INT4 ? (n + 1) / 2 : n; }
