// Second stage of weight gradients: out[column] = sum over rows of partial[row, column], in a fixed order.
//
// Defines: OUT_TYPE (bf16, f16, f32). 32 columns and 32 row lanes to a block of 1024 threads.

#include "common.cuh"

#define LANES 32

extern "C" __global__ void __launch_bounds__(1024)
    sum_columns(const float* partial, OUT_TYPE* out, i64 rows, i64 width) {
  __shared__ float sums[LANES][33];
  int lane = threadIdx.x / 32, within = threadIdx.x % 32;
  i64 column = (i64)blockIdx.x * 32 + within;
  float sum = 0.f;
  if (column < width) {
#pragma unroll 4
    for (i64 row = lane; row < rows; row += LANES) sum += partial[row * width + column];
  }
  sums[lane][within] = sum;
  __syncthreads();
  // Warp `lane` now adds up column `lane` of this block.
  float total = lanes_sum<32>(sums[within][lane]);
  i64 target = (i64)blockIdx.x * 32 + lane;
  if (within == 0 && target < width) out[target] = from_float<OUT_TYPE>(total);
}
