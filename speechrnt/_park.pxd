"""What the threads of the scheduler sleep on, and who of them sleeps.

The idle mask has a bit per worker, set while the worker sleeps or is about to, and cleared by
whoever takes on to wake it. docs/scheduler-protocol.md shows why no wake-up is lost.
"""

from libc.stdint cimport uint64_t
from libcpp.atomic cimport (
    atomic, memory_order, memory_order_acq_rel, memory_order_relaxed, memory_order_seq_cst,
)

cdef extern from "_park.h" namespace "speechrnt_park" nogil:
    cppclass Semaphore:
        void post() noexcept
        void wait() noexcept

    cppclass Monitor:
        void lock() noexcept
        void unlock() noexcept
        void notify_all() noexcept
        bint wait(double seconds) noexcept

cdef extern from "<atomic>" namespace "std" nogil:
    void atomic_thread_fence(memory_order)

cdef extern from *:
    """
    static inline int speechrnt_lowest_bit(unsigned long long bits) {
        return __builtin_ctzll(bits);
    }
    """
    int lowest_bit "speechrnt_lowest_bit"(uint64_t bits) noexcept nogil


cdef inline void idle_announce(atomic[uint64_t] *idle, uint64_t bit) noexcept nogil:
    """Say that a worker is about to sleep; it must look for work once more after this."""
    idle.fetch_or(bit, memory_order_seq_cst)
    atomic_thread_fence(memory_order_seq_cst)  # pairs with idle_choose


cdef inline bint idle_retract(atomic[uint64_t] *idle, uint64_t bit) noexcept nogil:
    """Take the bit back, or return False: somebody else has, and owes the worker a post."""
    return idle.fetch_and(~bit, memory_order_acq_rel) & bit != 0


cdef inline int idle_choose(atomic[uint64_t] *idle, uint64_t among) noexcept nogil:
    """Take the lowest idle worker `among` those, to wake it; -1 if none. Work is queued before."""
    cdef uint64_t candidates, bit
    atomic_thread_fence(memory_order_seq_cst)  # pairs with idle_announce
    while True:
        candidates = idle.load(memory_order_relaxed) & among
        if candidates == 0:
            return -1
        bit = candidates & (~candidates + 1)
        if idle.fetch_and(~bit, memory_order_acq_rel) & bit:
            return lowest_bit(bit)
