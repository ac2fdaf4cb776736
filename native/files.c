/*
 * System calls on files: at once in this thread, or on a thread of libuv's pool when they are given a callback.
 */
#define _GNU_SOURCE
#include "addon.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/*
 * A system call on a file, and what is kept of it while a thread of libuv's pool makes it: the callback, and the
 * memory, so that it is not collected.
 */
struct file_call {
  int64_t (*make)(const struct file_call *call);
  int fd, flags, count;
  int64_t position, length, result;
  struct iovec *parts;
  napi_async_work work;
  napi_ref callback, memory;
};

/* preadv2 and pwritev2 only where they are needed: not every sandbox lets them through. */
static int64_t make_preadv(const struct file_call *call) {
  if (call->flags == 0) return preadv(call->fd, call->parts, call->count, call->position);
  return syscall(SYS_preadv2, call->fd, call->parts, (long)call->count, (long)call->position, 0L, call->flags);
}

static int64_t make_pwritev(const struct file_call *call) {
  if (call->flags == 0) return pwritev(call->fd, call->parts, call->count, call->position);
  return syscall(SYS_pwritev2, call->fd, call->parts, (long)call->count, (long)call->position, 0L, call->flags);
}

static int64_t make_fallocate(const struct file_call *call) {
  return fallocate(call->fd, call->flags, call->position, call->length);
}

/* Make the call; its value, or -errno. */
static int64_t now(const struct file_call *call) {
  int64_t result;
  do result = call->make(call);
  while (result == -1 && errno == EINTR);
  return result == -1 ? -errno : result;
}

static void on_thread(napi_env env, void *data) {
  (void)env;
  struct file_call *call = data;
  call->result = now(call);
}

static void end_call(napi_env env, struct file_call *call) {
  if (call->callback != NULL) napi_delete_reference(env, call->callback);
  if (call->memory != NULL) napi_delete_reference(env, call->memory);
  if (call->work != NULL) napi_delete_async_work(env, call->work);
  free(call);
}

static void on_made(napi_env env, napi_status status, void *data) {
  struct file_call *call = data;
  int64_t result = status == napi_ok ? call->result : -ECANCELED;
  napi_value callback = NULL, receiver = NULL, argument = from_long(env, result);
  napi_get_reference_value(env, call->callback, &callback);
  napi_get_global(env, &receiver);
  end_call(env, call);
  /* What it throws becomes an uncaughtException; nothing is called when the environment is being terminated. */
  if (callback != NULL) napi_call_function(env, receiver, callback, 1, &argument, NULL);
}

/* Have a thread make the call, then `callback(result)`: 0, or -errno when that cannot be. */
static napi_value later(napi_env env, const struct file_call *template, napi_value memory, napi_value callback) {
  napi_value name;
  size_t parts = (size_t)template->count * sizeof *template->parts;
  struct file_call *call = malloc(sizeof *call + parts);
  if (call == NULL) return from_long(env, -ENOMEM);
  *call = *template;
  if (parts > 0) call->parts = memcpy(call + 1, template->parts, parts);
  if (napi_create_reference(env, callback, 1, &call->callback) != napi_ok ||
      (memory != NULL && napi_create_reference(env, memory, 1, &call->memory) != napi_ok) ||
      napi_create_string_utf8(env, "VirtioFileCall", NAPI_AUTO_LENGTH, &name) != napi_ok ||
      napi_create_async_work(env, NULL, name, on_thread, on_made, call, &call->work) != napi_ok ||
      napi_queue_async_work(env, call->work) != napi_ok) {
    end_call(env, call);
    return from_long(env, -EINVAL);
  }
  return from_long(env, 0);
}

static bool is_function(napi_env env, napi_value value) {
  napi_valuetype type;
  return napi_typeof(env, value, &type) == napi_ok && type == napi_function;
}

enum { MAX_PARTS = 1024 }; /* in one call: UIO_MAXIOV of the kernel */

/* The parts of `memory` that `places` has as pairs of offset and length; false when one of them is outside. */
static bool to_parts(napi_env env, napi_value memory, napi_value places, int count, struct iovec *parts) {
  void *data, *pairs;
  size_t size, room;
  if (!to_bytes(env, memory, napi_uint8_array, &data, &size) ||
      !to_bytes(env, places, napi_float64_array, &pairs, &room) || count < 0 || count > MAX_PARTS ||
      (size_t)count > room / 2) {
    return false;
  }
  const double *pair = pairs;
  for (int i = 0; i < count; i++, pair += 2) {
    if (!(pair[0] >= 0 && pair[1] >= 0 && pair[0] + pair[1] <= (double)size)) return false; /* NaN is refused, too */
    parts[i].iov_base = (char *)data + (size_t)pair[0];
    parts[i].iov_len = (size_t)pair[1];
  }
  return true;
}

static napi_value transfer(napi_env env, const napi_value *args, int64_t (*make)(const struct file_call *call)) {
  struct iovec parts[MAX_PARTS];
  struct file_call call = {.make = make, .parts = parts};
  call.fd = to_int(env, args[0]);
  call.count = to_int(env, args[3]);
  call.position = to_long(env, args[4]);
  call.flags = to_int(env, args[5]);
  if (call.position < 0 || !to_parts(env, args[1], args[2], call.count, parts)) return from_long(env, -EINVAL);
  if (is_function(env, args[6])) return later(env, &call, args[1], args[6]);
  return from_long(env, now(&call));
}

/* preadv(fd, memory, places: Float64Array, count, position, flags, callback?): bytes read; 0 with a callback */
napi_value preadv_(napi_env env, const napi_value *args) { return transfer(env, args, make_preadv); }

/* pwritev(fd, memory, places: Float64Array, count, position, flags, callback?): bytes written; 0 with a callback */
napi_value pwritev_(napi_env env, const napi_value *args) { return transfer(env, args, make_pwritev); }

/* fallocate(fd, mode, offset, length, callback?): 0 */
napi_value fallocate_(napi_env env, const napi_value *args) {
  struct file_call call = {.make = make_fallocate};
  call.fd = to_int(env, args[0]);
  call.flags = to_int(env, args[1]);
  call.position = to_long(env, args[2]);
  call.length = to_long(env, args[3]);
  if (is_function(env, args[4])) return later(env, &call, NULL, args[4]);
  return from_long(env, now(&call));
}
