/*
 * What drivers of real devices need: the address of a mapping, as the kernel is to be told it, and accesses to device
 * registers. A compiler may join, split or repeat plain loads and stores; these happen once each, at their exact width.
 */
#include "addon.h"

/* address(buffer): where the memory of an ArrayBuffer lies in this process */
napi_value address_(napi_env env, const napi_value *args) {
  void *data;
  size_t length;
  if (napi_get_arraybuffer_info(env, args[0], &data, &length) != napi_ok || data == NULL) return from_long(env, -EINVAL);
  return from_long(env, (int64_t)(intptr_t)data);
}

/*
 * Orders what this thread wrote to and read from memory with its accesses to a device, both ways: a device that is
 * notified sees the ring as it was published. x86 orders stores to registers itself; a full barrier costs little there.
 */
static inline void device_barrier(void) {
#if defined(__aarch64__)
  __asm__ volatile("dmb osh" ::: "memory");
#else
  __sync_synchronize();
#endif
}

/* The register of `width` bytes at `offset` of a mapping; NULL when it is not wholly within, or not aligned in memory. */
static volatile void *register_at(napi_env env, const napi_value *args, int *width) {
  void *data;
  size_t length;
  int64_t offset = to_long(env, args[1]);
  *width = to_int(env, args[2]);
  if ((*width != 1 && *width != 2 && *width != 4) || offset < 0) return NULL;
  if (!to_bytes(env, args[0], napi_uint8_array, &data, &length)) return NULL;
  if ((uint64_t)offset + (uint64_t)*width > length) return NULL;
  if (((uintptr_t)data + (uint64_t)offset) % (unsigned)*width != 0) return NULL;
  return (volatile char *)data + offset;
}

/* registerRead(bytes, offset, width): the value */
napi_value register_read_(napi_env env, const napi_value *args) {
  int width;
  uint32_t value;
  volatile void *at = register_at(env, args, &width);
  if (at == NULL) return from_long(env, -EINVAL);
  device_barrier();
  if (width == 1) value = *(volatile uint8_t *)at;
  else if (width == 2) value = *(volatile uint16_t *)at;
  else value = *(volatile uint32_t *)at;
  device_barrier();
  return from_long(env, value);
}

/* registerWrite(bytes, offset, width, value): 0 */
napi_value register_write_(napi_env env, const napi_value *args) {
  int width;
  volatile void *at = register_at(env, args, &width);
  uint32_t value = (uint32_t)to_long(env, args[3]);
  if (at == NULL) return from_long(env, -EINVAL);
  device_barrier();
  if (width == 1) *(volatile uint8_t *)at = (uint8_t)value;
  else if (width == 2) *(volatile uint16_t *)at = (uint16_t)value;
  else *(volatile uint32_t *)at = value;
  return from_long(env, 0);
}
