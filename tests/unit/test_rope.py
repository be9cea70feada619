"""Rotary frequencies against transformers', which compute them on their own."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from outrider.models.rope import RopeConfig, rope_frequencies
from outrider.speculation.errors import UnsupportedModelError

CONTEXT = "original_max_position_embeddings"
SCALED = {
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, CONTEXT: 8192,
    },
    "llama3, other bands": {
        "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 9.0, CONTEXT: 1024,
    },
    "yarn": {"factor": 4.0, CONTEXT: 32768},
    "yarn, betas": {
        "factor": 4.0, CONTEXT: 4096, "beta_fast": 16.0, "beta_slow": 2.0,
    },
    "yarn, whole ramp": {"factor": 16.0, CONTEXT: 4096, "truncate": False},
    "yarn, attention factor": {"factor": 4.0, CONTEXT: 4096, "attention_factor": 1.5},
    "yarn, mscales": {
        "factor": 40.0, CONTEXT: 4096, "mscale": 1.0, "mscale_all_dim": 0.5,
    },
    "yarn, short context": {"factor": 2.0, CONTEXT: 8},
    "yarn, no ramp": {"factor": 2.0, CONTEXT: 6},
    "yarn, ramp beyond the last pair": {"factor": 2.0, CONTEXT: 1000},
}  # fmt: skip


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("theta", [10.0, 10_000.0, 1_000_000.0])
@pytest.mark.parametrize("case", SCALED)
def test_scaled_frequencies_equal_transformers(case: str, theta: float, head_dim: int) -> None:
    rope_type, scaling = case.split(",")[0], SCALED[case]
    parameters = {"rope_type": rope_type, "rope_theta": theta, **scaling}
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=131072, rope_parameters=parameters)
    expected, expected_factor = ROPE_INIT_FUNCTIONS[rope_type](config, device=None)

    found, factor = rope_frequencies(RopeConfig(theta=theta, rope_type=rope_type, **scaling), head_dim)

    assert found.shape == (head_dim // 2,)
    assert factor == pytest.approx(expected_factor, rel=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


def test_default_frequencies_equal_transformers() -> None:
    rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    config = LlamaConfig(head_dim=128, rope_parameters=rope_parameters)
    found, factor = rope_frequencies(RopeConfig(theta=5e5), 128)
    assert torch.equal(found, LlamaRotaryEmbedding(config).inv_freq)
    assert factor == 1.0


def test_scaling_changes_what_it_should() -> None:
    """Guards the comparison above against cases in which all rope types happen to agree."""
    plain, _ = rope_frequencies(RopeConfig(theta=1e4), 128)
    for case, scaling in SCALED.items():
        rope = RopeConfig(theta=1e4, rope_type=case.split(",")[0], **scaling)
        assert not torch.equal(rope_frequencies(rope, 128)[0], plain), case


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope", "proportional", "mrope"])
def test_other_types_are_refused_by_name(rope_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"rope type '{rope_type}' is not supported"):
        RopeConfig(theta=1e4, rope_type=rope_type)
