// A CUDA runtime without a GPU, for LD_PRELOAD under a CUDA build of torch: memory is reserved and never computed on, streams are
// done at once, kernels do nothing. What torch itself does (allocator, streams, statistics, launches' shapes) is real.
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <dlfcn.h>
#include <time.h>
#include <stdlib.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <map>
#include <mutex>
#include <atomic>
#undef cudaStreamGetCaptureInfo

namespace {
std::mutex lock;
struct Range { size_t bytes; int device; };  // device -1: pinned host memory
std::map<uintptr_t, Range> ranges;
size_t used[16], context_bytes = 520ull << 20;
thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;
std::atomic<long> n_kernels{0}, n_bad{0};
struct Stream { bool capturing = false; int device; int priority; };
std::map<void*, Stream*> streams;
unsigned long long capture_id = 0;
int n_capturing = 0;

int n_devices() { const char* n = getenv("STUB_GPUS"); return n ? atoi(n) : 1; }
size_t capacity() { const char* g = getenv("STUB_GIB"); return g ? (size_t)(atof(g) * (1ull << 30)) : 150110011392ull; }
double now() { timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + 1e-9 * t.tv_nsec; }
cudaError_t give(cudaError_t error) { if (error != cudaSuccess) last = error; return error; }
std::map<uintptr_t, Range>::iterator find(const void* p) {
  auto it = ranges.upper_bound((uintptr_t)p);
  if (it == ranges.begin()) return ranges.end();
  --it;
  return (uintptr_t)p < it->first + it->second.bytes ? it : ranges.end();
}
void* reserve(size_t bytes, int device) {
  size_t page = 2ull << 20, whole = (bytes + page - 1) / page * page;
  char* raw = (char*)mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  char* at = (char*)(((uintptr_t)raw + page - 1) / page * page);
  if (at > raw) munmap(raw, at - raw);
  if (raw + page > at) munmap(at + whole, raw + page - at);
  ranges[(uintptr_t)at] = {bytes, device};
  if (device >= 0) used[device] += whole;
  return at;
}
void complain(const char* what) { n_bad++; fprintf(stderr, "STUB: %s\n", what); if (getenv("STUB_ABORT")) abort(); }
// small copies are made, so that tables and scalars arrive; big ones would only touch pages
cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  std::lock_guard<std::mutex> hold(lock);
  auto a = find(to), b = find(from);
  auto device = [](std::map<uintptr_t, Range>::iterator it) { return it != ranges.end() && it->second.device >= 0; };
  auto inside = [&](std::map<uintptr_t, Range>::iterator it, const void* p) {
    return it == ranges.end() || (uintptr_t)p + bytes <= it->first + it->second.bytes;
  };
  if (!inside(a, to) || !inside(b, from)) { complain("copy beyond an allocation"); return give(cudaErrorInvalidValue); }
  if ((kind == cudaMemcpyHostToDevice && !device(a)) || (kind == cudaMemcpyDeviceToHost && !device(b)) ||
      (kind == cudaMemcpyDeviceToDevice && !(device(a) && device(b)))) {
    complain("copy whose kind does not fit its pointers"); return give(cudaErrorInvalidValue);
  }
  if (bytes <= (1u << 20)) memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t launched(dim3 grid, dim3 block, size_t shared) {
  n_kernels++;
  bool fine = block.x * (size_t)block.y * block.z <= 1024 && block.x && block.y && block.z && block.z <= 64 && grid.x && grid.y && grid.z &&
              grid.x <= 2147483647u && grid.y <= 65535 && grid.z <= 65535 && shared <= 232448;
  if (!fine) {
    fprintf(stderr, "STUB: launch of grid %u %u %u block %u %u %u shared %zu\n", grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
    return give(cudaErrorInvalidConfiguration);
  }
  return cudaSuccess;
}
bool forbidden() {  // what a thread that captures may not do
  return n_capturing > 0;
}
struct Event { double at = 0; bool recorded = false; unsigned flags = 0; };
}  // namespace

extern "C" {
long stub_kernels() { return n_kernels; }
cudaError_t cudaGetDeviceCount(int* n) { *n = n_devices(); return *n ? cudaSuccess : give(cudaErrorNoDevice); }
cudaError_t cudaGetDevice(int* d) { *d = current; return cudaSuccess; }
cudaError_t cudaSetDevice(int d) { if (d < 0 || d >= n_devices()) return give(cudaErrorInvalidDevice); current = d; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* v) { *v = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* v) { *v = 13000; return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, getenv("STUB_NAME") ? getenv("STUB_NAME") : "NVIDIA H200");
  for (int i = 0; i < 16; i++) p->uuid.bytes[i] = (char)(d * 16 + i);
  p->totalGlobalMem = capacity(); p->sharedMemPerBlock = 49152; p->regsPerBlock = 65536; p->warpSize = 32;
  p->maxThreadsPerBlock = 1024; p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->major = 9; p->minor = 0; p->multiProcessorCount = 132; p->textureAlignment = 512; p->integrated = 0; p->canMapHostMemory = 1;
  p->concurrentKernels = 1; p->asyncEngineCount = 3; p->unifiedAddressing = 1; p->memoryBusWidth = 6144; p->l2CacheSize = 60 << 20;
  p->persistingL2CacheMaxSize = 40 << 20; p->maxThreadsPerMultiProcessor = 2048; p->managedMemory = 1; p->concurrentManagedAccess = 1;
  p->sharedMemPerMultiprocessor = 233472; p->regsPerMultiprocessor = 65536; p->sharedMemPerBlockOptin = 232448;
  p->maxBlocksPerMultiProcessor = 32; p->reservedSharedMemPerBlock = 1024; p->cooperativeLaunch = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  switch ((int)a) {
    case cudaDevAttrMaxThreadsPerBlock: *v = 1024; break;
    case cudaDevAttrMaxGridDimX: *v = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *v = 65535; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *v = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = 232448; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *v = 233472; break;
    case cudaDevAttrMultiProcessorCount: *v = 132; break;
    case cudaDevAttrComputeCapabilityMajor: *v = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *v = 0; break;
    case cudaDevAttrWarpSize: *v = 32; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *v = 2048; break;
    case cudaDevAttrMaxRegistersPerBlock: *v = 65536; break;
    case cudaDevAttrClockRate: *v = 1980000; break;
    case cudaDevAttrMemoryClockRate: *v = 3201000; break;
    case cudaDevAttrGlobalMemoryBusWidth: *v = 6144; break;
    case cudaDevAttrL2CacheSize: *v = 60 << 20; break;
    case cudaDevAttrMemoryPoolsSupported: *v = 1; break;
    default: *v = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int d) { snprintf(s, n, "0000:%02x:00.0", d + 1); return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return forbidden() ? give(cudaErrorStreamCaptureUnsupported) : cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { *can = 1; return cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }

cudaError_t cudaMalloc(void** p, size_t bytes) {
  std::lock_guard<std::mutex> hold(lock);
  size_t whole = (bytes + (2ull << 20) - 1) / (2ull << 20) * (2ull << 20);
  if (used[current] + whole + context_bytes > capacity()) return give(cudaErrorMemoryAllocation);
  *p = bytes ? reserve(bytes, current) : nullptr;
  return cudaSuccess;
}
static cudaError_t drop(void* p, bool host) {
  if (!p) return cudaSuccess;
  std::lock_guard<std::mutex> hold(lock);
  auto it = ranges.find((uintptr_t)p);
  if (it == ranges.end() || (it->second.device < 0) != host) { complain("free of what was never allocated"); return give(cudaErrorInvalidValue); }
  size_t whole = (it->second.bytes + (2ull << 20) - 1) / (2ull << 20) * (2ull << 20);
  if (!host) used[it->second.device] -= whole;
  munmap(p, whole);
  ranges.erase(it);
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) { return drop(p, false); }
cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) { std::lock_guard<std::mutex> hold(lock); *p = reserve(n, -1); return cudaSuccess; }
cudaError_t cudaFreeHost(void* p) { return drop(p, true); }
cudaError_t cudaHostRegister(void* p, size_t n, unsigned) { std::lock_guard<std::mutex> hold(lock); ranges[(uintptr_t)p] = {n, -1}; return cudaSuccess; }
cudaError_t cudaHostUnregister(void* p) { std::lock_guard<std::mutex> hold(lock); ranges.erase((uintptr_t)p); return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  std::lock_guard<std::mutex> hold(lock);
  *total = capacity(); *free_bytes = capacity() - used[current] - context_bytes; return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  std::lock_guard<std::mutex> hold(lock);
  memset(a, 0, sizeof *a);
  auto it = find(p);
  a->type = it == ranges.end() ? cudaMemoryTypeUnregistered : it->second.device < 0 ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  a->device = it == ranges.end() || it->second.device < 0 ? 0 : it->second.device;
  a->devicePointer = (void*)p; a->hostPointer = (void*)p;
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* a, const void* b, size_t n, cudaMemcpyKind k) { return forbidden() ? give(cudaErrorStreamCaptureUnsupported) : copy(a, b, n, k); }
cudaError_t cudaMemcpyAsync(void* a, const void* b, size_t n, cudaMemcpyKind k, cudaStream_t) { return copy(a, b, n, k); }
cudaError_t cudaMemcpyPeerAsync(void* a, int, const void* b, int, size_t n, cudaStream_t) { return copy(a, b, n, cudaMemcpyDeviceToDevice); }
static cudaError_t clear(void* p, int v, size_t n) {
  std::lock_guard<std::mutex> hold(lock);
  auto it = find(p);
  if (it == ranges.end() || (uintptr_t)p + n > it->first + it->second.bytes) { complain("memset outside of an allocation"); return give(cudaErrorInvalidValue); }
  if (n <= (1u << 20)) memset(p, v, n);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* p, int v, size_t n) { return clear(p, v, n); }
cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) { return clear(p, v, n); }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int priority) {
  std::lock_guard<std::mutex> hold(lock);
  auto* one = new Stream; one->device = current; one->priority = priority;
  *s = (cudaStream_t)one; streams[one] = one; return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t s) { std::lock_guard<std::mutex> hold(lock); streams.erase((void*)s); return cudaSuccess; }
