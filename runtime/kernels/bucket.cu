// target = source * factor over many pairs of tensors of one size, from one dtype into another; in place too.
//
// Defines: X_TYPE, Y_TYPE (source, target: bf16, f16, f32), LISTS (2), PACK (elements per access), THREADS, UNROLL (accesses
// before the first use), CHUNK.
// Lists: targets, sources.

#include "common.cuh"
#include "tables.cuh"

typedef X_TYPE X;
typedef Y_TYPE Y;

static_assert(CHUNK % (THREADS * PACK * UNROLL) == 0, "a chunk is whole rounds");

template <int N>
__device__ __forceinline__ void copy(const Piece& piece, const float* factor) {
  Y* target = piece.list<Y>(0);
  const X* source = piece.list<const X>(1);
  i64 size = piece.size();
  constexpr int STEP = THREADS * N;
  float scale = factor ? *factor : 1.f;
#pragma unroll 1
  for (i64 i = piece.first + i64(threadIdx.x) * N; i < piece.end; i += STEP * UNROLL) {
    Pack<X, N> xs[UNROLL];
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) xs[k] = load_part<N>(source, i + k * STEP, size);
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      Floats<N> v = floats(xs[k]);
      if (factor) {  // without one denormals pass as they are, also where arithmetic flushes them
#pragma unroll
        for (int j = 0; j < N; ++j) v.at[j] *= scale;
      }
      store_part(target, i + k * STEP, size, rounded<Y>(v));
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) bucket_copy(const i64* table, i64 n_chunks, const float* factor) {
  Piece piece = piece_of(table, n_chunks, blockIdx.x);
  if (piece.packed())
    copy<PACK>(piece, factor);
  else
    copy<1>(piece, factor);
}
