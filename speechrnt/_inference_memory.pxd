"""C interface of the pool under CTranslate2, for cimport by code that runs without the GIL.

May be called from any thread at any time.
"""

from libc.stdint cimport uint32_t

# Give what was not used in the last `idle_s` seconds back to the system; return how many bytes.
cdef size_t inference_memory_trim(uint32_t idle_s) noexcept nogil
