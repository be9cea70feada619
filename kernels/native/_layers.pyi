import numpy as np
import numpy.typing as npt

calls: object

def rms_norm(
    kind: int, x: int, delta: int, weight: int, out: int, rows: int, size: int, eps: float, /
) -> None: ...
def silu_mul(kind: int, gate_up: int, out: int, rows: int, size: int, /) -> None: ...
def attend(*args: object) -> None: ...
def guess(
    kind: int,
    logits: int,
    stride: int,
    size: int,
    count: int,
    states: npt.NDArray[np.uint64],
    positions: npt.NDArray[np.int64],
    noisy: npt.NDArray[np.bool_],
    /,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]: ...
def draw(
    values: int,
    size: int,
    threads: int,
    base: npt.NDArray[np.int64],
    gamma: npt.NDArray[np.int64],
    streams: npt.NDArray[np.int64],
    /,
) -> npt.NDArray[np.int64]: ...
def paths() -> list[str]: ...
def select(path: str, /) -> None: ...
def selected() -> str: ...
