// Rows of a norm: LANES neighbouring threads share a row of WIDTH elements, CHUNKS packs each. LANES is a power of two up
// to 32, and a block then holds several rows; or it is several warps, and the block is one row.

#include "common.cuh"
#include "philox.cuh"

typedef X_TYPE X;
typedef W_TYPE W;

#define ROWS (THREADS / LANES)
#define CHUNKS ((WIDTH + LANES * PACK - 1) / (LANES * PACK))

// First column of pack `c` of this thread, and whether the row reaches it (PACK divides WIDTH).
__device__ __forceinline__ int column_of(int c) { return (c * LANES + int(threadIdx.x) % LANES) * PACK; }
