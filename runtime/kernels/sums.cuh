// Sums that end in fp64 and in a fixed order, so that they are the same bits every time.

// Sums of K values over the THREADS threads of a block (a power of two), given to thread 0.
template <int Threads, int K>
__device__ __forceinline__ void block_sum(double (&x)[K], double (*scratch)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) scratch[threadIdx.x][k] = x[k];
#pragma unroll 1
  for (int half = Threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
#pragma unroll
      for (int k = 0; k < K; ++k) scratch[threadIdx.x][k] += scratch[threadIdx.x + half][k];
    }
  }
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) x[k] = scratch[0][k];
  }
}

// One pair of fp32 partial sums at a time: thread t of the block adds up pairs t, t + THREADS, ...
template <int Threads>
__device__ __forceinline__ void pairs_sum(const float* pairs, i64 n, double (&sum)[2], double (*scratch)[2]) {
#pragma unroll 4
  for (i64 i = threadIdx.x; i < n; i += Threads) {
    Pack<float, 2> pair = load<2>(pairs + 2 * i);
    sum[0] += pair.at[0];
    sum[1] += pair.at[1];
  }
  block_sum<Threads>(sum, scratch);
}
