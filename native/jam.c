/*
 * Eventfds that a peer makes wait for ever. O_NONBLOCK is a flag of the open file, which whoever was given the descriptor
 * shares and can clear; when it fills the counter as well, the next write waits until somebody reads. There is no write
 * to an eventfd that cannot wait (RWF_NOWAIT is refused, a second open file cannot be had, asking poll() first leaves a
 * gap in which the peer can fill it), and the one way around, a notification by the kernel at the end of some other
 * request (io_uring, aio), costs each signal half as much again or more and is not to be had everywhere.
 *
 * So the write stays as it is, and one thread of the process looks at all counters that are watched, twice a second. One
 * that is full is emptied, which lets go whoever waits, and told: no honest peer ever fills one.
 */
#define _GNU_SOURCE
#include "addon.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifndef RWF_NOWAIT
#define RWF_NOWAIT 8
#endif

enum { INTERVAL_NS = 500000000, SECOND_NS = 1000000000, STACK_BYTES = 65536 };

/*
 * Times that a full counter is emptied at once. Threads of the peer may wait to fill it again; whoever is woken first
 * gets ahead, and that is us sooner or later.
 */
enum { ROUNDS = 1000 };

/* An eventfd that is watched; both are duplicates, closed by nobody else. */
struct jam {
  struct jam *next;
  int event, report;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed;
static struct jam *jams; /* guarded by `lock`, as is all below */
static bool is_running, is_prepared;

static bool is_full(int fd) {
  struct pollfd event = {.fd = fd, .events = POLLOUT};
  return poll(&event, 1, 0) == 0;
}

/* As far as the kernel can do it without waiting: those before 5.8 cannot, and nothing is done there. */
static void empty(int fd) {
  uint64_t value;
  struct iovec into = {&value, sizeof value};
  syscall(SYS_preadv2, fd, &into, 1, -1L, -1L, RWF_NOWAIT);
}

static void relieve(const struct jam *jam) {
  static const uint64_t one = 1;
  if (!is_full(jam->event)) return;
  for (int i = 0; i < ROUNDS && is_full(jam->event); i++) {
    empty(jam->event);
    sched_yield();
  }
  /* Nobody else has this one, so it does not wait; when it is full, it was told before. */
  ssize_t told = write(jam->report, &one, sizeof one);
  (void)told;
}

static void *look(void *nothing) {
  pthread_mutex_lock(&lock);
  while (jams != NULL) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += INTERVAL_NS;
    if (until.tv_nsec >= SECOND_NS) until.tv_sec++, until.tv_nsec -= SECOND_NS;
    pthread_cond_timedwait(&changed, &lock, &until);
    for (const struct jam *jam = jams; jam != NULL; jam = jam->next) relieve(jam);
  }
  is_running = false;
  pthread_mutex_unlock(&lock);
  return nothing;
}

/* Have the thread run; 0 or -errno. Called under the lock. */
static int run(void) {
  if (is_running) return 0;
  if (!is_prepared) {
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&changed, &clock);
    pthread_condattr_destroy(&clock);
    is_prepared = true;
  }
  pthread_t thread;
  pthread_attr_t attributes;
  sigset_t all, before;
  pthread_attr_init(&attributes);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attributes, STACK_BYTES);
  /* Signals of the process are for others to handle. */
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int result = pthread_create(&thread, &attributes, look, NULL);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attributes);
  is_running = result == 0;
  return -result;
}

static void close_both(const struct jam *jam) {
  if (jam->event != -1) close(jam->event);
  if (jam->report != -1) close(jam->report);
}

/* Take a jam out of the list; false when it is not there any more. */
static bool take_out(struct jam *jam) {
  pthread_mutex_lock(&lock);
  struct jam **link = &jams;
  while (*link != NULL && *link != jam) link = &(*link)->next;
  bool found = *link != NULL;
  if (found) *link = jam->next;
  if (jams == NULL && is_prepared) pthread_cond_signal(&changed);
  pthread_mutex_unlock(&lock);
  return found;
}

/* Also when the environment ends. */
static void on_collected(napi_env env, void *data, void *hint) {
  (void)env, (void)hint;
  if (take_out(data)) close_both(data);
  free(data);
}

/* jamWatch(event, report): handle, or -errno. `report` is signalled when the counter of `event` was full. */
napi_value jam_watch_(napi_env env, const napi_value *args) {
  napi_value handle;
  struct jam *jam = calloc(1, sizeof *jam);
  if (jam == NULL) return from_long(env, -ENOMEM);
  jam->event = fcntl(to_int(env, args[0]), F_DUPFD_CLOEXEC, 0);
  jam->report = jam->event == -1 ? -1 : fcntl(to_int(env, args[1]), F_DUPFD_CLOEXEC, 0);
  int result = jam->report == -1 ? -errno : 0;
  if (result == 0) {
    pthread_mutex_lock(&lock);
    result = run();
    if (result == 0) jam->next = jams, jams = jam;
    pthread_mutex_unlock(&lock);
    if (result == 0 && napi_create_external(env, jam, on_collected, NULL, &handle) == napi_ok) return handle;
    if (result == 0) take_out(jam), result = -EINVAL;
  }
  close_both(jam);
  free(jam);
  return from_long(env, result);
}

/* jamEnd(handle): the event is watched no more */
napi_value jam_end_(napi_env env, const napi_value *args) {
  void *jam = NULL;
  if (napi_get_value_external(env, args[0], &jam) == napi_ok && jam != NULL && take_out(jam)) close_both(jam);
  return NULL;
}
