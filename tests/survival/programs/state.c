/* Everything that a thread has beside its memory, checked against itself in a loop; says OK or what is wrong. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

static volatile sig_atomic_t alarms, users, on_stack, bad;
static volatile int vectors_checked, slept, polled;
static char stack[65536];

#define FAIL(...) do { printf("BAD " __VA_ARGS__); printf("\n"); fflush(stdout); bad = 1; } while (0)

static void on_alarm(int number) { (void)number; alarms++; }

static void on_user(int number, siginfo_t *info, void *context)
{
    char here;
    (void)number; (void)context;
    users++;
    on_stack = &here >= stack && &here < stack + sizeof stack;
    if (info->si_value.sival_int != 4711)
        bad = 2;
}

static void *vector_loop(void *unused)
{
    (void)unused;
    prctl(PR_SET_NAME, "vectors \\n");
    volatile double base = 1.25;
    for (;;) {
        __m256d a = _mm256_set_pd(base, base + 1, base + 2, base + 3);
        __m256d b = a;
        double x87 = 1.0;
        for (int i = 0; i < 20000000; i++) {
            /* The registers live across the stop: nothing of this loop goes to memory. */
            __asm__ volatile("vaddpd %1, %0, %0\n\tvsubpd %1, %0, %0" : "+x"(b) : "x"(a));
            __asm__ volatile("fldl %0\n\tfstpl %0" : "+m"(x87));
        }
        double out[4];
        _mm256_storeu_pd(out, b);
        for (int i = 0; i < 4; i++)
            if (out[i] != base + 3 - i)
                FAIL("vector register %d is %f", i, out[i]);
        if (x87 != 1.0)
            FAIL("x87 %f", x87);
        vectors_checked++;
    }
    return 0;
}

static void *sleep_loop(void *unused)
{
    (void)unused;
    for (;;) {
        struct timespec t = {0, 30000000}, rest = t, a, b;
        clock_gettime(CLOCK_MONOTONIC, &a);
        if (nanosleep(&t, &rest))
            FAIL("nanosleep: %s", strerror(errno));
        clock_gettime(CLOCK_MONOTONIC, &b);
        double took = (b.tv_sec - a.tv_sec) + (b.tv_nsec - a.tv_nsec) / 1e9;
        if (took < 0.0299)
            FAIL("slept only %f", took);
        slept++;
    }
    return 0;
}

static void *epoll_loop(void *unused)
{
    (void)unused;
    int epoll = epoll_create1(0);
    for (;;) {
        struct epoll_event event;
        int n = epoll_wait(epoll, &event, 1, 40);
        if (n)
            FAIL("epoll_wait gave %d: %s", n, n < 0 ? strerror(errno) : "");
        polled++;
    }
    return 0;
}

static void *churn_loop(void *unused)
{
    (void)unused;
    for (unsigned round = 0;; round++) {
        size_t size = 4096 * (1 + round % 64);
        unsigned char *m = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memset(m, round & 255, size);
        if (round % 3 == 0)
            mprotect(m, size, PROT_READ);
        usleep(1000);
        for (size_t i = 0; i < size; i += 511)
            if (m[i] != (round & 255)) {
                FAIL("mapped page changed: round %u offset %zu is %d", round, i, m[i]);
                break;
            }
        munmap(m, size);
    }
    return 0;
}

