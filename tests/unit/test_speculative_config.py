"""``speculative_config`` as users write it."""

from typing import Any

import pytest

from outrider.cluster.speculative_config import SpeculativeConfig
from outrider.speculation.errors import InvalidConfigError
from outrider.speculation.pipelines.shape import MAX_VERIFIED_NODES


def test_a_model_means_a_draft_model_and_nothing_means_ngrams() -> None:
    assert SpeculativeConfig.parse({"model": "x"}).method == "draft_model"
    assert SpeculativeConfig.parse({}).method == "ngram"


def test_the_tree_is_bounded_as_asked() -> None:
    config = SpeculativeConfig.parse(
        {"model": "x", "num_speculative_tokens": 5, "tree": {"width": 2, "depth": 3, "adaptive": False}}
    )
    shape = config.shape
    assert (shape.num_speculative_tokens, shape.width, shape.depth, shape.adaptive) == (5, 2, 3, False)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"modell": "x"}, ["'modell'", "'model'"]),
        ({"model": "x", "tree": {"widht": 2}}, ["'widht'", "'width'"]),
        ({"model": "x", "tree": 3}, ["tree", "3"]),
        ({"model": "x", "tree": {"width": 0}}, ["width", "0"]),
        ({"model": "x", "tree": {"depth": 33}}, ["depth", "33"]),
        ({"model": 7}, ["model", "7"]),
        ({"method": "magic"}, ["method", "'magic'", "ngram"]),
        ({"method": "draft_model"}, ["draft_model", "needs a model"]),
        ({"method": "ngram", "model": "x"}, ["ngram", "'x'"]),
        ({"model": "x", "pipeline": "parallel"}, ["pipeline", "'parallel'", "needs workers"]),
        ({"model": "x", "pipeline": "pearl"}, ["pipeline", "'pearl'", "needs workers"]),
        ({"model": "x", "pipeline": "paralel"}, ["pipeline", "'paralel'", "serial", "parallel"]),
        ({"workers": "local", "method": "ngram"}, ["workers", "'ngram'"]),
        ({"workers": "local"}, ["needs a model"]),
        ({"workers": "local:x", "model": "x"}, ["local:N", "'local:x'"]),
        ({"workers": "local:0", "model": "x"}, ["count", "0"]),
        ({"workers": "nowhere", "model": "x"}, ["host:port", "'nowhere'"]),
        ({"workers": ["host:0"]}, ["host:port", "'host:0'"]),
        ({"workers": ["host:1"], "model": "x"}, ["theirs to choose", "'x'"]),
        ({"workers": {"cuont": 1}, "model": "x"}, ["workers", "'cuont'", "'count'"]),
        ({"workers": {"threads": 0}, "model": "x"}, ["threads", "0"]),
        ({"workers": {"per_request": 0}, "model": "x"}, ["per_request", "positive", "0"]),
        ({"workers": {"per_request": 2}, "model": "x"}, ["at most 1, the number of workers", "2"]),
        ({"workers": {"addresses": ["h:1", "h:2"], "per_request": 3}}, ["at most 2", "3"]),
        ({"workers": {"count": 9, "per_request": 9}, "model": "x"}, ["at most 8, not 9"]),
        ({"workers": 3, "model": "x"}, ["workers", "3"]),
        ({"model": "x", "num_speculative_tokens": 0}, ["num_speculative_tokens", "0"]),
        ({"model": "x", "num_speculative_tokens": True}, ["num_speculative_tokens", "True"]),
        (
            {"model": "x", "num_speculative_tokens": MAX_VERIFIED_NODES + 1},
            ["num_speculative_tokens", str(MAX_VERIFIED_NODES + 1)],
        ),
        ({"model": "x", "max_model_len": "long"}, ["max_model_len", "'long'"]),
        ({"model": "x", "quantization": "fp8"}, ["quantization", "'fp8'", "int8"]),
        ({"quantization": "int8"}, ["nothing has weights", "'int8'"]),
        ({"workers": ["host:1"], "quantization": "int8"}, ["theirs to choose", "'int8'"]),
        ({"prompt_lookup_min": "x"}, ["prompt_lookup_min", "'x'"]),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        SpeculativeConfig.parse(values)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
