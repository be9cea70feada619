"""What a number, a string or a packed array must be before anyone may believe it.

Packed arrays are little-endian items of four bytes. All functions name the offending field and
value in a ``WireError``.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from outrider.speculation.errors import WireError
from outrider.speculation.replication.messages import MAX_GROWTH_NODES, Float32Array
from outrider.speculation.types import IntArray

MAX_CHARACTERS = 1024
"""Of a string."""
_TOKEN_IDS = 2**31  # the hash of a text takes them as int32
_SESSIONS = 2**63


def pack(ids: npt.ArrayLike) -> bytes:
    """Token or node ids (integers ``[n]``) as uint32."""
    return np.asarray(ids, np.int64).astype("<u4").tobytes()


def _unpack(name: str, data: bytes, dtype: str, most: int) -> npt.NDArray[Any]:
    """A view of packed four-byte items."""
    if len(data) % 4:
        raise WireError(f"{name} must be whole items of 4 bytes, not {len(data)} bytes")
    check_count(name, len(data) // 4, most)
    return np.frombuffer(data, dtype)


def token_ids(name: str, data: bytes, most: int) -> IntArray:
    """int64 ``[n]``, n at most ``most``."""
    ids = _unpack(name, data, "<u4", most)
    if len(ids) and (largest := int(ids.max())) >= _TOKEN_IDS:
        raise WireError(f"{name} must be below {_TOKEN_IDS}, not {largest}")
    return ids.astype(np.int64)


def parent_ids(data: bytes, first_id: int, count: int) -> IntArray:
    """int64 ``[count]``, each below the id of its own node."""
    parents = _unpack("parents", data, "<u4", MAX_GROWTH_NODES).astype(np.int64)
    _check_agrees("parents", len(parents), count)
    late = parents >= np.arange(first_id, first_id + count)
    if late.any():
        node = int(late.argmax())
        raise WireError(f"the parent of node {first_id + node} must be an earlier one, not {parents[node]}")
    return parents


def probabilities(data: bytes, count: int) -> Float32Array:
    """float32 ``[count]``."""
    scores = _unpack("scores", data, "<f4", MAX_GROWTH_NODES).astype(np.float32)
    _check_agrees("scores", len(scores), count)
    inside = (scores >= 0) & (scores <= 1)  # false for NaN
    if not inside.all():
        raise WireError(f"scores must be within [0, 1], not {scores[inside.argmin()]}")
    return scores


def _check_agrees(name: str, count: int, expected: int) -> None:
    if count != expected:
        raise WireError(f"{name} must be as many as the {expected} tokens, not {count}")


def check_count(name: str, count: int, most: int) -> None:
    if count > most:
        raise WireError(f"{name} must be at most {most} items, not {count}")


def session_number(value: int) -> int:
    if value >= _SESSIONS:
        raise WireError(f"session must be below 2**63, not {value}")
    return value


def at_least(name: str, value: int, least: int) -> int:
    if value < least:
        raise WireError(f"{name} must be at least {least}, not {value}")
    return value


def between(name: str, value: float, least: float, most: float) -> float:
    if not least <= value <= most:
        raise WireError(f"{name} must be within [{least}, {most}], not {value}")
    return value


def text(name: str, value: str) -> str:
    # Strings end up in logs and in headers: no line breaks, no escape sequences.
    if len(value) > MAX_CHARACTERS or not value.isprintable():
        raise WireError(f"{name} must be at most {MAX_CHARACTERS} printable characters, not {value[:40]!r}")
    return value


def one_line(value: str) -> str:
    """What ``text`` accepts, made of any string."""
    return "".join(each if each.isprintable() else " " for each in value[:MAX_CHARACTERS])
