/*
 * The system calls that virtio-driver needs and Node.js does not have, as Node-API functions.
 *
 * Every function takes descriptors, numbers and buffers, and returns a value or -errno. Arguments are checked by
 * src/sys; here a wrong one becomes -EBADF or -EINVAL. Nothing waits: sockets are called with MSG_DONTWAIT, reads
 * are made non-blocking by themselves (see drain), and calls on files run on another thread when they are given a
 * callback (see files.c). Three things have a life of their own: a mapping, which is the memory of an ArrayBuffer, a
 * watcher, which is a libuv handle, and a call on another thread (and see jam.c). All end with their environment, so that worker
 * threads can be terminated at any time.
 */
#define _GNU_SOURCE
#include "addon.h"

#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif
#ifndef RWF_NOWAIT
#define RWF_NOWAIT 8
#endif

/* Descriptors in one message: what the kernel sends (SCM_MAX_FD), and what we take; rust-vmm takes 32, too. */
enum { MAX_SENT_FDS = 253, MAX_FDS = 32 };

/*
 * libuv's poll handle, declared by hand so that building needs no uv.h. The handle stays opaque: its size is asked
 * for at run time. The type number is checked against its name when the module loads (libuv 1.x never changed it).
 */
enum { UV_POLL_TYPE = 8, UV_READABLE_EVENT = 1, UV_WRITABLE_EVENT = 2 };
typedef void (*uv_poll_callback)(void *handle, int status, int events);
extern const char *uv_handle_type_name(int type);
extern size_t uv_handle_size(int type);
extern void *uv_handle_get_data(const void *handle);
extern void uv_handle_set_data(void *handle, void *data);
extern int uv_poll_init(struct uv_loop_s *loop, void *handle, int fd);
extern int uv_poll_start(void *handle, int events, uv_poll_callback callback);
extern void uv_close(void *handle, void (*callback)(void *handle));
extern void uv_ref(void *handle);
extern void uv_unref(void *handle);

/* ---- calls from JavaScript ---- */

struct named_function {
  const char *name;
  function call;
};

enum { MAX_ARGS = 7 };

static napi_value dispatch(napi_env env, napi_callback_info info) {
  napi_value args[MAX_ARGS];
  size_t count = MAX_ARGS;
  void *named;
  napi_get_cb_info(env, info, &count, args, NULL, &named);
  return ((const struct named_function *)named)->call(env, args);
}

/* ---- memory ---- */

/* memfdCreate(name, flags): descriptor */
static napi_value memfd_create_(napi_env env, const napi_value *args) {
  char name[250]; /* the kernel takes 249 bytes */
  int problem = to_string(env, args[0], name, sizeof name);
  if (problem != 0) return from_long(env, problem);
  return from_result(env, memfd_create(name, (unsigned)to_long(env, args[1])));
}

/* ftruncate(fd, size): 0 */
static napi_value ftruncate_(napi_env env, const napi_value *args) {
  return from_result(env, ftruncate(to_int(env, args[0]), to_long(env, args[1])));
}

/* fcntl(fd, command, number): what the command returns */
static napi_value fcntl_(napi_env env, const napi_value *args) {
  return from_result(env, fcntl(to_int(env, args[0]), to_int(env, args[1]), to_int(env, args[2])));
}

/* A mapping is the memory of one ArrayBuffer, and hangs on it by napi_wrap until munmap or the finalizer. */
struct mapping {
  void *address;
  size_t span;
  bool mapped;
  int guard; /* its number in guard.c; -1 when it is not guarded */
};

static const napi_type_tag mapping_tag = {0x76697274696f2d64, 0x7269766572206d6d};

/* Runs once per mapping when its ArrayBuffer's memory is let go: collected, detached, or the environment ends. */
static void on_mapping_freed(napi_env env, void *data, void *hint) {
  (void)env, (void)data;
  struct mapping *mapping = hint;
  if (mapping->mapped) {
    if (mapping->guard >= 0) unguard(mapping->guard);
    munmap(mapping->address, mapping->span);
  }
  free(mapping);
}

/*
 * Map at a multiple of `align`. A reservation finds the place; it is given back and the place taken with
 * MAP_FIXED_NOREPLACE, which fails when another thread came in between. (MAP_FIXED over the reservation would leave
 * a hole when it fails half-way, and clearing up that hole could unmap what another thread put there.)
 */
