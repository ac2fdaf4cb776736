/*
 * Mappings whose file another process can shrink. Touching a page that is gone is SIGBUS, which kills the process; for
 * memory that a front-end shares, the other process would decide about our life. So the handler here puts anonymous
 * memory, all zero, in the place of the rest of such a mapping, and the access goes on; a count tells JavaScript, which
 * then ends the connection before anything of it is believed.
 *
 * The handler makes system calls only, and touches nothing but the table below. Faults elsewhere, and SIGBUS sent by
 * somebody, are for whoever was there before: another handler (a sanitizer's, libuv's), or the end of the process.
 */
#define _GNU_SOURCE
#include "addon.h"

#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MAX_GUARDED = 4096 };

/*
 * A guarded mapping; `start` is 0 where there is none. `lost` is set when a part of it was replaced. `version` is odd while
 * the rest changes: a handler that met the end of one mapping and the start of the next would replace what lies between.
 */
struct guarded {
  uintptr_t start, end, granule;
  uint32_t lost, version;
};

static struct guarded table[MAX_GUARDED];
static int32_t used; /* entries from here on were never taken */
static uint32_t faults;
static struct sigaction before;
static int installed; /* 0 no, 1 being installed, 2 yes */

static void pass_on(int signal, siginfo_t *info, void *context) {
  if ((before.sa_flags & SA_SIGINFO) != 0 && before.sa_sigaction != NULL) {
    before.sa_sigaction(signal, info, context);
  } else if (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN) {
    /* As without us: the access fails again, now for good; a signal that was sent is sent again. */
    struct sigaction plain = {.sa_handler = SIG_DFL};
    if (info->si_code <= 0 && before.sa_handler == SIG_IGN) return;
    sigaction(signal, &plain, NULL);
    if (info->si_code <= 0) raise(signal);
  } else {
    before.sa_handler(signal);
  }
}

/* Copy an entry; false when it is being changed, which the mapping that is accessed is not. */
static bool copy_entry(int32_t i, struct guarded *copy) {
  uint32_t version = __atomic_load_n(&table[i].version, __ATOMIC_SEQ_CST);
  copy->start = __atomic_load_n(&table[i].start, __ATOMIC_SEQ_CST);
  copy->end = __atomic_load_n(&table[i].end, __ATOMIC_SEQ_CST);
  copy->granule = __atomic_load_n(&table[i].granule, __ATOMIC_SEQ_CST);
  return version % 2 == 0 && version == __atomic_load_n(&table[i].version, __ATOMIC_SEQ_CST);
}

static void on_fault(int signal, siginfo_t *info, void *context) {
  int saved = errno;
  uintptr_t at = (uintptr_t)info->si_addr;
  int32_t count = __atomic_load_n(&used, __ATOMIC_ACQUIRE);
  for (int32_t i = 0; info->si_code > 0 && i < count; i++) {
    struct guarded entry;
    if (!copy_entry(i, &entry) || at < entry.start || at >= entry.end) continue;
    uintptr_t from = at & ~(entry.granule - 1), end = entry.end;
    long address = syscall(SYS_mmap, from, end - from, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0L);
    if (address != (long)from) break;
    __atomic_store_n(&table[i].lost, 1, __ATOMIC_RELAXED);
    __atomic_add_fetch(&faults, 1, __ATOMIC_RELEASE);
    errno = saved;
    return;
  }
  errno = saved;
  pass_on(signal, info, context);
}

/* Once in the life of the process, whichever thread is first. */
static int install(void) {
  int state = 0;
  while (!__atomic_compare_exchange_n(&installed, &state, 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
    if (state == 2) return 0;
    state = 0;
  }
  struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK};
  sigemptyset(&action.sa_mask);
  int result = sigaction(SIGBUS, &action, &before);
  __atomic_store_n(&installed, result == 0 ? 2 : 0, __ATOMIC_RELEASE);
  return result;
}

/* Change an entry that this thread has taken. */
static void change(int32_t i, uintptr_t end, size_t granule) {
  __atomic_add_fetch(&table[i].version, 1, __ATOMIC_SEQ_CST);
  __atomic_store_n(&table[i].granule, granule, __ATOMIC_SEQ_CST);
  __atomic_store_n(&table[i].lost, 0, __ATOMIC_SEQ_CST);
  __atomic_store_n(&table[i].end, end, __ATOMIC_SEQ_CST);
  __atomic_add_fetch(&table[i].version, 1, __ATOMIC_SEQ_CST);
}

/* Guard a range, whose pages have `granule` bytes; its number, or -errno. */
int guard(void *start, size_t span, size_t granule) {
  if (install() == -1) return -errno;
  for (int32_t i = 0; i < MAX_GUARDED; i++) {
    uintptr_t free_start = 0;
    if (!__atomic_compare_exchange_n(&table[i].start, &free_start, (uintptr_t)start, 0, __ATOMIC_ACQ_REL,
                                     __ATOMIC_ACQUIRE)) {
      continue;
    }
    change(i, (uintptr_t)start + span, granule);
    int32_t seen = __atomic_load_n(&used, __ATOMIC_ACQUIRE);
    while (seen <= i && !__atomic_compare_exchange_n(&used, &seen, i + 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
    }
    return i;
  }
  return -ENOSPC;
}

/* Guard a range no more, before it is unmapped. */
void unguard(int number) {
  change(number, 0, 1);
  __atomic_store_n(&table[number].start, 0, __ATOMIC_RELEASE);
}

/* Whether a part of a guarded range was replaced. */
bool is_lost(int number) { return __atomic_load_n(&table[number].lost, __ATOMIC_RELAXED) != 0; }

/*
 * faultCounter(): 4 bytes, how many times a mapping lost its memory. Looking there costs a load, so it can be done
 * before every answer to a front-end. The memory is static: nothing is to be freed with the ArrayBuffer.
 */
napi_value fault_counter_(napi_env env, const napi_value *args) {
  (void)args;
  napi_value buffer;
  if (napi_create_external_arraybuffer(env, &faults, sizeof faults, NULL, NULL, &buffer) != napi_ok) {
    return from_long(env, -ENOTSUP);
  }
  return buffer;
}
