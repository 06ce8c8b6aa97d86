/* 50 threads that wait in many ways, each for a few milliseconds, again and again; what they count and every error
   that reaches them stands in the file argv[1], for each thread: u64 rounds, u64 errors, u64 last errno. */
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/sem.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { THREADS = 50, KINDS = 8 };
struct row { volatile uint64_t rounds, errors, last; };
static struct row *table;
static int shared_semaphore;
static const struct timespec nap = {0, 3000000};

static int once(int kind, int epoll, int semaphore, int ends[2]) {
	struct epoll_event event;
	struct pollfd none = {ends[0], POLLIN, 0};
	struct sembuf take = {0, -1, 0};
	sigset_t set;
	uint32_t word = 0;
	char byte;
	switch (kind) {
	case 0: return nanosleep(&nap, NULL);
	case 1: return epoll_wait(epoll, &event, 1, 3);
	case 2: return poll(&none, 1, 3);
	case 3: return syscall(SYS_futex, &word, FUTEX_WAIT, 0, &nap, NULL, 0) < 0 && errno != ETIMEDOUT ? -1 : 0;
	case 4: return semtimedop(semaphore, &take, 1, &nap) < 0 && errno != EAGAIN ? -1 : 0;
	case 5:
		sigemptyset(&set);
		sigaddset(&set, SIGUSR2);
		return sigtimedwait(&set, NULL, &nap) < 0 && errno != EAGAIN ? -1 : 0;
	case 6: return write(ends[1], "x", 1) == 1 && read(ends[0], &byte, 1) == 1 ? 0 : -1;
	default: return syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &nap, NULL);
	}
}

static void *body(void *argument) {
	long me = (long) argument;
	int ends[2], epoll = epoll_create1(0), semaphore = shared_semaphore;
	if (pipe(ends) < 0 || epoll < 0 || semaphore < 0) return NULL;
	for (;;) {
		if (once(me % KINDS, epoll, semaphore, ends) < 0) {
			table[me].errors++;
			table[me].last = errno;
		}
		table[me].rounds++;
	}
}

int main(int argc, char **argv) {
	int file = open(argv[1], O_RDWR);
	if (unshare(CLONE_NEWIPC) < 0) return 2; /* the semaphore ends with us */
	table = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	shared_semaphore = argc > 2 ? -1 : semget(IPC_PRIVATE, 1, 0600);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	for (long i = 1; i < THREADS; i++) {
		pthread_t thread;
		if (pthread_create(&thread, NULL, body, (void *) i)) return 1;
	}
	body((void *) 0);
	return argc;
}
