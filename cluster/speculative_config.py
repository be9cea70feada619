"""``speculative_config``: vLLM's keys, and ours beside them."""

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from outrider.speculation.errors import InvalidConfigError
from outrider.speculation.pipelines.serial import DEFAULT_SPECULATIVE_TOKENS, TreeShape
from outrider.speculation.verifiers.registry import VERIFIERS

METHODS = ("draft_model", "ngram")
PIPELINES = ("serial",)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """How a target is helped.

    method: ``draft_model`` or ``ngram``.
    model: folder or hub id of the draft model.
    num_speculative_tokens: most draft tokens that one target step verifies.
    prompt_lookup_min, prompt_lookup_max: lengths of the n-grams that ``ngram`` looks up.
    max_model_len: limit of the draft model's context; the target's by default.
    pipeline: ``serial``, draft and verify in turns.
    verification: ``coupled`` or ``greedy``; both match the target's own tokens.
    tree: ``width``, ``children``, ``depth`` and ``adaptive`` of ``TreeShape``.
    """

    method: str = "draft_model"
    model: str | None = None
    num_speculative_tokens: int = DEFAULT_SPECULATIVE_TOKENS
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 4
    max_model_len: int | None = None
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
        config = cls(**{"method": "draft_model" if "model" in values else "ngram", **values})
        config._check()
        return config

    @property
    def shape(self) -> TreeShape:
        """Bounds of the trees."""
        return TreeShape(num_speculative_tokens=self.num_speculative_tokens, **self.tree)

    def _check(self) -> None:
        for name in ("num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max", "max_model_len"):
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
        if self.method == "draft_model" and not self.model:
            raise InvalidConfigError("speculative_config: method 'draft_model' needs a model")
        if self.method != "draft_model" and self.model:
            raise InvalidConfigError(
                f"speculative_config: method {self.method!r} takes no model, not {self.model!r}"
            )
        if not isinstance(self.tree, Mapping):
            raise InvalidConfigError(f"speculative_config: tree must be a mapping, not {self.tree!r}")
        names = {each.name for each in fields(TreeShape)} - {"num_speculative_tokens"}
        refuse_unknown("speculative_config.tree", self.tree, names)
        _ = self.shape


def refuse_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises InvalidConfigError for a key that is not known, naming the nearest one."""
    names = sorted(known)
    for key in given:
        if key not in names:
            nearest = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)[0]
            raise InvalidConfigError(f"{where}: unknown key {key!r}; did you mean {nearest!r}?")


def _choose(name: str, value: object, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise InvalidConfigError(
            f"speculative_config: {name} must be one of {', '.join(choices)}, not {value!r}"
        )
