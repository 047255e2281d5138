// Codes back to numbers: the sum of `pieces` quantised tensors of one shape, in order, in fp32, rounded once. With one piece
// plain dequantisation, with several the reduction behind an all-to-all of quantised gradients (ZeRO++, Wang et al. 2023,
// section 3.3).
//
// Defines: X_TYPE (of the result), FORMAT, BLOCK, ALIGNED (see quantize.cu), UNROLL (pieces loaded before the first use),
// THREADS.

#include "quantize.cuh"

__device__ __forceinline__ float value_of(u32 code) {
#if FORMAT == INT8
  return float(int(code << 24) >> 24);
#elif FORMAT == INT4
  return float(int(code << 28) >> 28);
#else
  // CuPy compiles with fp32 denormals flushed, so those of the 8-bit format must not pass through them.
  u32 magnitude = code & 0x7fu;
  float a = magnitude < 1u << MANTISSA ? float(magnitude) * power_of_two(1 - BIAS - MANTISSA)
                                       : __uint_as_float((magnitude << (23 - MANTISSA)) + ((127 - BIAS) << 23));
  return code & 0x80u ? -a : a;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS)
    dequantize(const u8* codes, const float* scales, X* out, i64 n, i64 pieces, i64 code_stride, i64 scale_stride,
               float factor) {
  i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * PACK;
  if (i >= n) return;
  i64 at = FORMAT == INT4 ? i / 2 : i, n_code_bytes = code_bytes(n);
  Floats<PACK> sum = {};
  for (i64 first = 0; first < pieces; first += UNROLL) {
    Pack<u8, CODE_BYTES> packs[UNROLL];
    float scale[UNROLL];
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      if (first + k >= pieces) break;
      packs[k] = read<CODE_BYTES>(codes + (first + k) * code_stride, at, n_code_bytes);
      scale[k] = scales[(first + k) * scale_stride + i / BLOCK];
    }
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      if (first + k >= pieces) break;
#pragma unroll
      for (int j = 0; j < PACK; ++j) {
        u32 code = FORMAT == INT4 ? u32(packs[k].at[j / 2]) >> (j % 2 * 4) : u32(packs[k].at[j]);
        sum.at[j] += value_of(code) * scale[k];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < PACK; ++j) sum.at[j] *= factor;
  write(out, i, n, rounded<X>(sum));
}
