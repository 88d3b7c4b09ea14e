"""The pools in processes of their own: what they allocate, exit and fork."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from pool_helpers import run_python


@pytest.fixture(scope="session")
def built(probe):
    """Where the probe is, for other processes to import it."""
    return Path(probe.__file__).parent


@pytest.fixture(scope="session")
def counter(tmp_path_factory):
    """A library to preload that counts calls of malloc and the like."""
    directory = tmp_path_factory.mktemp("count")
    (directory / "count.c").write_text(COUNTING_MALLOC)
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    command = [compiler, "-shared", "-fPIC", "-O2", "-o", "count.so", "count.c"]
    subprocess.run(command, cwd=directory, check=True)
    return directory / "count.so"


@pytest.mark.skipif(sys.platform != "linux", reason="replaces functions of glibc")
@pytest.mark.skipif("SPEECHRNT_BUILD" in os.environ, reason="as sanitizers do")
class TestAllocations:
    """A warm acquire and release takes no memory from the system, over a million rounds."""

    def test_in_c(self, built, counter):
        out = run_python(
            """
            import ctypes
            import pool_probe
            from speechrnt.pools import AudioBufferPool
            count = ctypes.CDLL(None).allocations
            count.restype = ctypes.c_long
            address = ctypes.cast(count, ctypes.c_void_p).value
            large, small = pool_probe.Pool(64, 4096), pool_probe.Pool(64, 10)
            pools = [AudioBufferPool(), large, small, pool_probe.Results()]
            assert sum(pool_probe.calls_during(address, pool, 1) for pool in pools) > 0
            print(*(pool_probe.calls_during(address, pool, 1_000_000) for pool in pools))
            """,
            path=[built],
            LD_PRELOAD=str(counter),
        )
        assert out.split() == ["0"] * 4

    def test_in_python(self, counter):
        out = run_python(
            """
            import ctypes
            from speechrnt.pools import AudioBufferPool, ObjectPool, TranscriptionResultPool
            count = ctypes.CDLL(None).allocations
            count.restype = ctypes.c_long
            audio, objects, results = AudioBufferPool(), ObjectPool(set), TranscriptionResultPool()

            def go(rounds):
                before = count()
                for _ in range(rounds):
                    audio.acquire(480_000).release()
                yield count() - before
                before = count()
                for _ in range(rounds):
                    objects.acquire().release()
                yield count() - before
                before = count()
                for _ in range(rounds):
                    results.acquire().release()
                yield count() - before
                before = count()
                for _ in range(rounds // 10):
                    with objects.acquire(), audio.acquire(1) as buffer, results.acquire() as result:
                        buffer.array
                        result.tokens = (1, 2, 3)
                yield count() - before

            assert sum(go(1000)) > 0
            print(*go(1_000_000))
            """,
            LD_PRELOAD=str(counter),
        )
        # Leases and views come from free lists of Python.
        assert out.split() == ["0"] * 4


COUNTING_MALLOC = """
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
void *__libc_malloc(size_t); void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t); void *__libc_memalign(size_t, size_t);
static atomic_long calls;
static void count(void) { atomic_fetch_add(&calls, 1); }
long allocations(void) { return atomic_load(&calls); }
void *malloc(size_t n) { count(); return __libc_malloc(n); }
void *calloc(size_t n, size_t m) { count(); return __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { count(); return __libc_realloc(p, n); }
void *memalign(size_t a, size_t n) { count(); return __libc_memalign(a, n); }
void *aligned_alloc(size_t a, size_t n) { count(); return __libc_memalign(a, n); }
int posix_memalign(void **p, size_t a, size_t n) {
    count(); *p = __libc_memalign(a, n); return *p ? 0 : ENOMEM;
}
void *mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset) {
    count(); return (void *)syscall(SYS_mmap, at, n, prot, flags, fd, offset);
}
void *mmap64(void *at, size_t n, int prot, int flags, int fd, off_t offset) {
    return mmap(at, n, prot, flags, fd, offset);
}
"""


def test_the_interpreter_exits_with_leases_and_arrays_alive():
    run_python(
        """
        import threading, time
        from speechrnt.pools import AudioBufferPool, ObjectPool, TranscriptionResultPool
        audio, results = AudioBufferPool(), TranscriptionResultPool()
        objects = ObjectPool(bytearray, deleter=bytearray.clear)
        leases = [audio.acquire(480_000), results.acquire(), objects.acquire()]
        array = audio.acquire(100).array
        cycle = [leases, array]
        cycle.append(cycle)

        def use():
            while True:
                audio.acquire(100).array[:] = 1
                results.acquire().text = "text"
                objects.acquire().release()

        for _ in range(2):
            threading.Thread(target=use, daemon=True).start()
        time.sleep(0.1)
        """
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
class TestFork:
    def test_the_child_goes_on(self, built):
        run_python(
            """
            import os, threading, warnings
            import pool_probe
            from speechrnt.pools import AudioBufferPool, ObjectPool, TranscriptionResultPool
            warnings.simplefilter("ignore", DeprecationWarning)  # that threads are running: yes
            native = pool_probe.Pool(64, 2000)
            pools = [ObjectPool(bytearray), TranscriptionResultPool()]
            audio = AudioBufferPool()
            stop = threading.Event()

            def churn(i):
                while not stop.is_set():
                    native.churn(i, 10)
                    audio.acquire(100).release()
                    for pool in pools:
                        pool.acquire().release()

            threads = [threading.Thread(target=churn, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            with audio.acquire(1000, zero=True) as buffer:
                for _ in range(20):
                    child = os.fork()
                    if child == 0:
                        buffer.array[:] = 1
                        native.trim()
                        audio.trim()
                        assert native.churn(9, 100) == 0
                        for pool in (*pools,):
                            pool.acquire().release()
                            pool.trim()
                        audio.acquire(1000).release()
                        os._exit(0)
                    _, status = os.waitpid(child, 0)
                    assert status == 0, status
                assert not buffer.array.any()
            stop.set()
            for thread in threads:
                thread.join()
            assert native.churn(1, 10) == 0
            """,
            path=[built],
        )

    def test_the_child_takes_back_what_idle_threads_had_cached(self, built):
        run_python(
            """
            import os, threading, warnings
            import pool_probe
            warnings.simplefilter("ignore", DeprecationWarning)
            pool = pool_probe.Pool(8, 1024)
            ready, stop = threading.Barrier(5), threading.Event()

            def use():
                pool.churn(1, 10)
                ready.wait()
                stop.wait()

            threads = [threading.Thread(target=use) for _ in range(4)]
            for thread in threads:
                thread.start()
            ready.wait()
            child = os.fork()
            if child == 0:
                os._exit([pool.acquire()[0] for _ in range(1024)] != [0] * 1024)
            _, status = os.waitpid(child, 0)
            stop.set()
            assert status == 0
            """,
            path=[built],
        )
