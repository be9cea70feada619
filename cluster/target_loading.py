"""A target's network, its memory and what its steps cost, as settings ask for it."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from outrider.actors.model_runner import ModelRunner
from outrider.actors.step_times import measured_step_times, saved_step_times
from outrider.cluster.kv_memory import kv_blocks
from outrider.cluster.tensor_group import LocalRanks
from outrider.models.loader import LoadedModel, load_model
from outrider.models.numerics import MAX_ROWS
from outrider.speculation.errors import InvalidConfigError
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.step_cost import StepCostModel


def check_sizes(max_num_seqs: int, max_num_batched_tokens: int, tensor_parallel_size: int) -> None:
    """Raises InvalidConfigError where these cannot be."""
    if isinstance(max_num_batched_tokens, bool) or not 1 <= max_num_batched_tokens <= MAX_ROWS:
        raise InvalidConfigError(
            f"max_num_batched_tokens must be from 1 to {MAX_ROWS}, not {max_num_batched_tokens!r}"
        )
    if isinstance(max_num_seqs, bool) or not 1 <= max_num_seqs <= max_num_batched_tokens:
        raise InvalidConfigError(
            f"max_num_seqs must be from 1 to {max_num_batched_tokens}, the rows of a forward, "
            f"not {max_num_seqs!r}"
        )
    if isinstance(tensor_parallel_size, bool) or not tensor_parallel_size >= 1:
        raise InvalidConfigError(f"tensor_parallel_size must be at least 1, not {tensor_parallel_size!r}")


def load_target(
    opened: ExitStack,
    model: str,
    *,
    tensor_parallel_size: int,
    max_num_seqs: int,
    max_nodes: int,
    kv_cache_memory: int | str | None,
    gpu_memory_utilization: float | None,
    enable_prefix_caching: bool,
    **settings: Any,
) -> tuple[LoadedModel, ModelRunner]:
    """The model, of several ranks its first part, and what runs it.

    opened: gets what has to be closed. max_nodes: of one request's tree. settings: as for ``load_model``.
    The rest is as for ``LLM``, as are the errors.
    """
    if tensor_parallel_size == 1:
        loaded = load_model(model, **settings)
        network: Any = loaded.decoder
    else:
        ranks = LocalRanks(model, tensor_parallel_size, **settings)
        opened.callback(ranks.close)
        loaded, network = ranks.model, ranks.leader
    num_blocks = kv_blocks(
        loaded.decoder,
        max_num_seqs=max_num_seqs,
        max_nodes=max_nodes,
        kv_cache_memory=kv_cache_memory,
        gpu_memory_utilization=gpu_memory_utilization,
        processes=tensor_parallel_size,
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
