// One element's step under each rule, and what the host and the device together decide about a step.
//
// Defines: RULE (below).

#define ADAM 0      // Kingma & Ba 2015; weight decay is part of the gradient
#define ADAMW 1     // Loshchilov & Hutter 2019
#define SGD 2       // Sutskever et al. 2013, as in torch.optim
#define SGD_NESTEROV 3
#define LION 4      // Chen et al. 2023, algorithm 2
#define ADAGRAD 5   // Duchi et al. 2011
#define LAMB 6      // You et al. 2020, algorithm 2

// Parameters of every kernel that steps. Null pointers: never skip, no factor, `lr` as given, no bias correction.
// restK = 1 - betaK and logK = log(betaK) are rounded from fp64: 1 - 0.999f would be wrong in the fifth digit.
#define STEP_PARAMETERS                                                                                          \
  const float *skip, const float *factor, const float *lr_at, const float *step, float lr, float beta1, float rest1, \
      float log1, float beta2, float rest2, float log2, float eps, float decay

struct Rates {
  float factor;  // on every gradient: unscaling and clipping
  float lr;
  float size;    // lr (LAMB: 1) / (1 - beta1^step)
  float root;    // 1 / sqrt(1 - beta2^step)
  float beta1, rest1, beta2, rest2, eps, decay;
};

__device__ __forceinline__ Rates rates_of(STEP_PARAMETERS) {
  Rates r = {factor ? *factor : 1.f, lr_at ? *lr_at : lr, 0.f, 0.f, beta1, rest1, beta2, rest2, eps, decay};
  float count = step ? *step : 0.f;
  float size = RULE == LAMB ? 1.f : r.lr;
  r.size = step ? size / -expm1f(count * log1) : size;
  r.root = step ? 1.f / sqrtf(-expm1f(count * log2)) : 1.f;
  return r;
}
#define RATES rates_of(skip, factor, lr_at, step, lr, beta1, rest1, log1, beta2, rest2, log2, eps, decay)
#define SKIPPED (skip && *skip != 0.f)

__device__ __forceinline__ void moments(const Rates& r, float g, float& m, float& v) {
  m = r.beta1 * m + r.rest1 * g;
  v = r.beta2 * v + r.rest2 * (g * g);
}

// m / (sqrt(v) + eps) with the second moment's correction; the first one's is in r.size.
__device__ __forceinline__ float direction(const Rates& r, float m, float v) {
  return quick_divide(m, sqrtf(v) * r.root + r.eps);
}

// p and the states a, b (rules with one state leave b alone).
__device__ __forceinline__ void stepped(const Rates& r, float g, float& p, float& a, float& b) {
  g *= r.factor;
#if RULE == ADAMW
  p *= 1.f - r.lr * r.decay;
  moments(r, g, a, b);
  p -= r.size * direction(r, a, b);
#elif RULE == ADAM
  moments(r, g + r.decay * p, a, b);
  p -= r.size * direction(r, a, b);
#elif RULE == SGD || RULE == SGD_NESTEROV
  g += r.decay * p;
  a = r.beta1 * a + g;
  p -= r.lr * (RULE == SGD_NESTEROV ? g + r.beta1 * a : a);
#elif RULE == LION
  float c = r.beta1 * a + r.rest1 * g;
  p -= r.lr * ((c > 0.f ? 1.f : c < 0.f ? -1.f : c) + r.decay * p);
  a = r.beta2 * a + r.rest2 * g;
#elif RULE == ADAGRAD
  g += r.decay * p;
  a += g * g;
  p -= quick_divide(r.lr * g, sqrtf(a) + r.eps);
#endif
}
