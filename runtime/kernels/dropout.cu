// y = residual + x * factor, and the gradient of x. A factor is `scale` or 0, from counter-based random numbers that both
// passes compute from `seed`; no mask is stored.
//
// Defines: X_TYPE (bf16, f16, f32), PACK (elements per access), THREADS, UNROLL (accesses per operand before first use).

#include "common.cuh"
#include "philox.cuh"

typedef X_TYPE X;

#define FIRST_ELEMENT (((i64)blockIdx.x * UNROLL * THREADS + threadIdx.x) * PACK)
#define STEP (i64(THREADS) * PACK)

extern "C" __global__ void __launch_bounds__(THREADS)
    dropout_forward(const X* x, const X* residual, X* y, const u64* seed, i64 n, i64 threshold, float scale) {
  i64 first = FIRST_ELEMENT;
  Pack<X, PACK> xs[UNROLL], residuals[UNROLL];
#pragma unroll
  for (int k = 0; k < UNROLL; ++k) {
    xs[k] = load_part<PACK>(x, first + k * STEP, n);
    residuals[k] = load_part<PACK>(residual, first + k * STEP, n);
  }
  u64 key = *seed;
#pragma unroll
  for (int k = 0; k < UNROLL; ++k) {
    Floats<PACK> v = floats(xs[k]), r = floats(residuals[k]);
    Floats<PACK> factor = dropout_factors<PACK>(first + k * STEP, key, u32(threshold), scale);
#pragma unroll
    for (int j = 0; j < PACK; ++j) v.at[j] = r.at[j] + (factor.at[j] != 0.f ? v.at[j] * factor.at[j] : 0.f);
    store_part(y, first + k * STEP, n, rounded<X>(v));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    dropout_backward(const X* grad_y, X* grad_x, const u64* seed, i64 n, i64 threshold, float scale) {
  i64 first = FIRST_ELEMENT;
  Pack<X, PACK> grads[UNROLL];
#pragma unroll
  for (int k = 0; k < UNROLL; ++k) grads[k] = load_part<PACK>(grad_y, first + k * STEP, n);
  u64 key = *seed;
#pragma unroll
  for (int k = 0; k < UNROLL; ++k) {
    Floats<PACK> v = floats(grads[k]);
    Floats<PACK> factor = dropout_factors<PACK>(first + k * STEP, key, u32(threshold), scale);
#pragma unroll
    for (int j = 0; j < PACK; ++j) v.at[j] = factor.at[j] != 0.f ? v.at[j] * factor.at[j] : 0.f;
    store_part(grad_x, first + k * STEP, n, rounded<X>(v));
  }
}
