// activation(x) and activation(gate) * up, forward and backward.
//
// Defines: X_TYPE (bf16, f16, f32), ACT, PACK (elements per access), THREADS, UNROLL (accesses per operand before the
// first use).

#include "common.cuh"
#include "activation.cuh"

typedef X_TYPE X;

// Threads of a block take neighbouring packs, UNROLL times. `head` elements of the first pack lie before the tensor.
#define FIRST_ELEMENT (((i64)blockIdx.x * UNROLL * THREADS + threadIdx.x) * PACK - head)
#define STEP (i64(THREADS) * PACK)

// ---- activation(x) --------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS) plain_forward(const X* x, X* y, i64 n, i64 head) {
  i64 first = FIRST_ELEMENT;
  Pack<X, PACK> xs[UNROLL];
#pragma unroll
  for (int k = 0; k < UNROLL; ++k) xs[k] = load_part<PACK>(x, first + k * STEP, n);
#pragma unroll
  for (int k = 0; k < UNROLL; ++k) {
    Floats<PACK> v = floats(xs[k]);
#pragma unroll
    for (int j = 0; j < PACK; ++j) v.at[j] = activated(v.at[j]).value;
    store_part(y, first + k * STEP, n, rounded<X>(v));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    plain_backward(const X* grad_y, const X* x, X* grad_x, i64 n, i64 head) {
  i64 first = FIRST_ELEMENT;
  Pack<X, PACK> xs[UNROLL], grads[UNROLL];
#pragma unroll
  for (int k = 0; k < UNROLL; ++k) {
    xs[k] = load_part<PACK>(x, first + k * STEP, n);
    grads[k] = load_part<PACK>(grad_y, first + k * STEP, n);
  }
#pragma unroll
  for (int k = 0; k < UNROLL; ++k) {
    Floats<PACK> v = floats(xs[k]), grad = floats(grads[k]);
#pragma unroll
    for (int j = 0; j < PACK; ++j) v.at[j] = grad.at[j] * activated(v.at[j]).slope;
    store_part(grad_x, first + k * STEP, n, rounded<X>(v));
  }
}

// ---- activation(gate) * up -------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS)
    gated_forward(const X* gate, const X* up, X* y, i64 n, i64 head) {
  i64 first = FIRST_ELEMENT;
  Pack<X, PACK> gates[UNROLL], ups[UNROLL];
#pragma unroll
  for (int k = 0; k < UNROLL; ++k) {
    gates[k] = load_part<PACK>(gate, first + k * STEP, n);
    ups[k] = load_part<PACK>(up, first + k * STEP, n);
  }
#pragma unroll
  for (int k = 0; k < UNROLL; ++k) {
    Floats<PACK> g = floats(gates[k]), u = floats(ups[k]);
#pragma unroll
    for (int j = 0; j < PACK; ++j) g.at[j] = activated(g.at[j]).value * u.at[j];
    store_part(y, first + k * STEP, n, rounded<X>(g));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gated_backward(const X* grad_y, const X* gate, const X* up, X* grad_gate, X* grad_up, i64 n, i64 head) {
  i64 first = FIRST_ELEMENT;
  Pack<X, PACK> gates[UNROLL], ups[UNROLL], grads[UNROLL];
#pragma unroll
  for (int k = 0; k < UNROLL; ++k) {
    gates[k] = load_part<PACK>(gate, first + k * STEP, n);
    ups[k] = load_part<PACK>(up, first + k * STEP, n);
    grads[k] = load_part<PACK>(grad_y, first + k * STEP, n);
  }
#pragma unroll
  for (int k = 0; k < UNROLL; ++k) {
    Floats<PACK> g = floats(gates[k]), u = floats(ups[k]), grad = floats(grads[k]);
#pragma unroll
    for (int j = 0; j < PACK; ++j) {
      Activated a = activated(g.at[j]);
      g.at[j] = grad.at[j] * u.at[j] * a.slope;
      u.at[j] = grad.at[j] * a.value;
    }
    store_part(grad_gate, first + k * STEP, n, rounded<X>(g));
    store_part(grad_up, first + k * STEP, n, rounded<X>(u));
  }
}
