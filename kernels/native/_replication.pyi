from typing import Any

import numpy as np
import numpy.typing as npt

class Grafter:
    def __init__(
        self,
        message: type,
        tree: tuple[npt.NDArray[Any], ...],
        window: tuple[npt.NDArray[Any], ...],
        vocab_size: int,
        max_depth: int,
        smallest_score: float,
        /,
    ) -> None: ...
    def place(
        self,
        messages: list[Any],
        next_id: int,
        num_free: int,
        next_birth: int,
        text: npt.NDArray[np.int64],
        births: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        /,
    ) -> tuple[int, int, int, int, Any] | None: ...

class Tallier:
    def __init__(self, received: type, growth: type, /) -> None: ...
    def by_session(self, arrived: list[Any], start: int, /) -> tuple[dict[int, list[Any]], int]: ...
    def tally(self, arrived: list[Any], generation: int, sequence: int, /) -> tuple[Any, ...]: ...
    def seconds_between(self, messages: list[Any], began: float, ended: float, /) -> float: ...
