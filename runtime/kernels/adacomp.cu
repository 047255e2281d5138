// AdaComp (Chen et al. 2018, algorithm 2): in every bin of the gradient, the elements that come near its largest one are
// sent as a sign, the others stay behind. With g = residual + grad, top = max |g| over the bin, and
// h = residual + FACTOR * grad, an element is chosen when |h| >= top > 0; it is sent as sign(g) * scale, scale being the mean of
// the tops, and leaves g - sign(g) * scale in the residual. Others leave g.
//
// A warp works on a bin. Entries of a bin are in element order at the place that the prefix sum of the counts gives it, so
// that packing does not depend on timing. An entry is the place in the bin (15 bits) and the sign (top bit).
//
// Defines: X_TYPE (bf16, f16, f32; the gradient), PACK (elements per access; divides `bin`), THREADS.

#include "common.cuh"

typedef X_TYPE X;
typedef unsigned short Entry;

#define WARPS (THREADS / 32)
#define BIN ((i64)blockIdx.x * WARPS + threadIdx.x / 32)
#define LANE (int(threadIdx.x) % 32)

struct Candidates {
  Floats<PACK> sum, boosted;  // g and h
};

// Without contraction, so that both passes and the plain-torch reference choose the same elements.
__device__ __forceinline__ Candidates candidates_at(const X* grad, const float* residual, i64 i, i64 n, float factor) {
  Candidates c;
  if (i + PACK <= n) {
    c.sum = floats(load<PACK>(grad + i));
    c.boosted = floats(load<PACK>(residual + i));
  } else {
    c.sum = floats(load_part<PACK>(grad, i, n));
    c.boosted = floats(load_part<PACK>(residual, i, n));
  }
#pragma unroll
  for (int j = 0; j < PACK; ++j) {
    float grad_j = c.sum.at[j], residual_j = c.boosted.at[j];
    c.sum.at[j] = __fadd_rn(residual_j, grad_j);
    c.boosted.at[j] = __fadd_rn(residual_j, __fmul_rn(factor, grad_j));
  }
  return c;
}

// `tops` fp32 and `counts` [n_bins]: the largest |g| of each bin, and how many elements it sends. A NaN or an infinity makes a
// top NaN.
extern "C" __global__ void __launch_bounds__(THREADS)
    adacomp_select(const X* grad, const float* residual, float* tops, int* counts, i64 n, i64 bin, float factor) {
  i64 start = BIN * bin, end = min(start + bin, n);
  u32 largest = 0;
  for (i64 i = start + LANE * PACK; i < end; i += 32 * PACK) {
    Candidates c = candidates_at(grad, residual, i, n, factor);
#pragma unroll
    for (int j = 0; j < PACK; ++j) largest = max(largest, __float_as_uint(c.sum.at[j]) & 0x7fffffffu);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) largest = max(largest, __shfl_xor_sync(FULL_WARP, largest, step));
  bool finite = largest < 0x7f800000u;
  float top = finite ? __uint_as_float(largest) : __int_as_float(0x7fc00000);
  int count = 0;
  if (finite && largest > 0)
    for (i64 i = start + LANE * PACK; i < end; i += 32 * PACK) {
      Candidates c = candidates_at(grad, residual, i, n, factor);
#pragma unroll
      for (int j = 0; j < PACK; ++j) count += i + j < end && fabsf(c.boosted.at[j]) >= top;
    }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) count += __shfl_xor_sync(FULL_WARP, count, step);
  if (LANE == 0 && start < n) {
    tops[BIN] = top;
    counts[BIN] = count;
  }
}

// Writes the entries and the new residual. `ends` [n_bins]: prefix sums of the counts, with each bin's own. Entries past
// `capacity` are not sent and stay in the residual. Where `scale` is not finite nothing is written at all: the step is
// lost, the residual is not.
extern "C" __global__ void __launch_bounds__(THREADS)
    adacomp_pack(const X* grad, float* residual, const float* tops, const int* counts, const i64* ends,
                 const float* scale, Entry* entries, i64 n, i64 bin, i64 capacity, float factor) {
  i64 start = BIN * bin, end = min(start + bin, n);
  float sent = *scale;
  if (start >= n || !(fabsf(sent) < __int_as_float(0x7f800000))) return;  // whole warps
  float top = tops[BIN];
  i64 place = ends[BIN] - counts[BIN];
  for (i64 first = start; first < end; first += 32 * PACK) {
    i64 i = first + LANE * PACK;
    Candidates c = {};
    if (i < end) c = candidates_at(grad, residual, i, n, factor);
    int chosen = 0;
#pragma unroll
    for (int j = 0; j < PACK; ++j) chosen += i + j < end && top > 0.f && fabsf(c.boosted.at[j]) >= top;
    // Those of the lanes before this one.
    int before = chosen;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      int other = __shfl_up_sync(FULL_WARP, before, step);
      if (LANE >= step) before += other;
    }
    int all = __shfl_sync(FULL_WARP, before, 31);
    i64 at = place + before - chosen;
    if (chosen) {
#pragma unroll
      for (int j = 0; j < PACK; ++j) {
        if (i + j < end && fabsf(c.boosted.at[j]) >= top) {
          if (at < capacity) {
            bool negative = c.sum.at[j] < 0.f;
            entries[at] = Entry((i + j - start) | (negative ? 0x8000 : 0));
            c.sum.at[j] = __fadd_rn(c.sum.at[j], negative ? sent : -sent);
          }
          ++at;
        }
      }
    }
    place += all;
    if (i + PACK <= n) {
      if (i < end) store(residual + i, rounded<float>(c.sum));
    } else if (i < end) {
      store_part(residual, i, n, rounded<float>(c.sum));
    }
  }
}

// out += what was sent. A scale that is not finite makes the first element of every bin NaN.
extern "C" __global__ void __launch_bounds__(THREADS)
    adacomp_add(const Entry* entries, const int* counts, const i64* ends, const float* scale, float* out, i64 n, i64 bin,
                i64 capacity) {
  i64 start = BIN * bin;
  if (start >= n) return;
  float sent = *scale;
  if (!(fabsf(sent) < __int_as_float(0x7f800000))) {
    if (LANE == 0) out[start] = __int_as_float(0x7fc00000);
    return;
  }
  i64 end = min(ends[BIN], capacity);
  for (i64 at = ends[BIN] - counts[BIN] + LANE; at < end; at += 32) {
    u32 entry = entries[at];
    out[start + (entry & 0x7fff)] += entry & 0x8000 ? -sent : sent;
  }
}
