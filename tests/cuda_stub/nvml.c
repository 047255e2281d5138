// libnvidia-ml.so.1 without a driver: one process, this one, and what the stub of the runtime has given it.
#include <string.h>
#include <stdlib.h>
#include <stdio.h>
#include <unistd.h>
int cudaMemGetInfo(size_t*, size_t*) __attribute__((weak));
typedef struct { unsigned long long total, free, used; } Mem;
typedef struct { unsigned int pid; unsigned long long bytes; unsigned int gi, ci; } Proc;
static unsigned long long used(void) { size_t f, t; if (!cudaMemGetInfo) return 0; cudaMemGetInfo(&f, &t); return t - f; }
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned f) { return 0; }
int nvmlShutdown(void) { return 0; }
const char* nvmlErrorString(int e) { return "stub"; }
int nvmlDeviceGetCount_v2(unsigned* n) { const char* s = getenv("STUB_GPUS"); *n = s ? atoi(s) : 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void** h) { *h = (void*)(size_t)(i + 1); return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char* s, void** h) { *h = (void*)1; return 0; }
int nvmlDeviceGetUUID(void* h, char* s, unsigned n) {
  int d = (int)(size_t)h - 1; char hex[33];
  for (int i = 0; i < 16; i++) sprintf(hex + 2 * i, "%02x", (unsigned char)(d * 16 + i));
  snprintf(s, n, "GPU-%.8s-%.4s-%.4s-%.4s-%.12s", hex, hex + 8, hex + 12, hex + 16, hex + 20); return 0;
}
int nvmlDeviceGetMemoryInfo(void* h, Mem* m) { size_t f = 0, t = 0; if (cudaMemGetInfo) cudaMemGetInfo(&f, &t); m->total = t; m->free = f; m->used = t - f; return 0; }
int nvmlDeviceGetComputeRunningProcesses_v3(void* h, unsigned* n, Proc* p) {
  if (getenv("STUB_NVML_NO_PROCESS")) { *n = 0; return 0; }
  if (*n < 1 || !p) { *n = 1; return 7; }
  *n = 1; p[0].pid = getpid(); p[0].bytes = used(); p[0].gi = p[0].ci = 0xffffffff; return 0;
}
int nvmlDeviceGetNvLinkRemoteDeviceType(void* h, unsigned l, int* t) { return 3; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void* h, unsigned l, void* p) { return 3; }
int nvmlDeviceGetComputeRunningProcesses(void* h, unsigned* n, Proc* p) { return nvmlDeviceGetComputeRunningProcesses_v3(h, n, p); }
int nvmlDeviceGetComputeRunningProcesses_v2(void* h, unsigned* n, Proc* p) { return nvmlDeviceGetComputeRunningProcesses_v3(h, n, p); }
int nvmlDeviceGetGpuFabricInfoV(void* h, void* p) { return 3; }
int nvmlSystemGetDriverVersion(char* s, unsigned n) { snprintf(s, n, "580.159.04"); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int* v) { *v = 13000; return 0; }
