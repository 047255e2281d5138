// What is known of rows of a loss, reduced by one block in a fixed order: their number and the sum of their losses.

#include "common.cuh"

// out[0] = 1 / n, what sums of losses are divided by (infinite without a row); out[1] the same for gradients (1 at most).
extern "C" __global__ void __launch_bounds__(1024) count_rows(const i64* labels, float* out, i64 rows, i64 ignore) {
  __shared__ float scratch[2 * 32];
  float n[1] = {0.f};
  for (i64 row = threadIdx.x; row < rows; row += 1024) n[0] += labels[row] == ignore ? 0.f : 1.f;
  int turn = 0;
  group_sum<1024>(n, scratch, turn);
  if (threadIdx.x == 0) {
    out[0] = 1.f / n[0];
    out[1] = 1.f / fmaxf(n[0], 1.f);
  }
}

// *out = the sum of losses, times *normaliser (null: 1).
extern "C" __global__ void __launch_bounds__(1024)
    sum_rows(const float* losses, const float* normaliser, float* out, i64 rows) {
  __shared__ float scratch[2 * 32];
  float sum[1] = {0.f};
  for (i64 row = threadIdx.x; row < rows; row += 1024) sum[0] += losses[row];
  int turn = 0;
  group_sum<1024>(sum, scratch, turn);
  if (threadIdx.x == 0) *out = sum[0] * (normaliser ? *normaliser : 1.f);
}
