// Signs of x + error, one bit each, with a scale per block: the mean magnitude of the block, which is the scale that loses
// least (Karimireddy et al. 2019; 1-bit Adam, Tang et al. 2021, sends its momentum like this). What is lost becomes the new
// error. A block that is not finite gets the scale NaN and keeps its error.
//
// Bit j of byte i is element 8 i + j: set for a number >= 0.
//
// Defines: X_TYPE (bf16, f16, f32), BLOCK (a power of two), LANES (a power of two up to 32; they hold a block in registers),
// ALIGNED (1: pointers allow whole accesses), UNROLL (pieces loaded before the first use), THREADS.

#include "common.cuh"

typedef X_TYPE X;
typedef unsigned char u8;

#define PACK 8
#define CHUNKS (BLOCK / (LANES * PACK))

// Elements [i, i + PACK) of n; what lies outside is zero.
template <class T>
__device__ __forceinline__ Pack<T, PACK> read(const T* p, i64 i, i64 n) {
#if ALIGNED
  return load_part<PACK>(p, i, n);
#else
  Pack<T, PACK> pack = {};
#pragma unroll
  for (int j = 0; j < PACK; ++j)
    if (i + j < n) pack.at[j] = p[i + j];
  return pack;
#endif
}

template <class T>
__device__ __forceinline__ void write(T* p, i64 i, i64 n, const Pack<T, PACK>& pack) {
#if ALIGNED
  store_part(p, i, n, pack);
#else
#pragma unroll
  for (int j = 0; j < PACK; ++j)
    if (i + j < n) p[i + j] = pack.at[j];
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS)
    one_bit_pack(const X* x, float* error, u8* bits, float* scales, i64 n) {
  i64 block = (i64)blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES, start = block * BLOCK;
  i64 first = start + threadIdx.x % LANES * PACK;
  Floats<PACK> v[CHUNKS];
  float size = 0.f;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    i64 i = first + c * LANES * PACK;
    Floats<PACK> e = floats(read(error, i, n));
    v[c] = floats(read(x, i, n));
#pragma unroll
    for (int j = 0; j < PACK; ++j) v[c].at[j] += e.at[j];
  }
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
    for (int j = 0; j < PACK; ++j) size += fabsf(v[c].at[j]);
  }
  size = lanes_sum<LANES>(size);
  float scale = size / float(min(i64(BLOCK), n - start));
  bool finite = fabsf(scale) < __int_as_float(0x7f800000);
  if (start < n && threadIdx.x % LANES == 0) scales[block] = finite ? scale : __int_as_float(0x7fc00000);
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    i64 i = first + c * LANES * PACK;
    if (i >= n) break;
    u32 byte = 0;
#pragma unroll
    for (int j = 0; j < PACK; ++j) {
      bool positive = v[c].at[j] >= 0.f;
      if (positive && i + j < n) byte |= 1u << j;
      v[c].at[j] -= positive ? scale : -scale;
    }
    bits[i / 8] = u8(byte);
    if (finite) write(error, i, n, rounded<float>(v[c]));
  }
}

// The sum of `pieces` packed tensors of one shape, in order, in fp32, times `factor`, rounded once.
extern "C" __global__ void __launch_bounds__(THREADS)
    one_bit_sum(const u8* bits, const float* scales, X* out, i64 n, i64 pieces, i64 n_bytes, i64 n_scales,
                float factor) {
  i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * PACK;
  if (i >= n) return;
  Floats<PACK> sum = {};
  for (i64 first = 0; first < pieces; first += UNROLL) {
    u32 byte[UNROLL];
    float scale[UNROLL];
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      if (first + k >= pieces) break;
      byte[k] = bits[(first + k) * n_bytes + i / 8];
      scale[k] = scales[(first + k) * n_scales + i / BLOCK];
    }
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      if (first + k >= pieces) break;
#pragma unroll
      for (int j = 0; j < PACK; ++j) sum.at[j] += byte[k] >> j & 1 ? scale[k] : -scale[k];
    }
  }
#pragma unroll
  for (int j = 0; j < PACK; ++j) sum.at[j] *= factor;
  write(out, i, n, rounded<X>(sum));
}
