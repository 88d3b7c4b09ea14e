"""Nothing to cimport: _gpu_pool.pxd has the C interface of the pool of GPU memory."""
