// RMSNorm (Zhang & Sennrich 2019) and LayerNorm (Ba et al. 2016) of the last dimension, forward, optionally of
// h = residual + dropout(x), which is written too. h is rounded before its statistics are taken, so that the backward pass
// sees the same numbers; it stays in registers between the two passes over it.
//
// Defines: X_TYPE, W_TYPE (bf16, f16, f32), WIDTH, RMS, BIAS, RESIDUAL, DROPOUT (0 or 1), PACK, LANES, THREADS.

#include "norm.cuh"

// Room for 640 threads on a multiprocessor, about 100 registers each: without a word the compiler for sm_100 spills to fit
// more, and with less the row does not stay in registers.
#define RESIDENT_BLOCKS (THREADS < 640 ? 640 / THREADS : 1)

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT_BLOCKS)
    norm_forward(const X* x, const X* residual, const W* weight, const W* bias, X* h, X* y, float* mean, float* inverse,
                 i64 rows, float eps, const u64* seed, i64 threshold, float scale) {
  __shared__ float scratch[2 * 32];
  int turn = 0;
#if DROPOUT
  u64 key = *seed;
#endif
  for (i64 first = (i64)blockIdx.x * ROWS; first < rows; first += (i64)gridDim.x * ROWS) {
    i64 row = first + threadIdx.x / LANES, start = row * WIDTH;
    Pack<X, PACK> packs[CHUNKS] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
      if (row < rows && column_of(c) < WIDTH) packs[c] = load_once<PACK>(x + start + column_of(c));
#if RESIDUAL
    Pack<X, PACK> residuals[CHUNKS] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
      if (row < rows && column_of(c) < WIDTH) residuals[c] = load_once<PACK>(residual + start + column_of(c));
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      Floats<PACK> v = floats(packs[c]), r = floats(residuals[c]);
#if DROPOUT
      Floats<PACK> factor = dropout_factors<PACK>(start + column_of(c), key, u32(threshold), scale);
#pragma unroll
      for (int j = 0; j < PACK; ++j) v.at[j] = factor.at[j] != 0.f ? v.at[j] * factor.at[j] : 0.f;
#endif
#pragma unroll
      for (int j = 0; j < PACK; ++j) v.at[j] += r.at[j];
      // Beyond the row both are zero; a dropped or kept zero adds nothing to the sums below.
      packs[c] = rounded<X>(v);
      if (row < rows && column_of(c) < WIDTH) store(h + start + column_of(c), packs[c]);
    }
#endif
    float center = 0.f;
#if !RMS
    float total[1] = {0.f};
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      Floats<PACK> v = floats(packs[c]);
#pragma unroll
      for (int j = 0; j < PACK; ++j) total[0] += v.at[j];
    }
    group_sum<LANES>(total, scratch, turn);
    center = total[0] / WIDTH;
#endif
    float squares[1] = {0.f};
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      if (column_of(c) >= WIDTH) break;
      Floats<PACK> v = floats(packs[c]);
#pragma unroll
      for (int j = 0; j < PACK; ++j) squares[0] += (v.at[j] - center) * (v.at[j] - center);
    }
    group_sum<LANES>(squares, scratch, turn);
    float factor = 1.f / sqrtf(squares[0] / WIDTH + eps);
    if (row >= rows) continue;
    if (threadIdx.x % LANES == 0) {
#if !RMS
      mean[row] = center;
#endif
      inverse[row] = factor;
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      if (column_of(c) >= WIDTH) break;
      Floats<PACK> v = floats(packs[c]), w = floats(load<PACK>(weight + column_of(c)));
#pragma unroll
      for (int j = 0; j < PACK; ++j) v.at[j] = (v.at[j] - center) * factor * w.at[j];
#if BIAS
      Floats<PACK> b = floats(load<PACK>(bias + column_of(c)));
#pragma unroll
      for (int j = 0; j < PACK; ++j) v.at[j] += b.at[j];
#endif
      store(y + start + column_of(c), rounded<X>(v));
    }
  }
}
