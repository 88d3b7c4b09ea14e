__all__ = ["RING_CAPACITY"]

RING_CAPACITY: int
