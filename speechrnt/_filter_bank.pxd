"""C interface of the filter bank, for cimport by code that runs without the GIL.

May be called from any thread at any time.
"""

# Whether this CPU has what filter_bank_apply is made of.
cdef bint filter_bank_available() noexcept nogil

# out[c, i] = sum over k of filters[c, k] * power[i, k]. All are contiguous, with at most 128
# channels and 256 bins. Powers that no filter weighs are not looked at.
cdef void filter_bank_apply(
    const float *filters, const float *power, float *out, Py_ssize_t channels, Py_ssize_t bins,
    Py_ssize_t frames,
) noexcept nogil
