from typing import Any

import numpy as np
from numpy.typing import NDArray

class coo_array:
    def __init__(
        self, entries: tuple[NDArray[np.float64], tuple[NDArray[Any], NDArray[Any]]], shape: tuple[int, int]
    ) -> None: ...