static void *map_aligned(size_t span, size_t align, int protection, int fd, int64_t offset) {
  if (align <= (size_t)sysconf(_SC_PAGESIZE)) return mmap(NULL, span, protection, MAP_SHARED, fd, offset);
  for (int attempt = 0; attempt < 16; attempt++) {
    void *reserved = mmap(NULL, span + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) return MAP_FAILED;
    void *wanted = (void *)(((uintptr_t)reserved + align - 1) & ~(uintptr_t)(align - 1));
    munmap(reserved, span + align);
    void *address = mmap(wanted, span, protection, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, offset);
    if (address == wanted) return address;
    if (address == MAP_FAILED && errno != EEXIST) return MAP_FAILED;
    if (address != MAP_FAILED) munmap(address, span); /* Linux before 4.17 takes the place as a hint only */
  }
  errno = EAGAIN;
  return MAP_FAILED;
}

/*
 * mmap(fd, length, span, offset, align, writable, granule): ArrayBuffer of `length` bytes; `span` >= length is what is
 * mapped. With a `granule` above 0, the size of its pages, it is guarded against the loss of its memory (see guard.c).
 */
static napi_value mmap_(napi_env env, const napi_value *args) {
  napi_value buffer;
  int64_t length = to_long(env, args[1]), span = to_long(env, args[2]), align = to_long(env, args[4]);
  int64_t granule = to_long(env, args[6]);
  bool writable = false;
  napi_get_value_bool(env, args[5], &writable);
  if (length <= 0 || span < length || align <= 0 || (align & (align - 1)) != 0) return from_long(env, -EINVAL);
  /* What is lost is replaced from the start of a page on, which must not lie before the mapping. */
  if (granule > align || (granule > 0 && (granule & (granule - 1)) != 0)) return from_long(env, -EINVAL);

  struct mapping *mapping = malloc(sizeof *mapping);
  if (mapping == NULL) return from_long(env, -ENOMEM);
  mapping->span = (size_t)span;
  mapping->address = map_aligned((size_t)span, (size_t)align, writable ? PROT_READ | PROT_WRITE : PROT_READ,
                                 to_int(env, args[0]), to_long(env, args[3]));
  mapping->mapped = mapping->address != MAP_FAILED;
  if (!mapping->mapped) {
    int problem = errno;
    free(mapping);
    return from_long(env, -problem);
  }
  mapping->guard = granule > 0 ? guard(mapping->address, mapping->span, (size_t)granule) : -1;
  if (granule > 0 && mapping->guard < 0) {
    int problem = mapping->guard;
    on_mapping_freed(env, NULL, mapping);
    return from_long(env, problem);
  }
  napi_status status =
      napi_create_external_arraybuffer(env, mapping->address, (size_t)length, on_mapping_freed, mapping, &buffer);
  if (status == napi_no_external_buffers_allowed) { /* a runtime that has only memory of its own, as Electron */
    on_mapping_freed(env, NULL, mapping);
    return from_long(env, -ENOTSUP);
  }
  /* In any other failure, as of a thread that is being terminated, Node.js runs the finalizer itself. */
  if (status != napi_ok) return from_long(env, -ENOMEM);
  if (napi_type_tag_object(env, buffer, &mapping_tag) != napi_ok ||
      napi_wrap(env, buffer, mapping, NULL, NULL, NULL) != napi_ok) {
    return from_long(env, -ENOMEM); /* unmapped when the ArrayBuffer is collected */
  }
  return buffer;
}

/* munmap(buffer): 0; -EINVAL when it is not a mapping, or not one any more */
static napi_value munmap_(napi_env env, const napi_value *args) {
  struct mapping *mapping;
  bool ours = false, detached = true;
  if (napi_check_object_type_tag(env, args[0], &mapping_tag, &ours) != napi_ok || !ours ||
      napi_is_detached_arraybuffer(env, args[0], &detached) != napi_ok || detached ||
      napi_unwrap(env, args[0], (void **)&mapping) != napi_ok) {
    return from_long(env, -EINVAL);
  }
  /* Detaching may free the mapping's record, so it keeps nothing that is needed afterwards. */
  void *address = mapping->address;
  size_t span = mapping->span;
  int number = mapping->guard;
  napi_remove_wrap(env, args[0], NULL);
  mapping->mapped = false;
  if (napi_detach_arraybuffer(env, args[0]) != napi_ok) {
    mapping->mapped = true;
    napi_wrap(env, args[0], mapping, NULL, NULL, NULL);
    return from_long(env, -EBUSY);
  }
  if (number >= 0) unguard(number);
  return from_result(env, munmap(address, span));
}

