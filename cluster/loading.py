"""Networks of one rank or several, a target's memory and what its steps cost, as settings ask for it."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from outrider.actors.model_runner import ModelRunner
from outrider.actors.step_times import measured_step_times, saved_step_times
from outrider.actors.target_worker import Network, TargetLeader
from outrider.cluster.kv_memory import kv_blocks
from outrider.cluster.tensor_group import LocalRanks
from outrider.models.device import CPU
from outrider.models.loader import LoadedModel, load_model
from outrider.models.numerics import MAX_DEVICE_ROWS, MAX_ROWS, Numerics
from outrider.models.parallel import RankGroup
from outrider.speculation.errors import InvalidConfigError
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.step_cost import StepCostModel

DEVICE_ROWS = 512
"""Rows of a forward on a device with ``fast``, by default."""


def numerics_of(name: str | None, device: torch.device) -> Numerics:
    """Those of that name; by default what costs little there.

    Raises:
        InvalidConfigError: there is no such name.
    """
    if name is None:
        return Numerics.CANONICAL if device == CPU else Numerics.FAST
    try:
        return Numerics(name)
    except ValueError:
        raise InvalidConfigError(f"numerics must be {' or '.join(Numerics)}, not {name!r}") from None


def rows_of(max_num_batched_tokens: int | None, numerics: Numerics, device: torch.device) -> int:
    """Rows of the largest forward.

    Raises:
        InvalidConfigError: ``max_num_batched_tokens`` are too few or too many.
    """
    probed = device == CPU or numerics is Numerics.CANONICAL
    if max_num_batched_tokens is None:
        return MAX_ROWS if probed else DEVICE_ROWS
    most = MAX_ROWS if probed else MAX_DEVICE_ROWS
    if isinstance(max_num_batched_tokens, bool) or not 1 <= max_num_batched_tokens <= most:
        raise InvalidConfigError(
            f"max_num_batched_tokens must be from 1 to {most}, not {max_num_batched_tokens!r}"
        )
    return max_num_batched_tokens


def check_sizes(max_num_seqs: int, max_num_batched_tokens: int, tensor_parallel_size: int) -> None:
    """Raises InvalidConfigError where these cannot be."""
    if isinstance(max_num_seqs, bool) or not 1 <= max_num_seqs <= max_num_batched_tokens:
        raise InvalidConfigError(
            f"max_num_seqs must be from 1 to {max_num_batched_tokens}, the rows of a forward, "
            f"not {max_num_seqs!r}"
        )
    check_ranks(tensor_parallel_size)


def check_ranks(tensor_parallel_size: int) -> None:
    """Raises InvalidConfigError where there cannot be so many."""
    if isinstance(tensor_parallel_size, bool) or not tensor_parallel_size >= 1:
        raise InvalidConfigError(
            f"tensor_parallel_size must be a positive integer, not {tensor_parallel_size!r}"
        )


def open_network(
    opened: ExitStack, model: str, ranks: int | RankGroup, *, device: torch.device, **settings: Any
) -> tuple[LoadedModel, Network]:
    """A model, of several ranks its first part, and what runs all of it.

    opened: gets what has to be closed. ranks: how many, the others being started here, or the group in
    which this process is rank 0. device: rank 0's. settings: as for ``load_model``.

    Raises:
        WorkerError: a rank cannot be started.
        TargetGroupError: a rank ended before it was ready.
        ModelError: the model cannot be loaded.
        InvalidConfigError: a setting is not possible.
    """
    if ranks == 1:
        loaded = load_model(model, device=device, **settings)
        return loaded, loaded.decoder
    if isinstance(ranks, RankGroup):
        loaded = load_model(model, ranks=ranks, device=device, **settings)
        leader = TargetLeader(loaded.decoder, ranks)
        opened.callback(leader.stop)
        return loaded, leader
    local = LocalRanks(model, ranks, device=device, **settings)
    opened.callback(local.close)
    assert local.leader is not None
    return local.model, local.leader


def load_target(
    opened: ExitStack,
    model: str,
    ranks: int | RankGroup,
    *,
    max_num_seqs: int,
    max_rows: int,
    max_nodes: int,
    kv_cache_memory: int | str | None,
    gpu_memory_utilization: float | None,
    enable_prefix_caching: bool,
    **settings: Any,
) -> tuple[LoadedModel, ModelRunner]:
    """The model and what runs it, with its memory.

    max_rows: of a forward. max_nodes: of one request's tree. The rest as for ``open_network`` and
    ``LLM``, as are the errors.
    """
    loaded, network = open_network(opened, model, ranks, **settings)
    num_blocks = kv_blocks(
        network,
        max_num_seqs=max_num_seqs,
        max_rows=max_rows,
        max_nodes=max_nodes,
        kv_cache_memory=kv_cache_memory,
        gpu_memory_utilization=gpu_memory_utilization,
        processes=ranks.size if isinstance(ranks, RankGroup) else ranks,
    )
    return loaded, ModelRunner(network, num_blocks=num_blocks, prefix_caching=enable_prefix_caching)


def step_costs(runner: ModelRunner, max_rows: int, profile: str | None) -> CostEstimates:
    """What steps cost, measured now, or read from ``profile`` if that file is there.

    Raises:
        InvalidConfigError: see ``saved_step_times``.
    """
    if profile is None:
        times = measured_step_times(runner, max_rows)
    else:
        times = saved_step_times(Path(profile), runner, max_rows)
    return CostEstimates(StepCostModel(times), max_rows=max_rows)
