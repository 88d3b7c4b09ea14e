"""A ring and consumers that sleep while it is empty, all compiled here: for the sanitizers."""

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free
from libcpp.atomic cimport atomic, memory_order_acquire, memory_order_release

from speechrnt._deque cimport ring_has_room, ring_pop, ring_push, ring_size, ring_t, ring_take
from speechrnt._park cimport Semaphore, idle_announce, idle_choose, idle_retract

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef enum:
    CONSUMERS = 4


cdef class Handover:
    """Hands numbers from one producer to `CONSUMERS`."""

    cdef ring_t ring
    cdef atomic[uint64_t] idle
    cdef Semaphore[CONSUMERS] semaphores
    cdef atomic[bint] ended
    cdef int64_t *numbers  # not atomic: only the ring orders writing and reading them
    cdef int64_t count

    def __cinit__(self, int64_t count):
        self.count = count
        self.numbers = <int64_t *>calloc(count, sizeof(int64_t))

    def __dealloc__(self):
        free(self.numbers)

    cdef bint wake(self) noexcept nogil:
        cdef int index = idle_choose(&self.idle, ~<uint64_t>0)
        if index >= 0:
            self.semaphores[index].post()
        return index >= 0

    def produce(self):
        """Hand over all numbers, taking some back; return the sum of these."""
        cdef int64_t i
        cdef int64_t total = 0
        cdef int64_t *number
        with nogil:
            for i in range(self.count):
                while not ring_has_room(&self.ring):
                    sched_yield()
                self.numbers[i] = i + 1
                ring_push(&self.ring, &self.numbers[i])
                self.wake()
                if i % 5 == 0:
                    number = <int64_t *>ring_pop(&self.ring)
                    if number != NULL:
                        total += number[0]
            self.ended.store(True, memory_order_release)
            while self.wake():
                pass
        return total

    def consume(self, int index):
        """Take numbers until the end; return their sum."""
        cdef uint64_t bit = <uint64_t>1 << index
        cdef int64_t total = 0
        cdef int64_t *number
        with nogil:
            while True:
                number = <int64_t *>ring_take(&self.ring)
                if number != NULL:
                    total += number[0]
                    continue
                idle_announce(&self.idle, bit)
                if ring_size(&self.ring) > 0 or self.ended.load(memory_order_acquire):
                    if idle_retract(&self.idle, bit):
                        if ring_size(&self.ring) == 0 and self.ended.load(memory_order_acquire):
                            break
                        continue
                self.semaphores[index].wait()
        return total


def hand_over(int64_t count):
    """Do it all; return the difference from the right sum."""
    from concurrent.futures import ThreadPoolExecutor

    handover = Handover(count)
    with ThreadPoolExecutor(CONSUMERS + 1) as pool:
        sums = [pool.submit(handover.consume, index) for index in range(CONSUMERS)]
        sums.append(pool.submit(handover.produce))
        return sum([future.result() for future in sums]) - count * (count + 1) // 2
