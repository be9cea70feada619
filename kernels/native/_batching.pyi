from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

class Batcher:
    def __init__(self, rows: type, block: int, /) -> None: ...
    def __call__(self, parts: Sequence[object], window: int, /) -> tuple[npt.NDArray[np.int64], ...]: ...
