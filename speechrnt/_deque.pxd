"""A bounded work-stealing deque: one owner pushes, the owner and thieves take.

After Chase and Lev, "Dynamic circular work-stealing deque" (SPAA 2005), with the memory orders of
Lê, Pop, Cohen and Zappa Nardelli (PPoPP 2013) except that sequentially consistent accesses stand
in place of their fences: stealing costs half as much on x86-64, and ThreadSanitizer, which does not
model fences, can check it. docs/scheduler-protocol.md names the partner of each order.

Tasks enter at `bottom`. `ring_take` removes the oldest at `top`, for the owner and thieves alike;
`ring_pop` removes the newest, for the owner only. Both counters only grow, except that `ring_pop`
moves `bottom` back.
"""

from libc.stdint cimport int64_t, uintptr_t
from libcpp.atomic cimport (
    atomic, memory_order_acquire, memory_order_relaxed, memory_order_release, memory_order_seq_cst,
)

cdef extern from *:
    """
    #include <cassert>
    #ifndef SPEECHRNT_RING
    #define SPEECHRNT_RING 256
    #endif
    static_assert((SPEECHRNT_RING & (SPEECHRNT_RING - 1)) == 0, "the ring size is a power of two");
    """
    enum:
        RING_CAPACITY "SPEECHRNT_RING"
    void debug_assert "assert"(bint) noexcept nogil

cdef struct ring_t:
    atomic[int64_t] top
    char[120] top_apart      # thieves write top, the owner bottom: two cache lines each
    atomic[int64_t] bottom
    int64_t top_seen         # the owner's last look at top, which is never ahead of it
    char[112] bottom_apart
    atomic[uintptr_t] slots[RING_CAPACITY]


cdef inline int64_t ring_size(ring_t *ring) noexcept nogil:
    """Count the items; a snapshot for anybody but the owner."""
    cdef int64_t top = ring.top.load(memory_order_seq_cst)
    return ring.bottom.load(memory_order_seq_cst) - top


cdef inline bint ring_has_room(ring_t *ring) noexcept nogil:
    """Tell whether one more item can be pushed. For the owner."""
    cdef int64_t bottom = ring.bottom.load(memory_order_relaxed)
    if bottom - ring.top_seen >= RING_CAPACITY:
        # Acquires from the exchange in ring_take: a slot has been read before it is reused.
        ring.top_seen = ring.top.load(memory_order_acquire)
    return bottom - ring.top_seen < RING_CAPACITY


cdef inline void ring_push(ring_t *ring, void *item) noexcept nogil:
    """Add the newest item. For the owner, after ring_has_room."""
    cdef int64_t bottom = ring.bottom.load(memory_order_relaxed)
    debug_assert(0 <= bottom - ring.top_seen < RING_CAPACITY)
    ring.slots[bottom & (RING_CAPACITY - 1)].store(<uintptr_t>item, memory_order_relaxed)
    ring.bottom.store(bottom + 1, memory_order_release)  # publishes the slot to ring_take


cdef inline void *ring_take(ring_t *ring) noexcept nogil:
    """Remove the oldest item, or return NULL if there is none. For anybody."""
    cdef int64_t top, bottom
    cdef uintptr_t item
    while True:
        top = ring.top.load(memory_order_seq_cst)
        bottom = ring.bottom.load(memory_order_seq_cst)
        if top >= bottom:
            return NULL
        # The slot may be stale if others have gone on; the exchange fails then.
        item = ring.slots[top & (RING_CAPACITY - 1)].load(memory_order_relaxed)
        if ring.top.compare_exchange_strong(
            top, top + 1, memory_order_seq_cst, memory_order_relaxed
        ):
            return <void *>item


cdef inline void *ring_pop(ring_t *ring) noexcept nogil:
    """Remove the newest item, or return NULL if there is none. For the owner."""
    cdef int64_t bottom = ring.bottom.load(memory_order_relaxed) - 1
    cdef int64_t top
    cdef uintptr_t item = 0
    # In one total order with the loads of ring_take: a thief that does not see this store is seen.
    ring.bottom.store(bottom, memory_order_seq_cst)
    top = ring.top.load(memory_order_seq_cst)
    if top < bottom:
        return <void *>ring.slots[bottom & (RING_CAPACITY - 1)].load(memory_order_relaxed)
    if top == bottom:
        item = ring.slots[bottom & (RING_CAPACITY - 1)].load(memory_order_relaxed)
        if not ring.top.compare_exchange_strong(
            top, top + 1, memory_order_seq_cst, memory_order_relaxed
        ):
            item = 0
    # Release, so that a thief which reads this value still acquires the slots pushed below it.
    ring.bottom.store(bottom + 1, memory_order_release)
    return <void *>item
