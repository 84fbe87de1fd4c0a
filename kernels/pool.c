/* The threads of the kernels.
 *
 * A caller opens a job with a number of seats. Workers take seats, and everyone who has one runs
 * indices from a shared counter until it is used up. Then the caller closes the job and waits for
 * those who took a seat: a worker that the system has not let run by then is not waited for.
 *
 * Idle workers watch for a job for a while, then sleep, so that they leave the processors to other
 * threads. To wake one takes about as long as a small product, so a worker watches for up to LONG
 * on an idle machine; where it was late to wake, or was interrupted while it watched, for SHORT. OpenMP is not used: the threads of its pool and of torch's may be two sets
 * that spin against each other.
 */
#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

/* Nanoseconds. On a busy machine watching takes the processor from others: milliseconds of 28
 * products of one row and the operations of torch between them, two threads on two processors with
 * six other processes, fastest quarter and median, by rounds of watching (500 are about SHORT): 500
 * 3.5 and 5.1, 10,000 3.5 and 6.8, 50,000 3.5 and 7.9. */
#define SHORT 5000
#define LONG 100000
/* A worker that wakes or goes on later than this is on a busy machine. */
#define LATE 150000
#define ROUNDS 32 /* between looks at the clock */
#define LINE 64
#define MOST_WORKERS 1024
#define SEAT (1u << 16) /* `seats` holds free seats times SEAT, plus the seats in use */
#define STACK_BYTES (1 << 20)

static struct {
    _Alignas(LINE) _Atomic unsigned seats;
    _Alignas(LINE) _Atomic ptrdiff_t next;
    _Alignas(LINE) void (*task)(void *, ptrdiff_t);
    void *context;
    ptrdiff_t count;
    int workers;
    _Alignas(LINE) _Atomic int sleeping; /* workers, and the caller */
    _Atomic int64_t woken;               /* when sleepers were last woken */
    pthread_mutex_t owner, sleep;
    pthread_cond_t opened, finished;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER,
          .sleep = PTHREAD_MUTEX_INITIALIZER,
          .opened = PTHREAD_COND_INITIALIZER,
          .finished = PTHREAD_COND_INITIALIZER};

static int has_free(unsigned seats) { return seats >= SEAT; }
static int is_empty(unsigned seats) { return seats == 0; }

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Watch the seats for up to `limit`; return whether they are as wanted. */
static int watch(int (*wanted)(unsigned), int64_t *limit) {
    const int64_t begin = now();
    for (int64_t before = begin, time; before - begin < *limit; before = time) {
        for (int round = 0; round < ROUNDS; round++) {
            if (wanted(atomic_load_explicit(&pool.seats, memory_order_acquire))) return 1;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            __asm__ volatile("isb");
#endif
        }
        time = now();
        if (time - before > LATE) *limit = SHORT;
    }
    return 0;
}

/* Wait until the seats are as wanted: watch them, then sleep on a condition. */
static void await(int (*wanted)(unsigned), pthread_cond_t *condition) {
    static _Thread_local int64_t limit = SHORT;
    if (watch(wanted, &limit)) return;
    pthread_mutex_lock(&pool.sleep);
    /* Before the seats are read again: `wake` reads in the other order. */
    atomic_fetch_add(&pool.sleeping, 1);
    int slept = 0;
    for (; !wanted(atomic_load(&pool.seats)); slept = 1) pthread_cond_wait(condition, &pool.sleep);
    atomic_fetch_sub(&pool.sleeping, 1);
    pthread_mutex_unlock(&pool.sleep);
    if (!slept) return;
    const int is_late = now() - atomic_load(&pool.woken) > LATE;
    limit = is_late ? SHORT : 2 * limit < LONG ? 2 * limit : LONG;
}

/* Wake those who sleep on a condition; called after the seats were changed. */
static void wake(pthread_cond_t *condition) {
    if (atomic_load(&pool.sleeping) == 0) return;
    atomic_store(&pool.woken, now());
    pthread_mutex_lock(&pool.sleep);
    pthread_cond_broadcast(condition);
    pthread_mutex_unlock(&pool.sleep);
}

static void run_indices(void) {
    ptrdiff_t index;
    while ((index = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed)) < pool.count)
        pool.task(pool.context, index);
}

static void *work(void *unused) {
    for (;;) {
        await(has_free, &pool.opened);
        unsigned seats = atomic_load(&pool.seats);
        /* Take a seat. A job that replaced the one seen is as good: its fields are read after. */
        while (has_free(seats) &&
               !atomic_compare_exchange_weak(&pool.seats, &seats, seats - SEAT + 1)) {}
        if (!has_free(seats)) continue;
        run_indices();
        if (is_empty(atomic_fetch_sub(&pool.seats, 1) - 1)) wake(&pool.finished);
    }
    return unused;
}

/* Start workers until there are `wanted`, or as many as the system allows. */
static void start_workers(int wanted) {
    pthread_attr_t attributes;
    if (pool.workers >= wanted || pthread_attr_init(&attributes)) return;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    /* Signals are for the threads of the program, except those that a fault of a worker raises: a
     * handler that prints where must hear them. */
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS};
    sigset_t blocked, before;
    sigfillset(&blocked);
    for (unsigned i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(&blocked, faults[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    pthread_t thread;
    while (pool.workers < wanted && !pthread_create(&thread, &attributes, work, 0)) pool.workers++;
    pthread_sigmask(SIG_SETMASK, &before, 0);
    pthread_attr_destroy(&attributes);
}

/* In a process made by fork: the workers and the users of the pool are not there. */
static void forget_workers(void) {
    pthread_mutex_init(&pool.owner, 0);
    pthread_mutex_init(&pool.sleep, 0);
    pthread_cond_init(&pool.opened, 0);
    pthread_cond_init(&pool.finished, 0);
    pool.seats = pool.sleeping = pool.workers = 0;
}

static void watch_forks(void) { pthread_atfork(0, 0, forget_workers); }

void pool_run(void (*task)(void *context, ptrdiff_t index), void *context, ptrdiff_t count,
              int threads) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    if (threads > count) threads = (int)count;
    if (threads > MOST_WORKERS) threads = MOST_WORKERS;
    if (threads > 1) pthread_once(&once, watch_forks);
    if (threads <= 1 || pthread_mutex_trylock(&pool.owner)) {
        for (ptrdiff_t index = 0; index < count; index++) task(context, index);
        return;
    }
    start_workers(threads - 1);
    pool.task = task;
    pool.context = context;
    pool.count = count;
    atomic_store(&pool.next, 0);
    atomic_store(&pool.seats, (threads - 1) * SEAT);
    wake(&pool.opened);
    run_indices();
    /* Close: the free seats go, those in use stay. */
    atomic_fetch_and(&pool.seats, SEAT - 1);
    await(is_empty, &pool.finished);
    pthread_mutex_unlock(&pool.owner);
}
