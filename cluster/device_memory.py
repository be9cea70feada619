"""How much of a device's memory KV caches get, by what weights and steps take of it."""

from outrider.actors.draft_engine import session_blocks
from outrider.actors.target_worker import Network
from outrider.speculation.errors import InvalidConfigError

DEFAULT_UTILIZATION = 0.9
"""Share of a device that a target may fill, and of what is free then that a draft model's cache may."""


def room_for_cache(network: Network, share: float | None, max_rows: int) -> int:
    """Bytes for a target's cache on each device; negative where there are none.

    share: of the device that may be in use afterwards, by whomever. max_rows: of one forward.
    """
    memory = network.memory(max_rows)
    return left(share or DEFAULT_UTILIZATION, memory.free, memory.total, memory.step)


def left(share: float, free: int, total: int, step: int) -> int:
    """What ``share`` of ``total`` bytes leaves beside those that are taken and those that a step takes."""
    return int(share * total) - (total - free) - step


def draft_blocks(network: Network, sessions: int) -> int:
    """Blocks of a draft model's cache: for so many sessions of full length; on a device what fits of them.

    Raises:
        InvalidConfigError: there is no room for one.
    """
    one = session_blocks(network.max_model_len)
    if network.device.type == "cpu":
        return sessions * one
    free = network.memory(0).free
    blocks = min(sessions * one, int(DEFAULT_UTILIZATION * free) // network.block_bytes)
    if blocks < one:
        raise InvalidConfigError(
            f"{free / 2**20:.0f} MiB are free on the device, too little for a draft model's text of "
            f"{network.max_model_len} tokens; lower its max_model_len, or the target's gpu_memory_utilization"
        )
    return blocks