/* isLost(buffer): whether a part of a guarded mapping was replaced */
static napi_value is_lost_(napi_env env, const napi_value *args) {
  struct mapping *mapping;
  bool ours = false;
  if (napi_check_object_type_tag(env, args[0], &mapping_tag, &ours) != napi_ok || !ours ||
      napi_unwrap(env, args[0], (void **)&mapping) != napi_ok) {
    return from_long(env, -EINVAL);
  }
  return from_long(env, mapping->guard >= 0 && is_lost(mapping->guard));
}

/* ---- event descriptors ---- */

/* eventfd(): descriptor */
static napi_value eventfd_(napi_env env, const napi_value *args) {
  (void)args;
  return from_result(env, eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
}

/*
 * signal(fd): undefined, or -errno. The hot path: called without dispatch, one conversion, one write, and no result
 * object when it worked.
 * EAGAIN means that the counter is full, so the other side has a signal to see already.
 */
static napi_value signal_(napi_env env, napi_callback_info info) {
  static const uint64_t one = 1;
  napi_value fd;
  size_t count = 1;
  int32_t number = -1;
  ssize_t result;
  napi_get_cb_info(env, info, &count, &fd, NULL, NULL);
  napi_get_value_int32(env, fd, &number);
  do result = write(number, &one, sizeof one);
  while (result == -1 && errno == EINTR);
  return result != -1 || errno == EAGAIN ? NULL : from_long(env, -errno);
}

/*
 * Read the 8 bytes of an eventfd without waiting, whoever else holds it. O_NONBLOCK is a flag of the open file, which
 * a peer that got the descriptor shares and can clear; and asking poll() first leaves a gap in which the peer can
 * take the value away and make the read wait for ever. RWF_NOWAIT is a flag of this one read, out of the peer's
 * reach, and costs no second system call. Kernels that know it but not for eventfds (before 5.8) say EOPNOTSUPP:
 * there the flag is set again and poll() asked right before the read, which leaves the gap but makes it small.
 */
static ssize_t drain(int fd) {
  uint64_t value;
  struct iovec into = {&value, sizeof value};
  ssize_t result;
  do result = syscall(SYS_preadv2, fd, &into, 1, -1L, -1L, RWF_NOWAIT);
  while (result == -1 && errno == EINTR);
  if (result != -1 || (errno != EOPNOTSUPP && errno != ENOSYS)) return result;
  struct pollfd ready = {.fd = fd, .events = POLLIN};
  int flags = fcntl(fd, F_GETFL);
  if (flags == -1 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) == -1 || poll(&ready, 1, 0) == -1) return -1;
  if (ready.revents & POLLIN) return read(fd, &value, sizeof value);
  errno = EAGAIN;
  return -1;
}

/* drain(fd): bytes read, or -errno */
static napi_value drain_(napi_env env, const napi_value *args) {
  return from_result(env, drain(to_int(env, args[0])));
}

/* ---- watchers ---- */

/*
 * A watcher polls a duplicate of the descriptor, so that libuv never sees a descriptor closed under its hands (it
 * aborts the process then) nor one watched twice (it refuses). The record lives until both its owners, the JS handle
 * and libuv, have let go.
 */
struct watcher {
  napi_env env;
  void *poll;
  int fd;
  int owners;
  int events;
  bool drains;
  bool closing;
  napi_ref callback;
  napi_async_context context;
  napi_async_cleanup_hook_handle hook;
};

static void release_watcher(struct watcher *watcher) {
  if (--watcher->owners > 0) return;
  free(watcher->poll);
  free(watcher);
}

static void on_handle_collected(napi_env env, void *data, void *hint) {
  (void)env, (void)hint;
  release_watcher(data);
}

static void on_closed(void *poll) {
  struct watcher *watcher = uv_handle_get_data(poll);
  if (watcher->hook != NULL) napi_remove_async_cleanup_hook(watcher->hook);
  release_watcher(watcher);
}

