"""Waiting for what another thread does: for a condition, never for a time."""

import time

MOST_S = 60


def eventually(condition, what="it"):
    """Wait until a condition holds."""
    end = time.monotonic() + MOST_S
    while not condition():
        assert time.monotonic() < end, f"{what} has not happened"
        time.sleep(0.001)
