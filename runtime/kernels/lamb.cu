// LAMB over many tensors: moments and the norms of parameters and updates, then the step with each tensor's trust ratio.
//
// Defines: RULE (LAMB), GRAD_TYPE (bf16, f16, f32), COPY (0, 1), COPY_TYPE, LISTS, PACK (elements per access), THREADS,
// UNROLL (accesses per operand before the first use), CHUNK.
// Lists of lamb_moments: parameters, moments, gradients; of lamb_apply: parameters, moments, copies.

#include "common.cuh"
#include "tables.cuh"
#include "optimizer.cuh"
#include "sums.cuh"

typedef GRAD_TYPE G;
typedef COPY_TYPE C;

static_assert(CHUNK % (THREADS * PACK * UNROLL) == 0, "a chunk is whole rounds");

__device__ __forceinline__ float update_of(const Rates& r, float p, float m, float v) {
  return r.size * direction(r, m, v) + r.decay * p;
}

template <int N>
__device__ __forceinline__ void take_moments(const Piece& piece, const Rates& rates, float (&sums)[2]) {
  const float* param = piece.list<const float>(0);
  float *first = piece.list<float>(1), *second = piece.list<float>(2);
  const G* grad = piece.list<const G>(3);
  i64 size = piece.size();
  constexpr int STEP = THREADS * N;
#pragma unroll 1
  for (i64 i = piece.first + i64(threadIdx.x) * N; i < piece.end; i += STEP * UNROLL) {
    Pack<float, N> p[UNROLL], m[UNROLL], v[UNROLL];
    Pack<G, N> grads[UNROLL];
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      i64 at = i + k * STEP;
      grads[k] = load_part<N>(grad, at, size);
      p[k] = load_part<N>(param, at, size);
      m[k] = load_part<N>(first, at, size);
      v[k] = load_part<N>(second, at, size);
    }
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      i64 at = i + k * STEP;
      Floats<N> g = floats(grads[k]);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        moments(rates, g.at[j] * rates.factor, m[k].at[j], v[k].at[j]);
        float u = update_of(rates, p[k].at[j], m[k].at[j], v[k].at[j]);
        if (at + j >= 0 && at + j < size) {
          sums[0] += p[k].at[j] * p[k].at[j];
          sums[1] += u * u;
        }
      }
      store_part(first, at, size, m[k]);
      store_part(second, at, size, v[k]);
    }
  }
}

// partial[chunk]: sums of squares of the chunk's parameters and updates; zeros when the step is skipped.
extern "C" __global__ void __launch_bounds__(THREADS)
    lamb_moments(const i64* table, i64 n_chunks, float* partial, STEP_PARAMETERS) {
  __shared__ float scratch[2 * 2 * 32];
  float sums[2] = {0.f, 0.f};
  if (!SKIPPED) {
    Piece piece = piece_of(table, n_chunks, blockIdx.x);
    Rates rates = RATES;
    if (piece.packed())
      take_moments<PACK>(piece, rates, sums);
    else
      take_moments<1>(piece, rates, sums);
  }
  int turn = 0;
  group_sum<THREADS>(sums, scratch, turn);
  if (threadIdx.x == 0) {
    partial[2 * i64(blockIdx.x)] = sums[0];
    partial[2 * i64(blockIdx.x) + 1] = sums[1];
  }
}

// norms[tensor]: sums over its chunks.
extern "C" __global__ void __launch_bounds__(THREADS)
    lamb_norms(const i64* table, i64 n_chunks, const float* partial, float* norms, i64 n_tensors) {
  __shared__ double scratch[THREADS][2];
  const i64* record = table + n_chunks + i64(blockIdx.x) * (3 + LISTS);
  i64 first = record[2], end = i64(blockIdx.x) + 1 < n_tensors ? record[3 + LISTS + 2] : n_chunks;
  double sums[2] = {0., 0.};
  pairs_sum<THREADS>(partial + 2 * first, end - first, sums, scratch);
  if (threadIdx.x == 0) {
    norms[2 * i64(blockIdx.x)] = float(sums[0]);
    norms[2 * i64(blockIdx.x) + 1] = float(sums[1]);
  }
}

template <int N>
__device__ __forceinline__ void apply(const Piece& piece, const Rates& rates, float rate) {
  float* param = piece.list<float>(0);
  const float *first = piece.list<const float>(1), *second = piece.list<const float>(2);
  i64 size = piece.size();
  constexpr int STEP = THREADS * N;
#pragma unroll 1
  for (i64 i = piece.first + i64(threadIdx.x) * N; i < piece.end; i += STEP * UNROLL) {
    Pack<float, N> p[UNROLL], m[UNROLL], v[UNROLL];
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      i64 at = i + k * STEP;
      p[k] = load_part<N>(param, at, size);
      m[k] = load_part<N>(first, at, size);
      v[k] = load_part<N>(second, at, size);
    }
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      i64 at = i + k * STEP;
      Floats<N> copied;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        p[k].at[j] -= rate * update_of(rates, p[k].at[j], m[k].at[j], v[k].at[j]);
        copied.at[j] = p[k].at[j];
      }
      store_part(param, at, size, p[k]);
      if constexpr (COPY) store_part(piece.list<C>(LISTS - 1), at, size, rounded<C>(copied));
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    lamb_apply(const i64* table, i64 n_chunks, const float* norms, STEP_PARAMETERS) {
  if (SKIPPED) return;
  Piece piece = piece_of(table, n_chunks, blockIdx.x);
  Rates rates = RATES;
  const float* squares = norms + 2 * table[blockIdx.x];
  float trust = squares[0] > 0.f && squares[1] > 0.f ? sqrtf(squares[0]) / sqrtf(squares[1]) : 1.f;
  if (piece.packed())
    apply<PACK>(piece, rates, rates.lr * trust);
  else
    apply<1>(piece, rates, rates.lr * trust);
}
