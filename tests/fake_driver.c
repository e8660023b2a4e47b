/* NVIDIA's driver as far as tuning/plan/probe.py asks it: libcuda.so.1 and libnvidia-ml.so.1 in one.
 * What it answers is in the file that FAKE_DRIVER names, a line each, fields parted by '|':
 *   driver|VERSION|CUDA|what cuInit returns|what nvmlInit returns
 *   gpu|NAME|UUID|MAJOR|MINOR|TOTAL MIB|FREE MIB, or -CODE of NVML|FREE MIB IN A CONTEXT|INTEGRATED|VMM|MODE
 * CUDA_VISIBLE_DEVICES is read as the CUDA programming guide says: indices or (starts of) UUIDs, up to
 * the first that names no GPU. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct {
  char name[128], uuid[64];
  int major, minor, integrated, vmm, mode, shown;
  long long total, free, inside;
} Gpu;
static Gpu gpus[16];
static int count, shown[16], visible, cuda, init_code, nvml_code, current, loaded;
static char version[64];

static void load(void) {
  char line[512];
  if (loaded++) return;
  FILE *file = fopen(getenv("FAKE_DRIVER"), "r");
  while (fgets(line, sizeof line, file)) {
    Gpu *g = &gpus[count];
    if (sscanf(line, "driver|%63[^|]|%d|%d|%d", version, &cuda, &init_code, &nvml_code) == 4) continue;
    if (sscanf(line, "gpu|%127[^|]|%63[^|]|%d|%d|%lld|%lld|%lld|%d|%d|%d", g->name, g->uuid, &g->major,
               &g->minor, &g->total, &g->free, &g->inside, &g->integrated, &g->vmm, &g->mode) == 10) count++;
  }
  fclose(file);
  char *list = getenv("CUDA_VISIBLE_DEVICES");
  if (!list) {
    for (visible = 0; visible < count; visible++) shown[visible] = visible;
    return;
  }
  char copy[512];
  strncpy(copy, list, sizeof copy - 1);
  for (char *part = strtok(copy, ","); part; part = strtok(NULL, ",")) {
    int index = -1;
    char *end;
    if (strncmp(part, "GPU-", 4) && strncmp(part, "MIG-", 4)) {
      index = (int)strtol(part, &end, 10);
      if (end == part || *end) index = -1;
    }
    else for (int i = 0; i < count; i++) if (!strncmp(gpus[i].uuid, part, strlen(part))) index = i;
    if (index < 0 || index >= count) return;
    for (int i = 0; i < visible; i++) if (shown[i] == index) { visible = 0; return; }
    shown[visible++] = index;
  }
}

int cuInit(unsigned flags) {
  load();
  if (init_code == -9) abort();       /* a driver that crashes */
  if (init_code == -8) sleep(600);    /* and one that hangs */
  return init_code ? init_code : visible ? 0 : 100;
}
int cuGetErrorString(int code, const char **text) {
  *text = code == 46    ? "CUDA-capable device(s) is/are busy or unavailable"
          : code == 214 ? "uncorrectable ECC error encountered"
          : code == 100   ? "no CUDA-capable device is detected"
          : code == 802 ? "system not yet initialized"
          : code == 803 ? "system has unsupported display driver / cuda driver combination"
          : code == 804 ? "forward compatibility was attempted on non supported HW"
                        : "unknown error";
  return 0;
}
int cuDriverGetVersion(int *out) { *out = cuda; return 0; }
int cuDeviceGetCount(int *out) { *out = visible; return 0; }
int cuDeviceGet(int *out, int ordinal) { *out = shown[ordinal]; return 0; }
int cuDeviceGetName(char *out, int size, int d) { strncpy(out, gpus[d].name, size); return 0; }
int cuDeviceTotalMem_v2(size_t *out, int d) { *out = (size_t)gpus[d].total << 20; return 0; }
int cuDeviceGetUuid_v2(unsigned char *out, int d) {
  const char *p = gpus[d].uuid + 4;
  for (int i = 0; i < 16; i++) {
    if (*p == '-') p++;
    sscanf(p, "%2hhx", out + i);
    p += 2;
  }
  return 0;
}
int cuDeviceGetAttribute(int *out, int attribute, int d) {
  *out = attribute == 75 ? gpus[d].major : attribute == 76 ? gpus[d].minor
       : attribute == 18 ? gpus[d].integrated : attribute == 102 ? gpus[d].vmm
       : attribute == 20 ? gpus[d].mode : 0;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **out, int d) {
  current = d;
  return gpus[d].inside < 0 ? (int)-gpus[d].inside : 0;
}
int cuCtxSetCurrent(void *context) { return 0; }
int cuMemGetInfo_v2(size_t *free, size_t *total) {
  *free = (size_t)gpus[current].inside << 20;
  *total = (size_t)gpus[current].total << 20;
  return 0;
}

int nvmlInit_v2(void) { load(); return nvml_code; }
int nvmlSystemGetDriverVersion(char *out, unsigned size) { strncpy(out, version, size); return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **out) {
  for (int i = 0; i < count; i++)
    if (!strcmp(gpus[i].uuid, uuid)) { *out = &gpus[i]; return 0; }
  return 6; /* not found */
}
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *out) {
  Gpu *g = handle;
  if (g->free < 0) return (int)-g->free; /* 3 not supported, 4 no permission */
  out[0] = (unsigned long long)g->total << 20;
  out[1] = (unsigned long long)g->free << 20;
  out[2] = out[0] - out[1];
  return 0;
}
