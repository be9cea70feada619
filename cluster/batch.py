"""Batch generation as a stage of a Ray Data pipeline, in the shape of ``ray.data.llm``.

That module itself needs vLLM and is not used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow as pa
from ray.data import ActorPoolStrategy, Dataset

from outrider.cluster.row_generation import RowGenerator
from outrider.speculation.errors import InvalidConfigError

if TYPE_CHECKING:
    from outrider.cluster.llm import LLM

RowFunction: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]

_TYPES: dict[str, Any] = {
    "generated_text": pa.string(),
    "generated_tokens": pa.list_(pa.int64()),
    "num_generated_tokens": pa.int64(),
    "num_input_tokens": pa.int64(),
    "finish_reason": pa.string(),
    "mean_acceptance_length": pa.float64(),
    "num_spec_steps": pa.int64(),
    "num_draft_tokens": pa.int64(),
    "num_accepted_draft_tokens": pa.int64(),
    "error": pa.string(),
}
"""Of the columns of ``RowGenerator``: a batch of errors alone would not tell them."""


@dataclass(frozen=True, kw_only=True)
class ProcessorConfig:
    """What generates, and on what.

    model_source: folder or hub id of the target, the embedded pair by default. engine_kwargs: the rest of
        what ``LLM`` takes, for example ``speculative_config``.
    chat_template: Jinja, in place of the model's own.
    seed: with a row's contents, seeds a row that brings no seed.
    batch_size: rows of a call. max_concurrent_batches: calls that an actor serves at once: while the last
        rows of one end, those of the next keep the engine busy.
    concurrency: actors, each with an engine of its own; two numbers are the fewest and the most.
    actor_options: what else ``map_batches`` takes for actors: num_cpus (1 by default), num_gpus,
        accelerator_type, resources, runtime_env.

    Raises:
        InvalidConfigError: a number is not possible.
    """

    model_source: str | None = None
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    seed: int = 0
    batch_size: int = 64
    max_concurrent_batches: int = 4
    concurrency: int | tuple[int, int] = 1
    actor_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_concurrent_batches"):
            if getattr(self, name) < 1:
                raise InvalidConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**64:
            raise InvalidConfigError(f"seed must be within [0, 2**64), not {self.seed}")
        fewest, most = self.actors
        if not 1 <= fewest <= most:
            raise InvalidConfigError(f"concurrency must be a number from 1, or two, not {self.concurrency}")

    @property
    def actors(self) -> tuple[int, int]:
        """The fewest and the most."""
        return (self.concurrency,) * 2 if isinstance(self.concurrency, int) else self.concurrency


class GenerationStage:
    """For ``Dataset.map_batches``, in actors: an engine, and tables that share its steps."""

    def __init__(self, config: ProcessorConfig) -> None:
        from outrider.cluster.llm import LLM

        self._config = config
        self._llm: LLM = LLM(config.model_source, **config.engine_kwargs)
        self._generator: RowGenerator | None = None

    async def __call__(self, table: pa.Table) -> pa.Table:
        """The table with the columns of ``RowGenerator``."""
        if self._generator is None:
            # Not earlier: it belongs to the event loop of the calls.
            self._generator = _generator(self._llm, self._config)
        rows = await self._generator.rows(table.to_pylist())
        for name, kind in _TYPES.items():
            column = pa.array([row[name] for row in rows], kind)
            if name in table.column_names:
                table = table.drop_columns([name])
            table = table.append_column(name, column)
        return table


def build_processor(
    config: ProcessorConfig, preprocess: RowFunction | None = None, postprocess: RowFunction | None = None
) -> Callable[[Dataset], Dataset]:
    """What turns a dataset into one with texts.

    preprocess: from a row to the columns ``messages`` or ``prompt``, and ``sampling_params``; what else the
    row has stays. postprocess: from a row with the new columns to the row that is wanted; rows with an
    ``error`` come to it, too.
    """
    fewest, most = config.actors

    def process(dataset: Dataset) -> Dataset:
        if preprocess is not None:
            dataset = dataset.map(lambda row: {**row, **preprocess(row)})
        dataset = dataset.map_batches(
            GenerationStage,
            fn_constructor_args=(config,),
            batch_format="pyarrow",
            batch_size=config.batch_size,
            compute=ActorPoolStrategy(
                min_size=fewest, max_size=most, max_concurrent_calls_per_actor=config.max_concurrent_batches
            ),
            **{"num_cpus": 1, **config.actor_options},
        )
        return dataset if postprocess is None else dataset.map(postprocess)

    return process


def _generator(llm: "LLM", config: ProcessorConfig) -> RowGenerator:
    from outrider.cluster.api.local_backend import LocalBackend
    from outrider.cluster.api.service import ModelSettings, OfferedModel

    backend = LocalBackend(llm)
    settings = ModelSettings(names=(backend.card.name,), chat_template=config.chat_template)
    return RowGenerator(backend, OfferedModel(backend.card, settings), config.seed)
