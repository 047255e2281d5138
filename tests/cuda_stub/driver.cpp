// libcuda.so.1 without a driver: modules are looked at, kernels do nothing.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <set>
extern "C" {
typedef int R;
struct Module { std::string names; };
struct Function { std::string name; };
static void* context = (void*)0x1000;
R cuInit(unsigned) { return 0; }
R cuGetExportTable(const void** t, const void*) { *t = 0; return 500; }
R cuGetProcAddress(const char*, void** f, int, uint64_t) { *f = 0; return 500; }
R cuGetProcAddress_v2(const char*, void** f, int, uint64_t, int* r) { *f = 0; if (r) *r = 1; return 500; }
R cuDriverGetVersion(int* v) { *v = 13000; return 0; }
R cuDeviceGet(int* d, int i) { *d = i; return 0; }
R cuDeviceGetCount(int* n) { const char* s = getenv("STUB_GPUS"); *n = s ? atoi(s) : 1; return 0; }
R cuCtxGetCurrent(void** c) { *c = context; return 0; }
R cuCtxGetDevice(int* d) { *d = 0; return 0; }
R cuCtxSetCurrent(void*) { return 0; }
R cuDevicePrimaryCtxGetState(int, unsigned* f, int* active) { *f = 0; *active = 1; return 0; }
R cuDevicePrimaryCtxRetain(void** c, int) { *c = context; return 0; }
R cuGetErrorString(R, const char** s) { *s = "stub"; return 0; }
R cuGetErrorName(R, const char** s) { *s = "STUB"; return 0; }
int cudaDeviceGetAttribute(int*, int, int);
R cuDeviceGetAttribute(int* v, int a, int d) { return cudaDeviceGetAttribute(v, a, d); }
R cuModuleLoadData(void** m, const void* image) {
  const unsigned char* e = (const unsigned char*)image;
  if (memcmp(e, "\177ELF", 4)) { fprintf(stderr, "STUB: module is no cubin: %.16s\n", (const char*)image); return 200; }
  uint64_t shoff; uint16_t shnum, shsize; memcpy(&shoff, e + 0x28, 8); memcpy(&shsize, e + 0x3a, 2); memcpy(&shnum, e + 0x3c, 2);
  *m = new Module{std::string((const char*)image, shoff + (size_t)shnum * shsize)};
  return 0;
}
R cuModuleLoadDataEx(void** m, const void* image, unsigned, void*, void*) { return cuModuleLoadData(m, image); }
R cuModuleGetFunction(void** f, void* m, const char* name) {
  if (((Module*)m)->names.find(std::string(".text.") + name) == std::string::npos) { fprintf(stderr, "STUB: no kernel %s in the module\n", name); return 500; }
  *f = new Function{name}; return 0;
}
R cuFuncGetAttribute(int* v, int a, void*) { *v = a == 0 ? 1024 : a == 4 ? 32 : 0; return 0; }
R cuFuncSetAttribute(void*, int, int v) { return v <= 232448 ? 0 : 1; }
long stub_driver_launches = 0;
R cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream, void** args, void** extra) {
  stub_driver_launches++;
  if (getenv("STUB_TRACE")) fprintf(stderr, "STUB: %s grid %u %u %u block %u shared %u stream %p\n", ((Function*)f)->name.c_str(), gx, gy, gz, bx, shared, stream);
  if (!gx || !gy || !gz || !bx || (size_t)bx * by * bz > 1024 || gy > 65535 || gz > 65535 || gx > 2147483647u || shared > 232448) {
    fprintf(stderr, "STUB: bad launch of %s: grid %u %u %u block %u %u %u shared %u\n", ((Function*)f)->name.c_str(), gx, gy, gz, bx, by, bz, shared);
    return 1;
  }
  return 0;
}
R cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, void*, int b, size_t) { *n = 2048 / b; return 0; }
R cuPointerGetAttribute(void* data, int, uint64_t) { *(uint64_t*)data = 0; return 0; }
R cuStreamGetCtx(void*, void** c) { *c = context; return 0; }
}