static Stream* of(cudaStream_t s) { std::lock_guard<std::mutex> hold(lock); auto it = streams.find((void*)s); return it == streams.end() ? nullptr : it->second; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return forbidden() ? give(cudaErrorStreamCaptureUnsupported) : cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return forbidden() ? give(cudaErrorStreamCaptureUnsupported) : cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int* p) { Stream* o = of(s); *p = o ? o->priority : 0; return cudaSuccess; }
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
  Stream* o = of(s);
  if (!o) return give(cudaErrorStreamCaptureUnsupported);  // the legacy default stream cannot be captured
  o->capturing = true; n_capturing++; capture_id++; return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* g) { Stream* o = of(s); if (!o || !o->capturing) return give(cudaErrorIllegalState); o->capturing = false; n_capturing--; *g = (cudaGraph_t) new int; return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* c) { Stream* o = of(s); *c = o && o->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone; return cudaSuccess; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* c, unsigned long long* id, cudaGraph_t* g, const cudaGraphNode_t** d, const cudaGraphEdgeData** e, size_t* n) {
  Stream* o = of(s); *c = o && o->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id) *id = capture_id; if (g) *g = nullptr; if (d) *d = nullptr; if (e) *e = nullptr; if (n) *n = 0; return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* m) { *m = cudaStreamCaptureModeGlobal; return cudaSuccess; }
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* e, cudaGraph_t, unsigned long long) { *e = (cudaGraphExec_t) new int; return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* n) { *n = 1; return cudaSuccess; }
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t f, void* data) { f(data); return cudaSuccess; }
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void* data, unsigned) { f(s, cudaSuccess, data); return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned flags) { auto* one = new Event; one->flags = flags; *e = (cudaEvent_t)one; return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { delete (Event*)e; return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t) { ((Event*)e)->at = now(); ((Event*)e)->recorded = true; return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) { return cudaEventRecord(e, s); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return forbidden() ? give(cudaErrorStreamCaptureUnsupported) : cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t) { return forbidden() ? give(cudaErrorStreamCaptureUnsupported) : cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
  Event *x = (Event*)a, *y = (Event*)b;
  if (!x->recorded || !y->recorded || (x->flags | y->flags) & cudaEventDisableTiming) return give(cudaErrorInvalidResourceHandle);
  *ms = (float)(1e3 * (y->at - x->at)); if (*ms >= 0 && *ms < 1e-3f) *ms = 1e-3f; return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void*, dim3 g, dim3 b, void**, size_t s, cudaStream_t) { return launched(g, b, s); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3 g, dim3 b, void**, size_t s, cudaStream_t) { return launched(g, b, s); }
cudaError_t cudaLaunchCooperativeKernel(const void*, dim3 g, dim3 b, void**, size_t s, cudaStream_t) { return launched(g, b, s); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void*, void**) { return launched(c->gridDim, c->blockDim, c->dynamicSmemBytes); }
static thread_local struct { dim3 g, b; size_t s; void* stream; } pushed;
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t s, struct CUstream_st* t) { pushed = {g, b, s, t}; return 0; }
cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* s, void* t) { *g = pushed.g; *b = pushed.b; *s = pushed.s; *(void**)t = pushed.stream; return cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* f) { *k = (cudaKernel_t)f; return cudaSuccess; }
void** __cudaRegisterFatBinary(void*) { return (void**)new void*[1]{nullptr}; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a); a->maxThreadsPerBlock = 1024; a->numRegs = 32; a->ptxVersion = 90; a->binaryVersion = 90;
  a->maxDynamicSharedSizeBytes = 232448; return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int b, size_t) { *n = b > 0 ? 2048 / b : 1; return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void* f, int b, size_t s, unsigned) { return cudaOccupancyMaxActiveBlocksPerMultiprocessor(n, f, b, s); }
