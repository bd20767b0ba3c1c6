// A CUDA driver without a GPU: it loads every module, computes nothing, and remembers its last launch. Its functions
// have the names and the arguments that libcuda's have, as far as Triton's launcher and offpath's call them.
#include <stdint.h>
#include <string.h>

typedef struct {
    unsigned grid[3], block[3], shared_bytes;
    void* stream;
    void* attributes;
    unsigned attribute_count;
} Config;

enum { MOST_ARGUMENTS = 64 };

struct Launch {
    uint64_t count;  // of launches so far
    uint64_t grid[3], threads, shared_bytes, stream, attribute_count, function;
    uint64_t arguments[MOST_ARGUMENTS];  // eight bytes from where each lies
    uint64_t argument_count;             // how many the next kernel has: set by whoever launches it
    uint64_t pushed, popped;             // contexts
} standin;

static void* context = (void*)16;

int cuLaunchKernelEx(const Config* config, void* function, void** arguments, void** extra) {
    standin.count++;
    for (int i = 0; i < 3; ++i) standin.grid[i] = config->grid[i];
    standin.threads = config->block[0] * config->block[1] * config->block[2];
    standin.shared_bytes = config->shared_bytes;
    standin.stream = (uint64_t)config->stream;
    standin.attribute_count = config->attribute_count;
    standin.function = (uint64_t)function;
    for (uint64_t i = 0; i < standin.argument_count && i < MOST_ARGUMENTS; ++i)
        memcpy(&standin.arguments[i], arguments[i], 8);
    return 0;
}

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuGetErrorString(int status, const char** text) { return *text = "an error", 0; }

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    switch (attribute) {
        case 75: return *value = 9, 0;       // the compute capability, major
        case 76: return *value = 0, 0;       // and minor
        case 97: return *value = 232448, 0;  // bytes of shared memory that a block may ask for
        case 111: return *value = 1024, 0;   // of which the driver reserves
        default: return *value = 1024, 0;
    }
}

int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuCtxGetCurrent(void** now) { return *now = context, 0; }
int cuCtxSetCurrent(void* now) { return context = now, 0; }
int cuCtxPushCurrent_v2(void* now) { return standin.pushed++, 0; }
int cuCtxPopCurrent_v2(void** now) { return standin.popped++, 0; }
int cuDevicePrimaryCtxRetain(void** primary, int device) { return *primary = (void*)16, 0; }
int cuCtxGetLimit(uint64_t* value, int limit) { return *value = 0, 0; }
int cuCtxSetLimit(int limit, uint64_t value) { return 0; }

int cuModuleLoadData(void** module, const void* image) {
    static uint64_t next = 64;
    return *module = (void*)(next += 64), 0;
}

int cuModuleUnload(void* module) { return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) { return *function = module, 0; }
int cuFuncGetAttribute(int* value, int attribute, void* function) { return *value = attribute == 0 ? 1024 : 0, 0; }
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int threads, uint64_t shared_bytes) {
    return *blocks = 1, 0;
}

int cuPointerGetAttribute(uint64_t* value, int attribute, uint64_t pointer) { return *value = pointer, 0; }
