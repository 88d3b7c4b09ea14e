"""A filter bank times a power spectrum, summed as BLAS libraries do it on many machines.

A matrix product of BLAS wakes the library's threads. When it is over, they look for more to do in a
loop for a tenth of a second, on cores that the encoder wants by then. A filter bank is mostly
zeros: one thread that leaves them out needs no longer.

Each sum runs over the bins in order, with fused multiply-adds, which is how OpenBLAS sums on CPUs
with AVX-512. Whether the BLAS at hand does is for the caller to find out.
"""

import numpy as np

from speechrnt.errors import OptionError

__all__ = ["filter_power", "is_available"]


cdef extern from "_filter_bank.h" namespace "speechrnt_filters" nogil:
    const Py_ssize_t kMaxChannels
    const Py_ssize_t kMaxBins

    bint has_fma() noexcept
    void apply(
        const float *filters, const float *spectrum, float *out, Py_ssize_t channels,
        Py_ssize_t bins, Py_ssize_t frames,
    ) noexcept


cdef bint filter_bank_available() noexcept nogil:
    return has_fma()


cdef void filter_bank_apply(
    const float *filters, const float *power, float *out, Py_ssize_t channels, Py_ssize_t bins,
    Py_ssize_t frames,
) noexcept nogil:
    apply(filters, power, out, channels, bins, frames)


def is_available():
    """Whether this CPU has what `filter_power` is made of."""
    return filter_bank_available()


def filter_power(const float[:, ::1] filters not None, const float[:, ::1] power not None):
    """Return the product of filters and the transpose of a power spectrum.

    Parameters
    ----------
    filters : (channels, bins) C-contiguous array of float32
        Their weights; at most 128 channels and 256 bins.
    power : (frames, bins) C-contiguous array of float32
        Finite: what a filter does not weigh is not looked at.

    Returns
    -------
    (channels, frames) ndarray of float32

    Raises
    ------
    ValueError
        If an array has another shape or type.
    OptionError
        If it is not available.
    """
    cdef Py_ssize_t channels = filters.shape[0], bins = filters.shape[1], frames = power.shape[0]
    if not filter_bank_available():
        raise OptionError("filter_power needs a CPU with fused multiply-add; use a matrix product")
    if power.shape[1] != bins or bins > kMaxBins or channels > kMaxChannels:
        raise ValueError(
            f"at most {kMaxChannels} filters of at most {kMaxBins} bins, and as many bins of "
            f"power, are possible, not {channels} of {bins}, and {power.shape[1]}"
        )
    out = np.zeros((channels, frames), dtype=np.float32)
    cdef float[:, ::1] rows = out
    if channels and bins and frames:
        with nogil:
            filter_bank_apply(&filters[0, 0], &power[0, 0], &rows[0, 0], channels, bins, frames)
    return out
