// Blocks of 256 numbers in 8 bits each under the dynamic map of Dettmers et al. 2022, with the block's greatest magnitude.
// The map and its tables: blockwise8.py.

#define QUANT_BLOCK 256
#define DECADES 9

// Magnitudes are numbers k whose value is linear in k within a decade (0: zero, 1 to 7: decades, 8: one).
struct alignas(16) Encoding {
  float slope, shift, first, last;  // k = first + clamp(floor(slope * x + shift), 0, last)
};
struct alignas(8) Decoding {
  float value, offset;  // x = (k + 1/2) * value + offset
};
struct Map {
  Encoding encoding[DECADES];
  Decoding decoding[DECADES];
  float threshold[DECADES];  // the least x of each decade
  float unused;
};

template <bool Signed>
__device__ __forceinline__ float decoded(const Map& map, unsigned char code) {
  int k = Signed ? (code < 127 ? 127 - code : code - 127) : code + 1;
  Decoding d = map.decoding[(Signed ? 32 : 31) - __clz(k)];
  float x = fmaf(float(k) + 0.5f, d.value, d.offset);
  return Signed && code < 127 ? -x : x;
}

// Nearest code of x, whose magnitude is at most one. A positive x without sign never becomes zero.
template <bool Signed>
__device__ __forceinline__ unsigned char encoded(const Map& map, float x) {
  float magnitude = fabsf(x);
  int at = 0;
#pragma unroll
  for (int t = 1; t < DECADES; ++t) at += magnitude >= map.threshold[t];
  if (!Signed && x > 0.f && at == 0) at = 1;
  Encoding e = map.encoding[at];
  int k = int(e.first + fminf(fmaxf(floorf(fmaf(magnitude, e.slope, e.shift)), 0.f), e.last));
  if (!Signed) return (unsigned char)(k - 1);
  return (unsigned char)(x < 0.f ? 127 - (k < 127 ? k : 127) : 127 + k);
}

__device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, step));
  return x;
}

// What a block's numbers are multiplied by: zero where even the greatest is below the normal numbers.
__device__ __forceinline__ float inverse_of(float absmax) { return absmax >= 1.17549435e-38f ? 1.f / absmax : 0.f; }
