// Rotary position embedding (Su et al. 2021): pairs of channels turned by an angle that depends on the position. Pairs are
// (i, i + HALF), or (2i, 2i + 1) when INTERLEAVED. `out` may be `x`. The backward pass turns the other way: direction -1.
//
// Defines: X_TYPE, TABLE_TYPE (bf16, f16, f32), HEADS, HALF (pairs of a head), COPIED (channels behind the pairs that are
// copied; 0 in place), INTERLEAVED, PACK (elements per access; divides HALF, COPIED and every stride), THREADS, UNROLL.

#include "common.cuh"

typedef X_TYPE X;

// A head is TURNS items of two packs that are turned, then COPIES items of one pack that is copied.
#define TURNS (HALF / PACK)
#define COPIES (COPIED / PACK)
#define ITEMS (TURNS + COPIES)

struct Item {
  bool present, turned;
  i64 position;
  int head, low, high;  // channels of its packs
};

__device__ __forceinline__ Item item_of(i64 index, i64 n_items) {
  Item item;
  item.present = index < n_items;
  item.position = index / (HEADS * ITEMS);
  int within = int(index % (HEADS * ITEMS)), at = within % ITEMS;
  item.head = within / ITEMS;
  item.turned = COPIES == 0 || at < TURNS;
#if INTERLEAVED
  item.low = 2 * at * PACK;
  item.high = item.low + PACK;
#else
  item.low = at * PACK;
  item.high = item.low + HALF;
#endif
  if (!item.turned) item.low = 2 * HALF + (at - TURNS) * PACK;
  return item;
}

// Blocks along y share out the sequences of the batch. Strides are in elements; channels are neighbours.
extern "C" __global__ void __launch_bounds__(THREADS)
    rotate(const X* x, X* out, const TABLE_TYPE* cos_table, const TABLE_TYPE* sin_table, i64 batch, i64 seq_len,
           i64 x_batch, i64 x_seq, i64 x_head, i64 out_batch, i64 out_seq, i64 out_head, float direction) {
  i64 n_items = seq_len * (HEADS * ITEMS), first = (i64)blockIdx.x * UNROLL * THREADS + threadIdx.x;
  for (i64 sequence = blockIdx.y; sequence < batch; sequence += gridDim.y) {
    Pack<X, PACK> lows[UNROLL], highs[UNROLL];
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      Item item = item_of(first + k * THREADS, n_items);
      if (!item.present) break;
      const X* head = x + sequence * x_batch + item.position * x_seq + item.head * x_head;
      lows[k] = load_once<PACK>(head + item.low);
      if (item.turned) highs[k] = load_once<PACK>(head + item.high);
    }
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      Item item = item_of(first + k * THREADS, n_items);
      if (!item.present) break;
      X* head = out + sequence * out_batch + item.position * out_seq + item.head * out_head;
      if (!item.turned) {
        store(head + item.low, lows[k]);
        continue;
      }
      i64 angle = item.position * HALF + i64(INTERLEAVED ? item.low / 2 : item.low);
      Floats<PACK> c = floats(load<PACK>(cos_table + angle)), s = floats(load<PACK>(sin_table + angle));
      Floats<PACK> low = floats(lows[k]), high = floats(highs[k]);
#pragma unroll
      for (int j = 0; j < PACK; ++j) {
        float sine = s.at[j] * direction;
#if INTERLEAVED
        // Pair j: elements 2j and 2j + 1 of both packs taken together.
        float& a = 2 * j < PACK ? low.at[2 * j % PACK] : high.at[2 * j % PACK];
        float& b = 2 * j + 1 < PACK ? low.at[(2 * j + 1) % PACK] : high.at[(2 * j + 1) % PACK];
#else
        float &a = low.at[j], &b = high.at[j];
#endif
        float turned = a * c.at[j] - b * sine;
        b = b * c.at[j] + a * sine;
        a = turned;
      }
      store(head + item.low, rounded<X>(low));
      store(head + item.high, rounded<X>(high));
    }
  }
}