cudaError_t cudaGetLastError() { cudaError_t e = last; last = cudaSuccess; return e; }
cudaError_t cudaPeekAtLastError() { return last; }
const char* cudaGetErrorName(cudaError_t e) { static char t[32]; snprintf(t, 32, "stub error %d", e); return t; }
const char* cudaGetErrorString(cudaError_t e) { return e == cudaErrorMemoryAllocation ? "out of memory" : cudaGetErrorName(e); }
cudaError_t cudaGetSymbolAddress(void** p, const void*) { static char page[1 << 16]; *p = page; return cudaSuccess; }
cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* r) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  *f = driver ? dlsym(driver, name) : nullptr;
  if (r) *r = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// ---- cuBLAS: handles, and one algorithm for everything ----
int cublasCreate_v2(void** h) { *h = malloc(64); return 0; }
int cublasGetMathMode(void*, int* m) { *m = 0; return 0; }
int cublasGetPointerMode_v2(void*, int* m) { *m = 0; return 0; }
int cublasLtMatmulDescCreate(void** d, int, int) { *d = calloc(1, 512); return 0; }
int cublasLtMatrixLayoutCreate(void** d, int, uint64_t, uint64_t, int64_t) { *d = calloc(1, 512); return 0; }
int cublasLtMatmulPreferenceCreate(void** d) { *d = calloc(1, 512); return 0; }
struct Heuristic { uint64_t algo[8]; size_t workspace; int state; float waves; int reserved[4]; };
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, Heuristic* r, int* n) { memset(r, 0, sizeof *r); *n = 1; return 0; }
size_t cublasLtGetVersion() { return 130100; }

// ---- NCCL: communicators that exchange nothing ----
struct Comm { int ranks, rank; };
int ncclGetVersion(int* v) { *v = 22809; return 0; }
int ncclGetUniqueId(char* id) { memset(id, 7, 128); return 0; }
const char* ncclGetErrorString(int) { return "stub"; }
const char* ncclGetLastError(void*) { return ""; }
struct Id { char b[128]; };
int ncclCommInitRank(void** c, int n, Id, int r) { *c = new Comm{n, r}; return 0; }
int ncclCommInitRankConfig(void** c, int n, Id, int r, void*) { *c = new Comm{n, r}; return 0; }
int ncclCommInitRankScalable(void** c, int n, int r, int, Id*, void*) { *c = new Comm{n, r}; return 0; }
int ncclCommSplit(Comm* c, int color, int key, void** out, void*) { (void)color; *out = new Comm{c->ranks, key}; return 0; }
int ncclCommCount(Comm* c, int* n) { *n = c->ranks; return 0; }
int ncclCommUserRank(Comm* c, int* n) { *n = c->rank; return 0; }
int ncclCommGetAsyncError(void*, int* e) { *e = 0; return 0; }
}