int main(void)
{
    struct sigaction action = {.sa_handler = on_alarm};
    sigaction(SIGALRM, &action, 0);
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_user;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGRTMIN + 3, &action, 0);
    signal(SIGTRAP, SIG_IGN);
    signal(SIGUSR2, SIG_IGN);
    stack_t alternate = {.ss_sp = stack, .ss_size = sizeof stack};
    sigaltstack(&alternate, 0);
    umask(027);
    chdir("/shared");
    prctl(PR_SET_TIMERSLACK, 77777);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    struct rlimit limit = {333, 444};
    setrlimit(RLIMIT_NOFILE, &limit);
    setpriority(PRIO_PROCESS, 0, 5);

    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 3);
    sigaddset(&set, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &set, 0);
    union sigval value = {.sival_int = 4711};
    sigqueue(getpid(), SIGRTMIN + 3, value); /* for the process, twice */
    sigqueue(getpid(), SIGRTMIN + 3, value);
    pthread_kill(pthread_self(), SIGUSR1); /* for this thread */

    struct itimerval timer = {{0, 50000}, {0, 50000}};
    setitimer(ITIMER_REAL, &timer, 0);

    pthread_t thread;
    void *(*loops[])(void *) = {vector_loop, sleep_loop, epoll_loop, churn_loop};
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (unsigned i = 0; i < sizeof loops / sizeof *loops; i++)
        pthread_create(&thread, 0, loops[i], 0);
    pthread_sigmask(SIG_SETMASK, &before, 0);

    char *grown = sbrk(0);
    unsigned char *shared = mmap(0, 65536, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    unsigned char *only_read = mmap(0, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(only_read, 0x5a, 65536);
    mprotect(only_read, 65536, PROT_NONE);
    void *reserve = mmap(0, 1ul << 38, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserve == MAP_FAILED)
        FAIL("no reserve");
    unsigned size = 0;

    for (unsigned round = 0;; round++) {
        /* brk grows all the time, also while it is moved; what was written stays. */
        if (size < 64 << 20) {
            char *more = sbrk(8192);
            if (more != grown + size)
                FAIL("brk is %p, wanted %p", (void *)more, (void *)(grown + size));
            memset(more, 0x33, 8192);
            size += 8192;
        }
        shared[round % 65536] = 0x77;
        struct timespec pause = {0, 10000000};
        while (nanosleep(&pause, &pause) && errno == EINTR) /* by our alarm: rightly */
            ;
        if (sched_getcpu() < 0 || sched_getcpu() >= sysconf(_SC_NPROCESSORS_CONF))
            FAIL("cpu %d", sched_getcpu());
        if (round % 25)
            continue;
        for (unsigned i = 0; i < size; i += 1021)
            if (grown[i] != 0x33) {
                FAIL("heap at %u is %d", i, grown[i]);
                break;
            }
        for (unsigned i = 0; i < round && i < 65536; i++)
            if (shared[i] != 0x77) {
                FAIL("shared at %u", i);
                break;
            }
        stack_t now;
        sigaltstack(0, &now);
        if (now.ss_sp != stack || now.ss_size != sizeof stack)
            FAIL("alternate stack %p", now.ss_sp);
        sigset_t pending, blocked;
        sigpending(&pending);
        pthread_sigmask(SIG_BLOCK, 0, &blocked);
        if (!sigismember(&pending, SIGUSR1) || !sigismember(&pending, SIGRTMIN + 3))
            FAIL("pending signals are gone");
        if (!sigismember(&blocked, SIGUSR1) || sigismember(&blocked, SIGUSR2))
            FAIL("blocked set changed");
        sigaction(SIGTRAP, 0, &action);
        if (action.sa_handler != SIG_IGN)
            FAIL("SIGTRAP is not ignored");
        mode_t mask = umask(027);
        if (mask != 027)
            FAIL("umask %o", mask);
        if (prctl(PR_GET_TIMERSLACK) != 77777)
            FAIL("timer slack %d", prctl(PR_GET_TIMERSLACK));
        int reaper = 0;
        prctl(PR_GET_CHILD_SUBREAPER, &reaper);
        if (!reaper)
            FAIL("no subreaper");
        getrlimit(RLIMIT_NOFILE, &limit);
        if (limit.rlim_cur != 333 || limit.rlim_max != 444)
            FAIL("limit %ld %ld", (long)limit.rlim_cur, (long)limit.rlim_max);
        if (getpriority(PRIO_PROCESS, 0) != 5)
            FAIL("nice %d", getpriority(PRIO_PROCESS, 0));
        char directory[64];
        if (!getcwd(directory, sizeof directory) || strcmp(directory, "/shared"))
            FAIL("directory");
        mprotect(only_read, 65536, PROT_READ);
        for (int i = 0; i < 65536; i++)
            if (only_read[i] != 0x5a) {
                FAIL("protected memory at %d", i);
                break;
            }
        mprotect(only_read, 65536, PROT_NONE);
        printf("%s round %u alarms %d vectors %d slept %d polled %d\n", bad ? "BAD" : "OK", round, alarms,
               vectors_checked, slept, polled);
        fflush(stdout);
        if (access("/shared/deliver", F_OK) == 0) {
            signal(SIGUSR1, SIG_IGN);
            pthread_sigmask(SIG_UNBLOCK, &set, 0);
            printf("%s delivered %d on_stack %d\n", users == 2 && on_stack && !bad ? "OK" : "BAD", users, on_stack);
            fflush(stdout);
            return 0;
        }
    }
}
