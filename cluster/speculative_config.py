"""``speculative_config``: vLLM's keys, and ours beside them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from outrider.cluster.nearest import refuse_unknown
from outrider.cluster.workers_config import WorkersConfig
from outrider.models.quantization import QUANTIZATIONS
from outrider.speculation.errors import InvalidConfigError
from outrider.speculation.pipelines.shape import DEFAULT_SPECULATIVE_TOKENS, TreeShape
from outrider.speculation.verifiers.registry import VERIFIERS

METHODS = ("draft_model", "ngram")
PIPELINES = ("serial", "parallel", "pearl")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """How a target is helped.

    method: ``draft_model`` or ``ngram``.
    model: folder or hub id of the draft model.
    draft_tensor_parallel_size: processes that share the draft model, where this process starts it.
    quantization: ``int8`` quantises the draft model's weights when it is loaded; None leaves them.
    num_speculative_tokens: most draft tokens that one target step verifies.
    prompt_lookup_min, prompt_lookup_max: lengths of the n-grams that ``ngram`` looks up.
    max_model_len: limit of the draft model's context; the target's by default.
    workers: draft workers in processes of their own, see ``WorkersConfig.parse``; None drafts
        in the target's process.
    pipeline: ``serial``, draft and verify in turns; ``parallel``, both at once, which also finds out
        whether waiting, or drafting at all, pays; or ``pearl``, the paper's, for comparison. The last
        two need workers; the default with and without them is ``parallel`` and ``serial``.
    verification: ``coupled`` or ``greedy``; both match the target's own tokens.
    tree: ``width``, ``children``, ``depth`` and ``adaptive`` of ``TreeShape``.
    """

    method: str = "draft_model"
    model: str | None = None
    draft_tensor_parallel_size: int = 1
    quantization: str | None = None
    num_speculative_tokens: int = DEFAULT_SPECULATIVE_TOKENS
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 4
    max_model_len: int | None = None
    workers: WorkersConfig | None = None
    pipeline: str = "serial"
    verification: str = "coupled"
    tree: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "SpeculativeConfig":
        """Checks a dictionary as users write it.

        Raises:
            InvalidConfigError: a key is unknown (the message names the nearest one) or a
                value is not possible.
        """
        if not isinstance(values, Mapping):
            raise InvalidConfigError(f"speculative_config must be a mapping, not {values!r}")
        refuse_unknown("speculative_config", values, (each.name for each in fields(cls)))
        given = dict(values)
        if given.get("workers") is not None:
            given["workers"] = WorkersConfig.parse(given["workers"])
            given = {"method": "draft_model", "pipeline": "parallel", **given}
        config = cls(**{"method": "draft_model" if "model" in given else "ngram", **given})
        config._check()
        return config

    @property
    def shape(self) -> TreeShape:
        """Bounds of the trees."""
        return TreeShape(num_speculative_tokens=self.num_speculative_tokens, **self.tree)

    def _check(self) -> None:
        for name in (
            "draft_tensor_parallel_size", "num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max",
            "max_model_len",
        ):  # fmt: skip
            value = getattr(self, name)
            wrong = isinstance(value, bool) or not isinstance(value, int) or value < 1
            if wrong and not (name == "max_model_len" and value is None):
                raise InvalidConfigError(
                    f"speculative_config: {name} must be a positive integer, not {value!r}"
                )
        if self.model is not None and not isinstance(self.model, str):
            raise InvalidConfigError(
                f"speculative_config: model must be a folder or hub id, not {self.model!r}"
            )
        _choose("method", self.method, METHODS)
        _choose("pipeline", self.pipeline, PIPELINES)
        _choose("verification", self.verification, VERIFIERS)
        if self.quantization is not None:
            _choose("quantization", self.quantization, QUANTIZATIONS)
        self._check_workers()
        served = self.workers is not None and not self.workers.is_local
        if self.method == "draft_model" and not self.model and not served:
            raise InvalidConfigError("speculative_config: method 'draft_model' needs a model")
        if self.method != "draft_model" and self.model:
            raise InvalidConfigError(
                f"speculative_config: method {self.method!r} takes no model, not {self.model!r}"
            )
        if served and self.model:
            raise InvalidConfigError(
                f"speculative_config: the workers' model is theirs to choose, so model {self.model!r} must go"
            )
        if self.quantization is not None and not self.model:
            whose = "the workers' models are theirs to choose" if served else "nothing has weights"
            raise InvalidConfigError(
                f"speculative_config: {whose}, so quantization {self.quantization!r} must go"
            )
        if not isinstance(self.tree, Mapping):
            raise InvalidConfigError(f"speculative_config: tree must be a mapping, not {self.tree!r}")
        names = {each.name for each in fields(TreeShape)} - {"num_speculative_tokens"}
        refuse_unknown("speculative_config.tree", self.tree, names)
        _ = self.shape

    def _check_workers(self) -> None:
        if self.workers is None and self.pipeline != "serial":
            raise InvalidConfigError(
                f"speculative_config: pipeline {self.pipeline!r} needs workers, such as 'local'"
            )
        if self.workers is not None and self.method != "draft_model":
            raise InvalidConfigError(
                f"speculative_config: workers run a draft model, so method must not be {self.method!r}"
            )


def _choose(name: str, value: object, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise InvalidConfigError(
            f"speculative_config: {name} must be one of {', '.join(choices)}, not {value!r}"
        )
