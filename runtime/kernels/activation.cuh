// Activations and their derivatives in fp32. ACT picks one, so that each module holds one.

#define SILU 0
#define GELU 1
#define GELU_TANH 2
#define RELU 3
#define RELU_SQUARED 4

struct Activated {
  float value;
  float slope;
};

__device__ __forceinline__ Activated activated(float x) {
  Activated a;
#if ACT == SILU
  // x * s, s = 1 / (1 + e^-x)
  float s = quick_divide(1.f, 1.f + expf(-x));
  a.value = x * s;
  a.slope = s + a.value * (1.f - s);
#elif ACT == GELU
  // x * P, P = erfc(-x / sqrt 2) / 2: keeps its relative accuracy where 1 + erf(x / sqrt 2) cancels
  float p = 0.5f * erfcf(-0.70710678f * x);
  a.value = x * p;
  a.slope = p + x * 0.39894228f * expf(-0.5f * x * x);
#elif ACT == GELU_TANH
  // x (1 + tanh u) / 2 = x * s, s = 1 / (1 + e^-2u), 2u = 2 sqrt(2 / pi) (x + 0.044715 x^3)
  float xx = x * x;
  float s = quick_divide(1.f, 1.f + expf(-1.5957691f * x * (1.f + 0.044715f * xx)));
  a.value = x * s;
  a.slope = s + a.value * (1.f - s) * 1.5957691f * (1.f + 0.134145f * xx);
#elif ACT == RELU
  a.value = x < 0.f ? 0.f : x;  // a NaN stays one
  a.slope = x <= 0.f ? 0.f : 1.f;
#elif ACT == RELU_SQUARED
  float r = x < 0.f ? 0.f : x;
  a.value = r * r;
  a.slope = 2.f * r;
#else
#error "ACT is not one of the activations above"
#endif
  return a;
}
