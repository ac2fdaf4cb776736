/*
 * Arguments and results of the functions of this addon: conversions between JavaScript's values and those of system
 * calls, and the functions that live in another file than syscalls.c.
 */
#ifndef VIRTIO_ADDON_H
#define VIRTIO_ADDON_H

#define NAPI_VERSION 8
#include <node_api.h>

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>

/* What a function of this addon is: given its arguments (undefined where the caller left them out), it answers. */
typedef napi_value (*function)(napi_env env, const napi_value *args);

/*
 * A descriptor or small number. What is not one becomes -1, which no system call takes for a descriptor: Node-API's own
 * conversion would make standard input of NaN, and wrap what is too large.
 */
static inline int to_int(napi_env env, napi_value value) {
  double number;
  bool is_one = napi_get_value_double(env, value, &number) == napi_ok && number >= INT32_MIN && number <= INT32_MAX;
  return is_one ? (int)number : -1;
}

/* A size or offset; -1 for what is not a number or none of 64 bits. */
static inline int64_t to_long(napi_env env, napi_value value) {
  double number;
  bool is_one = napi_get_value_double(env, value, &number) == napi_ok && number >= -0x1p63 && number < 0x1p63;
  return is_one ? (int64_t)number : -1;
}

/* The bytes under a typed array of the given type; false when the value is something else. */
static inline bool to_bytes(napi_env env, napi_value value, napi_typedarray_type type, void **data, size_t *count) {
  napi_typedarray_type actual;
  bool is_view;
  return napi_is_typedarray(env, value, &is_view) == napi_ok && is_view &&
         napi_get_typedarray_info(env, value, &actual, count, data, NULL, NULL) == napi_ok && actual == type;
}

/* A NUL-terminated string; -errno when it does not fit. */
static inline int to_string(napi_env env, napi_value value, char *into, size_t size) {
  size_t length;
  if (napi_get_value_string_utf8(env, value, NULL, 0, &length) != napi_ok) return -EINVAL;
  if (length >= size) return -ENAMETOOLONG;
  napi_get_value_string_utf8(env, value, into, size, &length);
  return 0;
}

static inline napi_value from_long(napi_env env, int64_t number) {
  napi_value value = NULL;
  napi_create_int64(env, number, &value);
  return value;
}

/* A system call's result: its value, or -errno when it is -1. */
static inline napi_value from_result(napi_env env, int64_t result) {
  return from_long(env, result == -1 ? -errno : result);
}

/* files.c */
napi_value preadv_(napi_env env, const napi_value *args);
napi_value pwritev_(napi_env env, const napi_value *args);
napi_value fallocate_(napi_env env, const napi_value *args);

/* guard.c */
int guard(void *start, size_t span, size_t granule);
void unguard(int number);
bool is_lost(int number);
napi_value fault_counter_(napi_env env, const napi_value *args);

/* jam.c */
napi_value jam_watch_(napi_env env, const napi_value *args);
napi_value jam_end_(napi_env env, const napi_value *args);

/* devices.c */
napi_value address_(napi_env env, const napi_value *args);
napi_value register_read_(napi_env env, const napi_value *args);
napi_value register_write_(napi_env env, const napi_value *args);

#endif
