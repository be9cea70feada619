"""How much memory a target's KV cache gets; fixed before the first request."""

import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ByteSize, TypeAdapter, ValidationError

from outrider.models.block_pool import BLOCK, blocks_for
from outrider.speculation.errors import InvalidConfigError

if TYPE_CHECKING:
    from outrider.actors.target_worker import Network

DEFAULT_UTILIZATION = 0.5
"""Of the machine's memory, for weights and KV together; what else runs there is not ours to know."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def kv_blocks(
    network: "Network",
    *,
    max_num_seqs: int,
    max_nodes: int,
    kv_cache_memory: int | str | None,
    gpu_memory_utilization: float | None,
    max_rows: int,
    processes: int = 1,
) -> int:
    """Blocks of the cache: as told, else what ``max_num_seqs`` full sequences with trees of
    ``max_nodes`` could use, if there is as much memory.

    kv_cache_memory: bytes, or a size such as ``4GiB``. gpu_memory_utilization: the share of the
    device's memory that may be taken, by whomever, or on CPU of the machine's by this process together
    with others that hold ``processes - 1`` equal parts. max_rows: of one forward.

    Raises:
        InvalidConfigError: a setting is not possible, or the longest sequence would not fit.
    """
    if gpu_memory_utilization is not None and not 0 < gpu_memory_utilization <= 1:
        raise InvalidConfigError(
            f"gpu_memory_utilization must be above 0 and at most 1, not {gpu_memory_utilization!r}"
        )
    size = network.block_bytes
    if kv_cache_memory is not None:
        asked = parse_bytes(kv_cache_memory)
        if network.device.type == "cpu" and asked > machine_bytes():
            there = machine_bytes() // 2**20
            raise InvalidConfigError(
                f"kv_cache_memory must be at most the machine's {there} MiB, not {kv_cache_memory!r}"
            )
        blocks = asked // size
    else:
        wanted = max_num_seqs * blocks_for(network.max_model_len + max_nodes + 1)
        if network.device.type == "cpu":
            share = gpu_memory_utilization or DEFAULT_UTILIZATION
            room = int(share * machine_bytes() / processes) - used_bytes()
        else:
            from outrider.cluster.device_memory import room_for_cache

            room = room_for_cache(network, gpu_memory_utilization, max_rows)
        blocks = min(wanted, max(0, room) // size)
    if blocks < blocks_for(network.max_model_len):
        needed = blocks_for(network.max_model_len) * size / 2**20
        raise InvalidConfigError(
            f"the KV cache has room for {blocks * BLOCK} tokens, less than max_model_len "
            f"{network.max_model_len}, which takes {needed:.0f} MiB; give it more with kv_cache_memory, "
            "or lower max_model_len"
        )
    return blocks


def parse_bytes(size: int | str) -> int:
    """A number of bytes, or one with a unit.

    Raises:
        InvalidConfigError: it is neither.
    """
    try:
        if isinstance(size, bool):
            raise ValueError
        return int(TypeAdapter(ByteSize).validate_python(size))
    except (ValidationError, ValueError):
        raise InvalidConfigError(
            f"kv_cache_memory must be bytes or a size such as 4GiB, not {size!r}"
        ) from None


def machine_bytes() -> int:
    """Memory that this machine, or the container on it, has."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(_CGROUP_LIMIT.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no cgroups, or "max"
        return physical


def used_bytes() -> int:
    """Most memory that this process has had, weights included."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
