/* A libcuda.so.1 that needs no GPU: what Triton's driver calls, with launches and TMA descriptors held to the rules of
 * an H100 (CUDA C++ Programming Guide, table of compute capability 9.0; driver API, cuTensorMapEncodeTiled).
 *
 * Nothing runs.  A call that breaks a rule fails, and cuGetErrorString says which rule. */
#include "cuda.h"
#include <stdio.h>
#include <stdlib.h>

#define MAX_THREADS 1024
#define SHARED_WITHOUT_ASKING 49152
#define SHARED_PER_BLOCK 232448
#define SHARED_PER_MULTIPROCESSOR 233472

static char broken[256] = "no rule is broken";
#define REFUSE(...) return snprintf(broken, sizeof broken, __VA_ARGS__), CUDA_ERROR_INVALID_VALUE

struct function {
    int shared;
};

static int launches, descriptors;
int rules_launches(void) { return launches; }
int rules_descriptors(void) { return descriptors; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
    unsigned x = config->gridDimX, y = config->gridDimY, z = config->gridDimZ;
    unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
    if (x < 1 || y < 1 || z < 1 || x > 2147483647u || y > 65535 || z > 65535)
        REFUSE("a grid of %u x %u x %u", x, y, z);
    if (threads < 1 || threads > MAX_THREADS)
        REFUSE("a block of %u threads", threads);
    if (config->sharedMemBytes > (unsigned)((struct function *)function)->shared)
        REFUSE("%u bytes of shared memory, of %d", config->sharedMemBytes, ((struct function *)function)->shared);
    launches++;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    if (attribute >= CU_FUNC_ATTRIBUTE_MAX)
        REFUSE("an attribute that this driver does not know: %d", attribute);
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        if (value > SHARED_PER_BLOCK)
            REFUSE("%d bytes of shared memory, of %d", value, SHARED_PER_BLOCK);
        ((struct function *)function)->shared = value;
    }
    return CUDA_SUCCESS;
}

static int bytes(CUtensorMapDataType type) {
    switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
        return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
        return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
        return 8;
    default:
        return 4;
    }
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    unsigned inner = box[0] * bytes(type);
    unsigned span = swizzle == CU_TENSOR_MAP_SWIZZLE_32B    ? 32
                    : swizzle == CU_TENSOR_MAP_SWIZZLE_64B  ? 64
                    : swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128
                                                            : 256 * bytes(type);
    if ((cuuint64_t)map % 64)
        REFUSE("a descriptor at %p, not a multiple of 64", (void *)map);
    if ((cuuint64_t)address % 16)
        REFUSE("a descriptor of memory at %p, not a multiple of 16", address);
    if (rank < 1 || rank > 5)
        REFUSE("a descriptor of %u dimensions", rank);
    for (unsigned i = 0; i < rank; i++) {
        if (sizes[i] < 1 || sizes[i] > 1ull << 32)
            REFUSE("a descriptor of a tensor of %llu in dimension %u", (unsigned long long)sizes[i], i);
        if (box[i] < 1 || box[i] > 256)
            REFUSE("a descriptor's box of %u in dimension %u", box[i], i);
        if (steps[i] < 1 || steps[i] > 8)
            REFUSE("a descriptor's step of %u in dimension %u", steps[i], i);
        if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40))
            REFUSE("a descriptor's stride of %llu bytes", (unsigned long long)strides[i]);
    }
    if (inner % 16 || inner > span)
        REFUSE("a descriptor's box of %u bytes in a span of %u", inner, span);
    descriptors++;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = broken;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
        *value = SHARED_PER_BLOCK;
        break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
        *value = SHARED_PER_MULTIPROCESSOR;
        break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
        *value = 132;
        break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
        *value = 65536;
        break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
        *value = 32;
        break;
    default:
        *value = 1;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? MAX_THREADS : 0;
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    /* never freed: as many as there are kernels */
    struct function *made = malloc(sizeof *made);
    made->shared = SHARED_WITHOUT_ASKING;
    *function = (CUfunction)made;
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    *(CUdeviceptr *)value = pointer;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)1, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