static void close_watcher(struct watcher *watcher) {
  if (watcher->closing) return;
  watcher->closing = true;
  uv_close(watcher->poll, on_closed); /* takes the descriptor out of epoll at once, so that it can be closed */
  close(watcher->fd);
  if (watcher->callback != NULL) napi_delete_reference(watcher->env, watcher->callback);
  if (watcher->context != NULL) napi_async_destroy(watcher->env, watcher->context);
}

static void on_environment_end(napi_async_cleanup_hook_handle hook, void *data) {
  (void)hook;
  close_watcher(data);
}

static void on_ready(void *poll, int status, int events) {
  (void)events;
  struct watcher *watcher = uv_handle_get_data(poll);
  napi_env env = watcher->env;
  napi_handle_scope scope;
  napi_value callback, receiver, error;

  if (watcher->drains) drain(watcher->fd);
  if (napi_open_handle_scope(env, &scope) != napi_ok) return;
  if (napi_get_reference_value(env, watcher->callback, &callback) == napi_ok &&
      napi_get_global(env, &receiver) == napi_ok &&
      napi_make_callback(env, watcher->context, receiver, callback, 0, NULL, NULL) == napi_pending_exception &&
      napi_get_and_clear_last_exception(env, &error) == napi_ok) {
    napi_fatal_exception(env, error); /* refused, harmlessly, when the environment is being terminated */
  }
  napi_close_handle_scope(env, scope);
  /* libuv stops a watch that met POLLERR; go on, so that the watch stays level-triggered until it is closed. */
  if (status < 0 && !watcher->closing) uv_poll_start(poll, watcher->events, on_ready);
}

/* watch(fd, drains, writable, callback): handle, or -errno */
static napi_value watch_(napi_env env, const napi_value *args) {
  napi_value handle = NULL, name;
  struct uv_loop_s *loop;
  if (napi_get_uv_event_loop(env, &loop) != napi_ok) return from_long(env, -ENOTSUP);
  int fd = fcntl(to_int(env, args[0]), F_DUPFD_CLOEXEC, 0);
  if (fd == -1) return from_result(env, fd);

  struct watcher *watcher = calloc(1, sizeof *watcher);
  void *poll = calloc(1, uv_handle_size(UV_POLL_TYPE));
  int problem = watcher == NULL || poll == NULL ? -ENOMEM : uv_poll_init(loop, poll, fd);
  if (problem != 0) {
    free(poll);
    free(watcher);
    close(fd);
    return from_long(env, problem);
  }
  uv_handle_set_data(poll, watcher);
  watcher->env = env;
  watcher->poll = poll;
  watcher->fd = fd;
  watcher->owners = 1;
  bool writable = false;
  napi_get_value_bool(env, args[1], &watcher->drains);
  napi_get_value_bool(env, args[2], &writable);
  watcher->events = writable ? UV_WRITABLE_EVENT : UV_READABLE_EVENT;

  if (napi_create_reference(env, args[3], 1, &watcher->callback) != napi_ok ||
      napi_create_string_utf8(env, "VirtioFdWatcher", NAPI_AUTO_LENGTH, &name) != napi_ok ||
      napi_async_init(env, NULL, name, &watcher->context) != napi_ok ||
      napi_add_async_cleanup_hook(env, on_environment_end, watcher, &watcher->hook) != napi_ok ||
      uv_poll_start(poll, watcher->events, on_ready) != 0 ||
      napi_create_external(env, watcher, on_handle_collected, NULL, &handle) != napi_ok) {
    close_watcher(watcher);
    return from_long(env, -EINVAL);
  }
  watcher->owners = 2;
  return handle;
}

static struct watcher *to_watcher(napi_env env, napi_value value) {
  void *watcher = NULL;
  return napi_get_value_external(env, value, &watcher) == napi_ok ? watcher : NULL;
}

/* watchRef(handle, keeps): whether the watch keeps the process alive */
static napi_value watch_ref_(napi_env env, const napi_value *args) {
  struct watcher *watcher = to_watcher(env, args[0]);
  bool keeps = true;
  napi_get_value_bool(env, args[1], &keeps);
  if (watcher != NULL && !watcher->closing) (keeps ? uv_ref : uv_unref)(watcher->poll);
  return NULL;
}

