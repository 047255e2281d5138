// Softmax cross-entropy of rows of logits x over a vocabulary of V, one block to a row. With top = max x, sum = sum of
// exp(x - top), lse = top + log(sum) (online: Milakov & Gimelshein 2018), smoothing e and z-loss weight z:
//   loss  = (1 - e) (lse - x[label]) + e (lse - mean x) + z lse^2
//   dx[j] = p[j] (1 + 2 z lse) - e / V - (1 - e) [j == label],  p[j] = exp(x[j] - top) / sum
// Gradients are written over the logits. Rows whose label is `ignore` lose 0 and get gradient 0; a label outside the
// vocabulary makes both NaN. Rows may start at any element: every row has its own head and tail.
//
// Defines: X_TYPE (bf16, f16, f32), THREADS (whole warps; one row), UNROLL (accesses before the first use), SMOOTHING
// (0: e is 0, and infinite logits do not enter a sum of logits).

#include "common.cuh"

typedef X_TYPE X;

#define PACK (16 / int(sizeof(X)))
#define STEP (THREADS * PACK)
#define INFINITE __int_as_float(0x7f800000)
#define NOT_A_NUMBER __int_as_float(0x7fc00000)

// exp(x) for x <= 0: to 2 ulp for 16-bit logits, at the speed of the special function unit.
__device__ __forceinline__ float exp_of(float x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(X) < 4) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
    return y;
  }
#endif
  return expf(x);
}

// What to subtract from logits of which `top` is the largest: nothing where all are -inf, so that exp gives 0, not NaN.
__device__ __forceinline__ float base_of(float top) { return top == -INFINITE ? 0.f : top; }

// Elements of the row's first pack that lie before the row.
__device__ __forceinline__ int head_of(const X* row) {
  return int(reinterpret_cast<u64>(row) % 16 / sizeof(X));
}

// The largest value of the block, given to each thread; `scratch` holds 32 floats. NaNs are passed over.
__device__ __forceinline__ float block_max(float x, float* scratch) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, step));
  if constexpr (THREADS > 32) {
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < THREADS / 32 ? scratch[threadIdx.x % 32] : -INFINITE;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, step));
  }
  return x;
}

struct Statistics {
  float top, sum, total;  // total: plain sum of the logits
};

// One pass over a row by the whole block; every thread gets the result. `scratch` holds 32 + 4 * 32 floats.
__device__ __forceinline__ Statistics statistics_of(const X* row, int width, float* scratch) {
  float top = -INFINITE, sum = 0.f, total = 0.f;
  for (int start = int(threadIdx.x) * PACK - head_of(row); start < width; start += STEP * UNROLL) {
    Pack<X, PACK> packs[UNROLL];
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) packs[k] = load_part<PACK>(row, start + k * STEP, width);
    Floats<PACK> v[UNROLL];
    float higher = top;
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      v[k] = floats(packs[k]);
#if SMOOTHING
      float part = 0.f;
#pragma unroll
      for (int j = 0; j < PACK; ++j) part += v[k].at[j];
      total += part;
#endif
      int i = start + k * STEP;
      if (i < 0 || i + PACK > width) {
#pragma unroll
        for (int j = 0; j < PACK; ++j)
          if (i + j < 0 || i + j >= width) v[k].at[j] = -INFINITE;
      }
#pragma unroll
      for (int j = 0; j < PACK; ++j) higher = fmaxf(higher, v[k].at[j]);
    }
    float base = base_of(higher);
    sum *= exp_of(top - base);
    top = higher;
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      float part = 0.f;
#pragma unroll
      for (int j = 0; j < PACK; ++j) part += exp_of(v[k].at[j] - base);
      sum += part;
    }
  }
  float all = block_max(top, scratch), sums[2] = {sum * exp_of(top - base_of(all)), total};
  int turn = 0;
  group_sum<THREADS>(sums, scratch + 32, turn);
  Statistics out = {all, sums[0], sums[1]};
  return out;
}

struct Target {
  bool ignored;
  i64 label;  // within this part of the vocabulary; negative or too large: elsewhere
  float logit;
};

// `vocab` is the whole vocabulary, of which the row holds [first, first + width).
__device__ __forceinline__ Target target_of(const X* row, i64 label, i64 first, i64 width, i64 vocab, i64 ignore) {
  Target t;
  t.ignored = label == ignore;
  t.label = label - first;
  bool valid = label >= 0 && label < vocab, here = t.label >= 0 && t.label < width;
  t.logit = !valid ? NOT_A_NUMBER : here ? to_float(row[t.label]) : 0.f;
  return t;
}

__device__ __forceinline__ float loss_of(const Statistics& s, float logit, i64 width, float smoothing, float z) {
  float log_sum = logf(s.sum), lse = s.top + log_sum;
  float loss = (s.top - logit) + log_sum;
#if SMOOTHING
  loss = (1.f - smoothing) * loss + smoothing * ((s.top - s.total / float(width)) + log_sum);
#endif
  return loss + z * lse * lse;
}

