// An optimizer step over many tensors in one pass: fp32 parameters and states in place, the parameters' 16-bit copies.
//
// Defines: RULE (optimizer.cuh), STATES (1 or 2), GRAD_TYPE (bf16, f16, f32), COPY (0, 1), COPY_TYPE, LISTS
// (2 + STATES + COPY), PACK (elements per access), THREADS, UNROLL (accesses per operand before the first use), CHUNK.
// Lists: parameters, gradients, states, copies.

#include "common.cuh"
#include "tables.cuh"
#include "optimizer.cuh"

typedef GRAD_TYPE G;
typedef COPY_TYPE C;

static_assert(CHUNK % (THREADS * PACK * UNROLL) == 0, "a chunk is whole rounds");

template <int N>
__device__ __forceinline__ void run(const Piece& piece, const Rates& rates) {
  float* param = piece.list<float>(0);
  const G* grad = piece.list<const G>(1);
  i64 size = piece.size();
  constexpr int STEP = THREADS * N;
#pragma unroll 1
  for (i64 i = piece.first + i64(threadIdx.x) * N; i < piece.end; i += STEP * UNROLL) {
    Pack<float, N> p[UNROLL], s[UNROLL][STATES];
    Pack<G, N> grads[UNROLL];
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      i64 at = i + k * STEP;
      grads[k] = load_part<N>(grad, at, size);
      p[k] = load_part<N>(param, at, size);
#pragma unroll
      for (int t = 0; t < STATES; ++t) s[k][t] = load_part<N>(piece.list<float>(2 + t), at, size);
    }
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      i64 at = i + k * STEP;
      Floats<N> g = floats(grads[k]), copied;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        stepped(rates, g.at[j], p[k].at[j], s[k][0].at[j], s[k][STATES - 1].at[j]);
        copied.at[j] = p[k].at[j];
      }
      store_part(param, at, size, p[k]);
#pragma unroll
      for (int t = 0; t < STATES; ++t) store_part(piece.list<float>(2 + t), at, size, s[k][t]);
      if constexpr (COPY) store_part(piece.list<C>(LISTS - 1), at, size, rounded<C>(copied));
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) optimizer_step(const i64* table, i64 n_chunks, STEP_PARAMETERS) {
  if (SKIPPED) return;
  Piece piece = piece_of(table, n_chunks, blockIdx.x);
  Rates rates = RATES;
  if (piece.packed())
    run<PACK>(piece, rates);
  else
    run<1>(piece, rates);
}
