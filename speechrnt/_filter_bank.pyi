import numpy as np
from numpy.typing import NDArray

__all__ = ["filter_power", "is_available"]

def is_available() -> bool: ...
def filter_power(
    filters: NDArray[np.float32], power: NDArray[np.float32]
) -> NDArray[np.float32]: ...
