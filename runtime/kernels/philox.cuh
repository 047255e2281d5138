// Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011). Element i of a tensor owns 16 bits: number i % 8 of
// counter i / 8 under the key `seed`. The same seed gives the same bits again, whatever the launch looks like.

__device__ __forceinline__ uint4 philox(u64 counter, u64 key) {
  u32 c0 = u32(counter), c1 = u32(counter >> 32), c2 = 0, c3 = 0;
  u32 k0 = u32(key), k1 = u32(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    u64 a = u64(0xD2511F53u) * c0, b = u64(0xCD9E8D57u) * c2;
    c0 = u32(b >> 32) ^ c1 ^ k0;
    c1 = u32(b);
    c2 = u32(a >> 32) ^ c3 ^ k1;
    c3 = u32(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  uint4 out = {c0, c1, c2, c3};
  return out;
}

// The 16 random bits of each of elements [i, i + N); N divides 8 and i.
template <int N>
struct RandomBits {
  u32 at[N];
};

template <int N>
__device__ __forceinline__ RandomBits<N> random_bits(i64 i, u64 seed) {
  static_assert(8 % N == 0, "a pack lies within one counter");
  uint4 r = philox(u64(i) / 8, seed);
  u32 words[4] = {r.x, r.y, r.z, r.w};
  RandomBits<N> out;
  if constexpr (N == 8) {
#pragma unroll
    for (int j = 0; j < N; ++j) out.at[j] = words[j / 2] >> (j % 2 * 16) & 0xffffu;
  } else {
    u32 start = u32(i) % 8;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      u32 at = start + j, low = at & 2 ? words[1] : words[0], high = at & 2 ? words[3] : words[2];
      u32 word = at & 4 ? high : low;
      out.at[j] = word >> (at % 2 * 16) & 0xffffu;
    }
  }
  return out;
}

// `scale` for kept elements and 0 for dropped ones, for elements [i, i + N). An element is dropped when its 16 bits are
// below `threshold`.
template <int N>
__device__ __forceinline__ Floats<N> dropout_factors(i64 i, u64 seed, u32 threshold, float scale) {
  RandomBits<N> bits = random_bits<N>(i, seed);
  Floats<N> out;
#pragma unroll
  for (int j = 0; j < N; ++j) out.at[j] = bits.at[j] >= threshold ? scale : 0.f;
  return out;
}
