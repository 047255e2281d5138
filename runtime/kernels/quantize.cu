// Blockwise quantisation. LANES neighbouring threads hold a block in registers between its largest magnitude and its codes.
//
// A block with a NaN or an infinity gets the scale NaN; one whose largest magnitude is below 2^-100 becomes zeros.
// Nearest: ties to even. Stochastic: up with the probability of what lies below, in steps of 2^-16, so that the expected
// value is the element; element i uses its 16 bits of `seed` (philox.cuh).
//
// Defines: X_TYPE (bf16, f16, f32), FORMAT (0 int8, 1 int4, 2 e4m3, 3 e5m2), BLOCK (a power of two), LANES (a power of two up to
// 32), ALIGNED (1: pointers allow whole accesses), STOCHASTIC (0 or 1), THREADS.

#include "quantize.cuh"
#include "philox.cuh"

#define CHUNKS (BLOCK / (LANES * PACK))

// Code of `v`, which is at most LARGEST in magnitude but for rounding; `random` is 16 bits.
__device__ __forceinline__ u32 code_of(float v, u32 random) {
  float up = float(random) * power_of_two(-16);
#if FORMAT == INT8 || FORMAT == INT4
  float rounded_v = STOCHASTIC ? floorf(v + up) : rintf(v);
  return u32(int(fminf(fmaxf(rounded_v, -LARGEST), LARGEST)));
#else
  u32 sign = __float_as_uint(v) >> 31 << 7, bits = __float_as_uint(v) & 0x7fffffffu, code;
  float a = __uint_as_float(bits);
  if (a < power_of_two(1 - BIAS)) {
    // Denormal: whole steps of the smallest one.
    float steps = a * power_of_two(BIAS - 1 + MANTISSA);
    code = u32(STOCHASTIC ? floorf(steps + up) : rintf(steps));
  } else {
    bits += STOCHASTIC ? random << (7 - MANTISSA) : (1u << (22 - MANTISSA)) - 1 + (bits >> (23 - MANTISSA) & 1);
    code = (bits >> (23 - MANTISSA)) - ((127 - BIAS) << MANTISSA);
  }
  return sign | min(code, LARGEST_CODE);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS)
    quantize(const X* x, u8* codes, float* scales, i64 n, const u64* seed) {
  i64 block = (i64)blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
  i64 first = block * BLOCK + threadIdx.x % LANES * PACK;
  Pack<X, PACK> packs[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) packs[c] = read<PACK>(x, first + c * LANES * PACK, n);
  // As integers magnitudes are ordered like numbers, with infinity and NaN above them.
  u32 largest = 0;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    Floats<PACK> v = floats(packs[c]);
#pragma unroll
    for (int j = 0; j < PACK; ++j) largest = max(largest, __float_as_uint(v.at[j]) & 0x7fffffffu);
  }
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) largest = max(largest, __shfl_xor_sync(FULL_WARP, largest, step));
  float magnitude = __uint_as_float(largest), inverse = 0.f, scale = 0.f;
  if (largest >= 0x7f800000u) {
    scale = __int_as_float(0x7fc00000);
  } else if (magnitude >= power_of_two(-100)) {
    inverse = __fdiv_rn(LARGEST, magnitude);
    scale = __fdiv_rn(magnitude, LARGEST);
  }
  if (threadIdx.x % LANES == 0 && block * BLOCK < n) scales[block] = scale;
#if STOCHASTIC
  u64 key = *seed;
#endif
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    i64 i = first + c * LANES * PACK;
    Floats<PACK> v = floats(packs[c]);
    RandomBits<PACK> random = {};
#if STOCHASTIC
    random = random_bits<PACK>(i, key);
#endif
    u32 code[PACK];
#pragma unroll
    for (int j = 0; j < PACK; ++j)
      code[j] = inverse == 0.f ? 0 : code_of(__fmul_rn(v.at[j], inverse), random.at[j]);
    Pack<u8, CODE_BYTES> out;
#if FORMAT == INT4
#pragma unroll
    for (int j = 0; j < CODE_BYTES; ++j) out.at[j] = u8((code[2 * j] & 15) | code[2 * j + 1] << 4);
    write(codes, i / 2, code_bytes(n), out);
#else
#pragma unroll
    for (int j = 0; j < CODE_BYTES; ++j) out.at[j] = u8(code[j]);
    write(codes, i, code_bytes(n), out);
#endif
  }
}
