import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array

def connected_components(graph: coo_array, directed: bool, connection: str = "weak") -> tuple[int, NDArray[np.int32]]: ...
