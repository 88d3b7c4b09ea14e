"""Nothing to cimport: what `pinned_memory` returns is declared in _audio_pool.pxd."""
