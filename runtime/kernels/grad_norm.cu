// Sum of squares over many tensors in one pass, and whether an element is infinite or NaN.
//
// Defines: X_TYPE (bf16, f16, f32), LISTS (1), PACK (elements per access), THREADS, UNROLL (accesses before the first use),
// CHUNK.

#include "common.cuh"
#include "tables.cuh"
#include "sums.cuh"

typedef X_TYPE X;

static_assert(CHUNK % (THREADS * PACK * UNROLL) == 0, "a chunk is whole rounds");

// sums: of squares, and of every element times zero: zero as long as all are finite.
template <int N>
__device__ __forceinline__ void add_squares(const Piece& piece, float (&sums)[2]) {
  const X* x = piece.list<const X>(0);
  i64 size = piece.size();
  constexpr int STEP = THREADS * N;
#pragma unroll 1
  for (i64 i = piece.first + i64(threadIdx.x) * N; i < piece.end; i += STEP * UNROLL) {
    Pack<X, N> xs[UNROLL];
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) xs[k] = load_part<N>(x, i + k * STEP, size);
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      Floats<N> v = floats(xs[k]);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        sums[0] += v.at[j] * v.at[j];
        sums[1] += v.at[j] * 0.f;
      }
    }
  }
}

// partial[chunk]: the chunk's sum of squares in fp32; 1 where an element is not finite, else 0.
extern "C" __global__ void __launch_bounds__(THREADS) chunk_squares(const i64* table, i64 n_chunks, float* partial) {
  __shared__ float scratch[2 * 2 * 32];
  Piece piece = piece_of(table, n_chunks, blockIdx.x);
  float sums[2] = {0.f, 0.f};
  if (piece.packed())
    add_squares<PACK>(piece, sums);
  else
    add_squares<1>(piece, sums);
  int turn = 0;
  group_sum<THREADS>(sums, scratch, turn);
  if (threadIdx.x == 0) {
    partial[2 * i64(blockIdx.x)] = sums[0];
    partial[2 * i64(blockIdx.x) + 1] = sums[1] == 0.f ? 0.f : 1.f;
  }
}

// out: sum of squares (added up in fp64); 1 if an element is not finite, else 0. One block.
extern "C" __global__ void __launch_bounds__(THREADS) total_squares(const float* partial, i64 n_chunks, float* out) {
  __shared__ double scratch[THREADS][2];
  double sums[2] = {0., 0.};
  pairs_sum<THREADS>(partial, n_chunks, sums, scratch);
  if (threadIdx.x == 0) {
    out[0] = float(sums[0]);
    out[1] = sums[1] > 0. ? 1.f : 0.f;
  }
}