/* watchClose(handle): no callback comes after this */
static napi_value watch_close_(napi_env env, const napi_value *args) {
  struct watcher *watcher = to_watcher(env, args[0]);
  if (watcher != NULL) close_watcher(watcher);
  return NULL;
}

/* ---- Unix sockets ---- */

/* A socket and the address of `path`; the socket, or -errno. */
static int unix_socket(napi_env env, napi_value path, struct sockaddr_un *address) {
  memset(address, 0, sizeof *address);
  address->sun_family = AF_UNIX;
  int problem = to_string(env, path, address->sun_path, sizeof address->sun_path);
  if (problem != 0) return problem;
  int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  return fd == -1 ? -errno : fd;
}

static napi_value close_after(napi_env env, int fd, int problem) {
  close(fd);
  return from_long(env, -problem);
}

/* connect(path): descriptor. A Unix socket connects at once or not at all; a full backlog is -EAGAIN. */
static napi_value connect_(napi_env env, const napi_value *args) {
  struct sockaddr_un address;
  int fd = unix_socket(env, args[0], &address), result;
  if (fd < 0) return from_long(env, fd);
  do result = connect(fd, (struct sockaddr *)&address, sizeof address);
  while (result == -1 && errno == EINTR);
  return result == -1 ? close_after(env, fd, errno) : from_long(env, fd);
}

/* listen(path, backlog): descriptor */
static napi_value listen_(napi_env env, const napi_value *args) {
  struct sockaddr_un address;
  int fd = unix_socket(env, args[0], &address);
  if (fd < 0) return from_long(env, fd);
  if (bind(fd, (struct sockaddr *)&address, sizeof address) == -1 || listen(fd, to_int(env, args[1])) == -1) {
    return close_after(env, fd, errno);
  }
  return from_long(env, fd);
}

/* accept(fd): descriptor; -EAGAIN when nobody waits */
static napi_value accept_(napi_env env, const napi_value *args) {
  int fd = to_int(env, args[0]), result;
  do result = accept4(fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
  while (result == -1 && errno == EINTR);
  return from_result(env, result);
}

/* socketpair(into: Int32Array): 0 */
static napi_value socketpair_(napi_env env, const napi_value *args) {
  void *into;
  size_t count;
  if (!to_bytes(env, args[0], napi_int32_array, &into, &count) || count < 2) return from_long(env, -EINVAL);
  return from_result(env, socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, into));
}

/* sendmsg(fd, bytes, fds: Int32Array, count): bytes sent, maybe fewer than given */
static napi_value sendmsg_(napi_env env, const napi_value *args) {
  void *bytes, *fds;
  size_t length, room;
  int fd = to_int(env, args[0]), count = to_int(env, args[3]);
  if (!to_bytes(env, args[1], napi_uint8_array, &bytes, &length) ||
      !to_bytes(env, args[2], napi_int32_array, &fds, &room) || count < 0 || count > MAX_SENT_FDS ||
      (size_t)count > room) {
    return from_long(env, -EINVAL);
  }
  struct iovec part = {bytes, length};
  struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
  union {
    struct cmsghdr header;
    char bytes[CMSG_SPACE(MAX_SENT_FDS * sizeof(int))];
  } control;
  if (count > 0) {
    memset(&control, 0, sizeof control);
    message.msg_control = &control;
    message.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
    control.header.cmsg_level = SOL_SOCKET;
    control.header.cmsg_type = SCM_RIGHTS;
    control.header.cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
    memcpy(CMSG_DATA(&control.header), fds, (size_t)count * sizeof(int));
  }
  ssize_t result;
  do result = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
  while (result == -1 && errno == EINTR);
  return from_result(env, result);
}

/*
 * recvmsg(fd, into, fds: Int32Array): bytes; fds[0] becomes the number of descriptors, fds[1…] they themselves. When
 * control data was cut off (more than MAX_FDS descriptors, or this process may open no more), those that did arrive
 * are closed and the result is -EPROTO, which the kernel never returns here.
 */
