// Many tensors in one launch: a table of int64 says which chunk of which tensor a block works on (tables.py writes it).
//
// Defines: LISTS (lists of tensors), CHUNK (elements to a block; whole rounds of the block's threads).

struct Piece {
  const i64* record;  // size, head (below 0: elements singly), number of the first chunk, then one pointer for each list
  i64 first;          // of this chunk; below 0 where the first pack starts before the tensor
  i64 end;

  __device__ __forceinline__ i64 size() const { return record[0]; }
  __device__ __forceinline__ bool packed() const { return record[1] >= 0; }
  template <class T>
  __device__ __forceinline__ T* list(int l) const {
    return reinterpret_cast<T*>(record[3 + l]);
  }
};

__device__ __forceinline__ Piece piece_of(const i64* table, i64 n_chunks, i64 chunk) {
  const i64* record = table + n_chunks + table[chunk] * (3 + LISTS);
  i64 head = record[1] > 0 ? record[1] : 0;
  i64 first = (chunk - record[2]) * CHUNK - head;
  i64 end = first + CHUNK < record[0] ? first + CHUNK : record[0];
  return {record, first, end};
}
