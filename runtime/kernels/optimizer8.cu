// Adam over many tensors in one pass with moments in 8 bits (blockwise8.cuh); a warp takes a block of 256 elements.
//
// Defines: RULE (ADAM, ADAMW), GRAD_TYPE (bf16, f16, f32), COPY (0, 1), COPY_TYPE, LISTS (6 + COPY), PACK (elements per
// access, at most 8), THREADS, BLOCKS (resident on a multiprocessor), CHUNK.
// Lists: parameters, gradients, codes of the first and second moment, copies; then greatest magnitudes of the moments.

#include "common.cuh"
#include "tables.cuh"
#include "optimizer.cuh"
#include "blockwise8.cuh"

typedef GRAD_TYPE G;
typedef COPY_TYPE C;
typedef unsigned char u8;

static_assert(CHUNK % (THREADS / 32 * QUANT_BLOCK) == 0, "a chunk is whole rounds");

template <int N>
__device__ __forceinline__ void run(const Piece& piece, const Rates& rates, const Map* maps) {
  constexpr int PACKS = QUANT_BLOCK / 32 / N;
  float* param = piece.list<float>(0);
  const G* grad = piece.list<const G>(1);
  u8 *codes_m = piece.list<u8>(2), *codes_v = piece.list<u8>(3);
  float *absmax_m = piece.list<float>(LISTS - 2), *absmax_v = piece.list<float>(LISTS - 1);
  i64 size = piece.size();
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
  for (i64 start = piece.first + warp * QUANT_BLOCK; start < piece.end; start += THREADS / 32 * QUANT_BLOCK) {
    Pack<float, N> p[PACKS];
    Pack<G, N> grads[PACKS];
    Pack<u8, N> ms[PACKS], vs[PACKS];
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      i64 at = start + (k * 32 + lane) * N;
      grads[k] = load_part<N>(grad, at, size);
      p[k] = load_part<N>(param, at, size);
      ms[k] = load_part<N>(codes_m, at, size);
      vs[k] = load_part<N>(codes_v, at, size);
    }
    float scale_m = absmax_m[start / QUANT_BLOCK], scale_v = absmax_v[start / QUANT_BLOCK];
    float m[PACKS][N], v[PACKS][N], most_m = 0.f, most_v = 0.f;
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      i64 at = start + (k * 32 + lane) * N;
      Floats<N> g = floats(grads[k]), copied;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        m[k][j] = decoded<true>(maps[0], ms[k].at[j]) * scale_m;
        v[k][j] = decoded<false>(maps[1], vs[k].at[j]) * scale_v;
        stepped(rates, g.at[j], p[k].at[j], m[k][j], v[k][j]);
        copied.at[j] = p[k].at[j];
        if (at + j < size) {
          most_m = fmaxf(most_m, fabsf(m[k][j]));
          most_v = fmaxf(most_v, v[k][j]);
        }
      }
      store_part(param, at, size, p[k]);
      if constexpr (COPY) store_part(piece.list<C>(4), at, size, rounded<C>(copied));
    }
    most_m = lanes_max(most_m);
    most_v = lanes_max(most_v);
    float inverse_m = inverse_of(most_m), inverse_v = inverse_of(most_v);
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      i64 at = start + (k * 32 + lane) * N;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        ms[k].at[j] = encoded<true>(maps[0], m[k][j] * inverse_m);
        vs[k].at[j] = encoded<false>(maps[1], v[k][j] * inverse_v);
      }
      store_part(codes_m, at, size, ms[k]);
      store_part(codes_v, at, size, vs[k]);
    }
    if (lane == 0) {
      absmax_m[start / QUANT_BLOCK] = most_m;
      absmax_v[start / QUANT_BLOCK] = most_v;
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    optimizer8_step(const i64* table, i64 n_chunks, const float* tables, STEP_PARAMETERS) {
  __shared__ Map maps[2];  // with sign, without
  if (SKIPPED) return;
  float* filled = reinterpret_cast<float*>(maps);
  for (int i = threadIdx.x; i < int(sizeof maps / sizeof(float)); i += THREADS) filled[i] = tables[i];
  __syncthreads();
  Piece piece = piece_of(table, n_chunks, blockIdx.x);
  Rates rates = RATES;
  if (piece.packed())
    run<PACK>(piece, rates, maps);
  else
    run<1>(piece, rates, maps);
}