static napi_value recvmsg_(napi_env env, const napi_value *args) {
  void *bytes, *data;
  size_t length, room;
  int fd = to_int(env, args[0]);
  if (!to_bytes(env, args[1], napi_uint8_array, &bytes, &length) ||
      !to_bytes(env, args[2], napi_int32_array, &data, &room) || room < MAX_FDS + 1) {
    return from_long(env, -EINVAL);
  }
  int32_t *fds = data, count = 0;
  struct iovec part = {bytes, length};
  union {
    struct cmsghdr header;
    char bytes[CMSG_SPACE(MAX_FDS * sizeof(int))];
  } control;
  struct msghdr message = {
      .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
  ssize_t result;
  do result = recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  while (result == -1 && errno == EINTR);
  fds[0] = 0;
  if (result == -1) return from_result(env, result);
  for (struct cmsghdr *item = CMSG_FIRSTHDR(&message); item != NULL; item = CMSG_NXTHDR(&message, item)) {
    if (item->cmsg_level != SOL_SOCKET || item->cmsg_type != SCM_RIGHTS) continue;
    int32_t arrived = (int32_t)((item->cmsg_len - CMSG_LEN(0)) / sizeof(int));
    memcpy(fds + 1 + count, CMSG_DATA(item), (size_t)arrived * sizeof(int)); /* control has room for MAX_FDS only */
    count += arrived;
  }
  if (message.msg_flags & MSG_CTRUNC) {
    for (int32_t i = 1; i <= count; i++) close(fds[i]);
    return from_long(env, -EPROTO);
  }
  fds[0] = count;
  return from_long(env, result);
}

/* ---- the rest ---- */

/* close(fd): 0. After EINTR the descriptor is closed on Linux, and its number may belong to another thread already. */
static napi_value close_(napi_env env, const napi_value *args) {
  int result = close(to_int(env, args[0]));
  return result == -1 && errno == EINTR ? from_long(env, 0) : from_result(env, result);
}

/* ioctl(fd, request, argument: number | Uint8Array): what the request returns */
static napi_value ioctl_(napi_env env, const napi_value *args) {
  int fd = to_int(env, args[0]), result;
  unsigned long request = (unsigned long)to_long(env, args[1]);
  void *bytes;
  size_t length;
  if (!to_bytes(env, args[2], napi_uint8_array, &bytes, &length)) bytes = (void *)(intptr_t)to_long(env, args[2]);
  do result = ioctl(fd, request, bytes);
  while (result == -1 && errno == EINTR);
  return from_result(env, result);
}

static const struct named_function functions[] = {
    {"memfdCreate", memfd_create_}, {"ftruncate", ftruncate_}, {"fcntl", fcntl_}, {"fallocate", fallocate_},
    {"mmap", mmap_}, {"munmap", munmap_}, {"isLost", is_lost_}, {"faultCounter", fault_counter_}, {"eventfd", eventfd_}, {"drain", drain_}, {"watch", watch_},
    {"watchRef", watch_ref_}, {"watchClose", watch_close_}, {"connect", connect_}, {"listen", listen_},
    {"accept", accept_}, {"socketpair", socketpair_}, {"sendmsg", sendmsg_}, {"recvmsg", recvmsg_}, {"close", close_},
    {"ioctl", ioctl_}, {"preadv", preadv_}, {"pwritev", pwritev_}, {"address", address_},
    {"registerRead", register_read_}, {"registerWrite", register_write_},
    {"jamWatch", jam_watch_}, {"jamEnd", jam_end_},
};

static bool export_function(napi_env env, napi_value exports, const char *name, napi_callback callback,
                            const void *data) {
  napi_value value;
  return napi_create_function(env, name, NAPI_AUTO_LENGTH, callback, (void *)data, &value) == napi_ok &&
         napi_set_named_property(env, exports, name, value) == napi_ok;
}

NAPI_MODULE_INIT() {
  const char *type = uv_handle_type_name(UV_POLL_TYPE);
  if (type == NULL || strcmp(type, "poll") != 0) {
    napi_throw_error(env, NULL, "libuv numbers its poll handle in a way this build does not know");
    return NULL;
  }
  if (!export_function(env, exports, "signal", signal_, NULL)) return NULL;
  for (size_t i = 0; i < sizeof functions / sizeof functions[0]; i++) {
    if (!export_function(env, exports, functions[i].name, dispatch, &functions[i])) return NULL;
  }
  return exports;
}
