/* A stand-in for the CANN libraries that torch_npu links to, for machines without CANN: enough that the real torch_npu
 * can be imported and asked for names, schemas and the shapes of results. There is no kernel in it: computing a value
 * fails. Device memory is host memory. */
#include <stdlib.h>
#include <string.h>

/* Succeeds whatever it is called with. */
#define ACCEPT(name) long name(void) { return 0; }

/* linked by torch_npu 2.13 */
ACCEPT(aclAppLog) ACCEPT(aclCreateDataBuffer) ACCEPT(aclCreateTensorDesc) ACCEPT(aclDestroyDataBuffer)
ACCEPT(aclDestroyTensorDesc) ACCEPT(aclFinalize) ACCEPT(aclGetDeviceCapability) ACCEPT(aclGetTensorDescDimV2)
ACCEPT(aclGetTensorDescFormat) ACCEPT(aclGetTensorDescNumDims) ACCEPT(aclGetTensorDescType) ACCEPT(aclInit)
ACCEPT(aclSetTensorDescName) ACCEPT(aclSetTensorFormat) ACCEPT(aclSetTensorPlaceMent) ACCEPT(aclSetTensorShape)
ACCEPT(aclmdlFinalizeDump) ACCEPT(aclmdlInitDump) ACCEPT(aclmdlSetDump) ACCEPT(aclopCompileAndExecute)
ACCEPT(aclopCreateAttr) ACCEPT(aclopDestroyAttr) ACCEPT(aclopSetAttrBool) ACCEPT(aclopSetAttrDataType)
ACCEPT(aclopSetAttrFloat) ACCEPT(aclopSetAttrInt) ACCEPT(aclopSetAttrListBool) ACCEPT(aclopSetAttrListFloat)
ACCEPT(aclopSetAttrListInt) ACCEPT(aclopSetAttrListListInt) ACCEPT(aclopSetAttrString) ACCEPT(aclrtBinaryGetFunction)
ACCEPT(aclrtBinaryLoadFromData) ACCEPT(aclrtCreateEventExWithFlag) ACCEPT(aclrtDestroyEvent)
ACCEPT(aclrtDestroyStream) ACCEPT(aclrtDeviceCanAccessPeer) ACCEPT(aclrtDeviceEnablePeerAccess)
ACCEPT(aclrtDeviceGetBareTgid) ACCEPT(aclrtEventElapsedTime) ACCEPT(aclrtFreePhysical) ACCEPT(aclrtGetFunctionAddr)
ACCEPT(aclrtMallocPhysical) ACCEPT(aclrtMapMem) ACCEPT(aclrtMemExportToShareableHandle)
ACCEPT(aclrtMemImportFromShareableHandle) ACCEPT(aclrtMemSetPidToShareableHandle) ACCEPT(aclrtProcessReport)
ACCEPT(aclrtRecordEvent) ACCEPT(aclrtReleaseMemAddress) ACCEPT(aclrtReserveMemAddress) ACCEPT(aclrtResetDevice)
ACCEPT(aclrtResetEvent) ACCEPT(aclrtSetCurrentContext) ACCEPT(aclrtStreamWaitEvent) ACCEPT(aclrtSynchronizeEvent)
ACCEPT(aclrtSynchronizeStream) ACCEPT(aclrtUnmapMem) ACCEPT(rtDevBinaryRegister) ACCEPT(rtFunctionRegister)
ACCEPT(rtGetC2cCtrlAddr) ACCEPT(rtKernelLaunch)
/* of the profiler's library */
ACCEPT(MsprofGetHashId) ACCEPT(MsprofRegisterCallback) ACCEPT(MsprofReportAdditionalInfo) ACCEPT(MsprofReportApi)
ACCEPT(MsprofReportCompactInfo) ACCEPT(MsprofSysCycleTime)
/* looked up by name when the runtime starts */
ACCEPT(aclrtSynchronizeDevice) ACCEPT(aclrtSynchronizeDeviceWithTimeout) ACCEPT(aclSetCompileopt)
ACCEPT(aclrtDestroyStreamForce) ACCEPT(aclrtSetDeviceSatMode) ACCEPT(aclrtSetOpExecuteTimeOut)

/* -- device ------------------------------------------------------------------------------------------------------- */

static int current_device;

int aclrtSetDevice(int device) {
  current_device = device;
  return 0;
}

int aclrtGetDevice(int *device) {
  *device = current_device;
  return 0;
}

/* Never 0: with no device, torch_npu ends the process from a thread of its own. */
int aclrtGetDeviceCount(unsigned *count) {
  const char *wanted = getenv("STUB_NPU_DEVICES");
  *count = wanted ? atoi(wanted) : 1;
  return 0;
}

const char *aclrtGetSocName(void) { return "Ascend910B1"; }
const char *aclGetRecentErrMsg(void) { return ""; }

int aclrtGetCurrentContext(void **context) {
  static int only;
  *context = &only;
  return 0;
}

int aclrtCreateStream(void **stream) {
  *stream = malloc(8);
  return 0;
}

int aclrtCreateStreamWithConfig(void **stream, unsigned priority, unsigned flags) { return aclrtCreateStream(stream); }

int aclrtGetSysParamOpt(int option, long *value) {
  *value = 0;
  return 0;
}

int aclrtCtxGetSysParamOpt(int option, long *value) { return aclrtGetSysParamOpt(option, value); }
int aclrtSetSysParamOpt(int option, long value) { return 0; }
int aclrtCtxSetSysParamOpt(int option, long value) { return 0; }

/* -- memory ------------------------------------------------------------------------------------------------------- */

int aclrtMalloc(void **memory, size_t bytes, int policy) {
  *memory = malloc(bytes + 64);
  return *memory ? 0 : 1;
}

int aclrtMallocHost(void **memory, size_t bytes) { return aclrtMalloc(memory, bytes, 0); }

int aclrtFree(void *memory) {
  free(memory);
  return 0;
}

int aclrtFreeHost(void *memory) { return aclrtFree(memory); }

int aclrtGetMemInfo(int kind, size_t *available, size_t *total) {
  *available = *total = 64ul << 30;
  return 0;
}

int aclrtMemcpy(void *to, size_t limit, const void *from, size_t bytes, int kind) {
  memcpy(to, from, bytes);
  return 0;
}

int aclrtMemcpyAsync(void *to, size_t limit, const void *from, size_t bytes, int kind, void *stream) {
  return aclrtMemcpy(to, limit, from, bytes, kind);
}

int aclrtMemset(void *memory, size_t limit, int value, size_t bytes) {
  memset(memory, value, bytes);
  return 0;
}