// Writes `factor` times the gradient over the row.
__device__ __forceinline__ void write_gradient(X* row, int width, const Target& t, float top, float sum, i64 vocab,
                                               float factor, float smoothing, float z) {
  float base = base_of(top), slope = factor * (1.f + 2.f * z * (top + logf(sum))) / sum;
  float everywhere = factor * smoothing / float(vocab), at_label = factor * (1.f - smoothing);
  if (t.ignored) slope = everywhere = at_label = 0.f;
  if (t.logit != t.logit) slope = NOT_A_NUMBER;
  for (int start = int(threadIdx.x) * PACK - head_of(row); start < width; start += STEP * UNROLL) {
    Pack<X, PACK> packs[UNROLL] = {};
    if (!t.ignored) {
#pragma unroll
      for (int k = 0; k < UNROLL; ++k) packs[k] = load_part<PACK>(row, start + k * STEP, width);
    }
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      int i = start + k * STEP;
      Floats<PACK> v = floats(packs[k]);
#pragma unroll
      for (int j = 0; j < PACK; ++j) v.at[j] = t.ignored ? 0.f : exp_of(v.at[j] - base) * slope - everywhere;
      if (t.label >= i && t.label < i + PACK) {
#pragma unroll
        for (int j = 0; j < PACK; ++j)
          if (i + j == t.label) v.at[j] -= at_label;
      }
      store_part(row, i, width, rounded<X>(v));
    }
  }
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// `tops` and `sums` [rows] are what `row_gradients` needs.
extern "C" __global__ void __launch_bounds__(THREADS)
    row_losses(const X* logits, const i64* labels, float* losses, float* tops, float* sums, i64 stride, i64 width,
               i64 ignore, float smoothing, float z) {
  __shared__ float scratch[32 + 4 * 32];
  i64 row = blockIdx.x;
  const X* x = logits + row * stride;
  Target t = target_of(x, labels[row], 0, width, width, ignore);
  Statistics s = {0.f, 1.f, 0.f};
  if (!t.ignored) s = statistics_of(x, int(width), scratch);
  if (threadIdx.x == 0) {
    losses[row] = t.ignored ? 0.f : loss_of(s, t.logit, width, smoothing, z);
    tops[row] = s.top;
    sums[row] = s.sum;
  }
}

// Losses, and `normaliser` (null: 1) times the gradients over the logits; the second read of a row hits the cache.
extern "C" __global__ void __launch_bounds__(THREADS)
    row_losses_and_gradients(X* logits, const i64* labels, const float* normaliser, float* losses, i64 stride,
                             i64 width, i64 ignore, float smoothing, float z) {
  __shared__ float scratch[32 + 4 * 32];
  i64 row = blockIdx.x;
  X* x = logits + row * stride;
  // Read by every thread before any passes the barriers of the statistics, and so before the row is written.
  Target t = target_of(x, labels[row], 0, width, width, ignore);
  Statistics s = {0.f, 1.f, 0.f};
  if (!t.ignored) s = statistics_of(x, int(width), scratch);
  if (threadIdx.x == 0) losses[row] = t.ignored ? 0.f : loss_of(s, t.logit, width, smoothing, z);
  __syncthreads();
  write_gradient(x, int(width), t, s.top, s.sum, width, normaliser ? *normaliser : 1.f, smoothing, z);
}

// Statistics of a part of the vocabulary, `pieces` [4, rows]: top, sum, the label's logit (0 where another part holds it)
// and the sum of the logits.
extern "C" __global__ void __launch_bounds__(THREADS)
    row_pieces(const X* logits, const i64* labels, float* pieces, i64 stride, i64 width, i64 first, i64 vocab,
               i64 ignore) {
  __shared__ float scratch[32 + 4 * 32];
  i64 row = blockIdx.x, rows = gridDim.x;
  const X* x = logits + row * stride;
  Target t = target_of(x, labels[row], first, width, vocab, ignore);
  Statistics s = {0.f, 1.f, 0.f};
  if (!t.ignored) s = statistics_of(x, int(width), scratch);
  if (threadIdx.x == 0) {
    pieces[row] = s.top;
    pieces[rows + row] = s.sum;
    pieces[2 * rows + row] = t.ignored ? 0.f : t.logit;
    pieces[3 * rows + row] = s.total;
  }
}

// Gradients over the logits, times `normaliser` (null: 1) and grads[row * grad_stride].
extern "C" __global__ void __launch_bounds__(THREADS)
    row_gradients(X* logits, const i64* labels, const float* tops, const float* sums, const float* normaliser,
                  const float* grads, i64 grad_stride, i64 stride, i64 width, i64 first, i64 vocab, i64 ignore,
                  float smoothing, float z) {
  i64 row = blockIdx.x;
  X* x = logits + row * stride;
  Target t = target_of(x, labels[row], first, width, vocab, ignore);
  float factor = grads[row * grad_stride] * (normaliser ? *normaliser : 1.f);
  __syncthreads();  // the label's logit has been read
  write_gradient(x, int(width), t, tops[row], sums[row], vocab, factor, smoothing, z);
}

// ---- scaling what was computed in the forward pass ---------------------------------------------------------------------

// x *= *factor; memory is not touched where that is 1. `head` elements of the first pack lie before the tensor.
extern "C" __global__ void __launch_bounds__(THREADS) scale_in_place(X* x, const float* factor, i64 n, i64 head) {
  float f = *factor;
  if (f == 1.f) return;
  i64 first = ((i64)blockIdx.x * UNROLL * THREADS + threadIdx.x) * PACK - head;
  Pack<X, PACK> packs[UNROLL];
#pragma unroll
  for (int k = 0; k < UNROLL; ++k) packs[k] = load_part<PACK>(x, first + k * STEP, n);
#pragma unroll
  for (int k = 0; k < UNROLL; ++k) {
    Floats<PACK> v = floats(packs[k]);
#pragma unroll
    for (int j = 0; j < PACK; ++j) v.at[j] *= f;
    store_part(x, first + k * STEP, n, rounded<X>(v));
  }
}
