// Gradients of RMSNorm and LayerNorm. With x^ = (h - mean) * inverse and g = grad_y * weight, over each row:
//   grad_h = inverse * (g - mean(g) - x^ * mean(g * x^)) + grad_sum        (RMSNorm: without mean(g))
//   grad_x = grad_h * dropout factor
// Weight and bias gradients are summed in registers over the rows of a block, then over the rows side by side in it, and
// leave as one fp32 row of `partial_weight` and `partial_bias` [gridDim.x, WIDTH]; columns.cu adds those up.
//
// Defines: X_TYPE, W_TYPE (bf16, f16, f32), WIDTH, RMS, BIAS, GRAD_SUM (h went on beside y), DROPOUT (0 or 1), RELOAD (1:
// h and grad_y are read again, from cache, rather than kept in registers over the row's sums; a row is then a block),
// PACK, LANES, THREADS. Dynamic shared memory: WIDTH floats with RELOAD and BIAS.

#include "norm.cuh"

// Adds up the threads that own the same columns in the rows side by side, in row order, and writes the block's row.
#define WRITE_PARTIAL(sums, partial)                                                                            \
  do {                                                                                                          \
    if (ROWS > 1) {                                                                                             \
      __syncthreads();                                                                                          \
      for (int c = 0; c < CHUNKS; ++c)                                                                          \
        for (int j = 0; j < PACK; ++j)                                                                          \
          if (column_of(c) < WIDTH) shared_sums[threadIdx.x / LANES * WIDTH + column_of(c) + j] = sums[c].at[j]; \
      __syncthreads();                                                                                          \
      for (int column = threadIdx.x; column < WIDTH; column += THREADS) {                                       \
        float sum = 0.f;                                                                                        \
        for (int r = 0; r < ROWS; ++r) sum += shared_sums[r * WIDTH + column];                                  \
        partial[(i64)blockIdx.x * WIDTH + column] = sum;                                                        \
      }                                                                                                         \
    } else {                                                                                                    \
      for (int c = 0; c < CHUNKS; ++c)                                                                          \
        if (column_of(c) < WIDTH)                                                                               \
          store(partial + (i64)blockIdx.x * WIDTH + column_of(c), rounded<float>(sums[c]));                     \
    }                                                                                                           \
  } while (0)

extern "C" __global__ void __launch_bounds__(THREADS)
    norm_backward(const X* grad_y, const X* grad_sum, const X* h, const W* weight, const float* mean, const float* inverse,
                  X* grad_h, X* grad_x, float* partial_weight, float* partial_bias, i64 rows, const u64* seed,
                  i64 threshold, float scale) {
  __shared__ float scratch[2 * 2 * 32];
  __shared__ float shared_sums[ROWS > 1 ? ROWS * WIDTH : 1];
  int turn = 0;
#if DROPOUT
  u64 key = *seed;
#endif
  Floats<PACK> weight_sums[CHUNKS] = {};
#if BIAS && !RELOAD
  Floats<PACK> bias_sums[CHUNKS] = {};
#elif BIAS
  // Rows this wide leave no registers for it: every thread keeps its columns' sums in shared memory.
  DYNAMIC_SHARED(float, bias_sums);
#define BIAS_SUMS(column) (*reinterpret_cast<Pack<float, PACK>*>(bias_sums + (column)))
  for (int c = 0; c < CHUNKS; ++c)
    if (column_of(c) < WIDTH) BIAS_SUMS(column_of(c)) = Pack<float, PACK>{};
#endif
  for (i64 first = (i64)blockIdx.x * ROWS; first < rows; first += (i64)gridDim.x * ROWS) {
    i64 row = first + threadIdx.x / LANES, start = row * WIDTH;
    bool here = row < rows;
    float factor = here ? inverse[row] : 0.f, center = 0.f;
#if !RMS
    center = here ? mean[row] : 0.f;
#endif
#if !RELOAD
    Pack<X, PACK> hs[CHUNKS] = {}, grads[CHUNKS] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      if (!here || column_of(c) >= WIDTH) break;
      hs[c] = load_once<PACK>(h + start + column_of(c));
      grads[c] = load_once<PACK>(grad_y + start + column_of(c));
    }
#define H(c) hs[c]
#define GRAD(c) grads[c]
#else
#define H(c) load<PACK>(h + start + column_of(c))
#define GRAD(c) load<PACK>(grad_y + start + column_of(c))
#endif
    float means[2] = {0.f, 0.f};  // of g * x^ and of g
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      if (!here || column_of(c) >= WIDTH) break;
      Floats<PACK> v = floats(H(c)), grad = floats(GRAD(c)), w = floats(load<PACK>(weight + column_of(c)));
#pragma unroll
      for (int j = 0; j < PACK; ++j) {
        float normal = (v.at[j] - center) * factor, g = grad.at[j] * w.at[j];
        means[0] += g * normal;
        means[1] += g;
        weight_sums[c].at[j] += grad.at[j] * normal;
#if BIAS && !RELOAD
        bias_sums[c].at[j] += grad.at[j];
#endif
      }
#if BIAS && RELOAD
      Pack<float, PACK> so_far = BIAS_SUMS(column_of(c));
#pragma unroll
      for (int j = 0; j < PACK; ++j) so_far.at[j] += grad.at[j];
      BIAS_SUMS(column_of(c)) = so_far;
#endif
    }
#if RMS
    float only[1] = {means[0]};
    group_sum<LANES>(only, scratch, turn);
    means[0] = only[0] / WIDTH;
    means[1] = 0.f;
#else
    group_sum<LANES>(means, scratch, turn);
    means[0] /= WIDTH;
    means[1] /= WIDTH;
#endif
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      if (!here || column_of(c) >= WIDTH) break;
      Floats<PACK> v = floats(H(c)), grad = floats(GRAD(c)), w = floats(load<PACK>(weight + column_of(c)));
#pragma unroll
      for (int j = 0; j < PACK; ++j) {
        float normal = (v.at[j] - center) * factor;
        v.at[j] = factor * (grad.at[j] * w.at[j] - means[1] - normal * means[0]);
      }
#if GRAD_SUM
      Floats<PACK> other = floats(load_once<PACK>(grad_sum + start + column_of(c)));
#pragma unroll
      for (int j = 0; j < PACK; ++j) v.at[j] += other.at[j];
#endif
      store(grad_h + start + column_of(c), rounded<X>(v));
#if DROPOUT
      Floats<PACK> kept = dropout_factors<PACK>(start + column_of(c), key, u32(threshold), scale);
#pragma unroll
      for (int j = 0; j < PACK; ++j) v.at[j] = kept.at[j] != 0.f ? v.at[j] * kept.at[j] : 0.f;
      store(grad_x + start + column_of(c), rounded<X>(v));
#endif
    }
  }
  WRITE_PARTIAL(weight_sums, partial_weight);
#if BIAS && !RELOAD
  WRITE_PARTIAL(bias_sums, partial_bias);
#elif BIAS
  for (int c = 0; c < CHUNKS; ++c)
    if (column_of(c) < WIDTH)
      store(partial_bias + (i64)blockIdx.x * WIDTH + column_of(c), BIAS_SUMS(column_of(c)));
#endif
}
