// activation(x + bias), forward and backward.
//
// A thread owns PACK columns and walks down the rows of its slab, so that the bias is read once and the gradient of the
// bias is summed in registers, in row order.
//
// Defines: X_TYPE (bf16, f16, f32), ACT, PACK (elements per access), THREADS, COLUMN_THREADS (threads side by side in a
// row), UNROLL (rows that a thread loads before the first use).

#include "common.cuh"
#include "activation.cuh"

typedef X_TYPE X;

#define ROW_THREADS (THREADS / COLUMN_THREADS)
#define COLUMN (((i64)blockIdx.x * COLUMN_THREADS + threadIdx.x % COLUMN_THREADS) * PACK)
#define SLAB_ROW ((i64)blockIdx.y * ROW_THREADS + threadIdx.x / COLUMN_THREADS)
#define ROW_STEP ((i64)gridDim.y * ROW_THREADS)

extern "C" __global__ void __launch_bounds__(THREADS)
    biased_forward(const X* x, const X* bias, X* y, i64 rows, i64 width) {
  i64 column = COLUMN;
  if (column >= width) return;
  Floats<PACK> b = floats(load<PACK>(bias + column));
  i64 step = ROW_STEP;
  for (i64 row = SLAB_ROW; row < rows; row += step * UNROLL) {
    Pack<X, PACK> xs[UNROLL];
#pragma unroll
    for (int k = 0; k < UNROLL; ++k)
      if (row + k * step < rows) xs[k] = load_once<PACK>(x + (row + k * step) * width + column);
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      if (row + k * step >= rows) break;
      Floats<PACK> v = floats(xs[k]);
#pragma unroll
      for (int j = 0; j < PACK; ++j) v.at[j] = activated(v.at[j] + b.at[j]).value;
      store(y + (row + k * step) * width + column, rounded<X>(v));
    }
  }
}

// `partial` [gridDim.y * ROW_THREADS, width]: the bias gradient of each slab.
extern "C" __global__ void __launch_bounds__(THREADS)
    biased_backward(const X* grad_y, const X* x, const X* bias, X* grad_x, float* partial, i64 rows, i64 width) {
  i64 column = COLUMN;
  if (column >= width) return;
  Floats<PACK> b = floats(load<PACK>(bias + column)), sum = {};
  i64 step = ROW_STEP;
  for (i64 row = SLAB_ROW; row < rows; row += step * UNROLL) {
    Pack<X, PACK> xs[UNROLL], grads[UNROLL];
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      if (row + k * step >= rows) break;
      xs[k] = load_once<PACK>(x + (row + k * step) * width + column);
      grads[k] = load_once<PACK>(grad_y + (row + k * step) * width + column);
    }
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      if (row + k * step >= rows) break;
      Floats<PACK> v = floats(xs[k]), grad = floats(grads[k]);
#pragma unroll
      for (int j = 0; j < PACK; ++j) {
        v.at[j] = grad.at[j] * activated(v.at[j] + b.at[j]).slope;
        sum.at[j] += v.at[j];
      }
      store(grad_x + (row + k * step) * width + column, rounded<X>(v));
    }
  }
  Pack<float, PACK> out = rounded<float>(sum);
  store(partial + SLAB_ROW * width + column, out);
}
