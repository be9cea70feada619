"""One decoder block, read from a checkpoint and laid out for few rows.

R rows, H query heads, G key/value heads, D head size. Query, key and value projections are
packed into one matrix, as are gate and up; within each head of queries and keys the two
halves that rotate together are interleaved, so that rotation is one complex product.
"""

import torch

from outrider.kernels.linear import Linear
from outrider.kernels.pointwise import rms_norm, silu_mul
from outrider.models.attention import Attention
from outrider.models.config import ModelConfig
from outrider.models.weights import Checkpoint


class BlockReader:
    """Reads the tensors of one block in the engine's dtype."""

    def __init__(self, checkpoint: Checkpoint, index: int, dtype: torch.dtype) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype
        self._prefix = f"model.layers.{index}."

    def vector(self, name: str, size: int) -> torch.Tensor:
        return self._checkpoint.tensor(f"{self._prefix}{name}", (size,)).to(self._dtype)

    def linear(self, names: tuple[str, ...], sizes: tuple[int, ...], inputs: int, *, bias: bool) -> Linear:
        """The matrices ``names`` with ``sizes`` outputs each, stacked."""
        weights, biases = [], []
        for name, size in zip(names, sizes, strict=True):
            weight = self._checkpoint.tensor(f"{self._prefix}{name}.weight", (size, inputs))
            weights.append(weight.to(self._dtype))
            if bias:
                biases.append(self.vector(f"{name}.bias", size))
        return Linear(torch.cat(weights), torch.cat(biases) if bias else None)

    def rotary_linear(self, config: ModelConfig) -> Linear:
        """Queries, keys and values stacked, with the rotating halves of each head interleaved."""
        D = config.head_dim
        sizes = (config.num_heads * D, config.num_kv_heads * D, config.num_kv_heads * D)
        weights, biases = [], []
        for kind, size in zip("qkv", sizes, strict=True):
            name = f"{self._prefix}self_attn.{kind}_proj"
            weight = self._checkpoint.tensor(f"{name}.weight", (size, config.hidden_size)).to(self._dtype)
            weights.append(weight if kind == "v" else interleave(weight, D))
            if config.qkv_bias:
                bias = self._checkpoint.tensor(f"{name}.bias", (size,)).to(self._dtype)
                biases.append(bias if kind == "v" else interleave(bias, D))
        return Linear(torch.cat(weights), torch.cat(biases) if biases else None)


def interleave(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorders dimension 0 within heads from (first half, second half) to alternating pairs."""
    rest = x.shape[1:]
    return x.view(-1, 2, head_dim // 2, *rest).transpose(1, 2).reshape(x.shape)


class Block:
    """Attention and feed-forward of one layer."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, index: int, dtype: torch.dtype) -> None:
        reader = BlockReader(checkpoint, index, dtype)
        hidden, inner, D = config.hidden_size, config.intermediate_size, config.head_dim
        self.eps = config.rms_norm_eps
        self.attention_dtype = torch.promote_types(dtype, torch.float32)
        H, G = config.num_heads, config.num_kv_heads
        self.H, self.G, self.D = H, G, D
        self.input_norm = reader.vector("input_layernorm.weight", hidden)
        self.qkv = reader.rotary_linear(config)
        self.qk_norm = self._qk_norm(reader) if config.qk_norm else None
        self.output = reader.linear(("self_attn.o_proj",), (hidden,), H * D, bias=config.output_bias)
        self.post_norm = reader.vector("post_attention_layernorm.weight", hidden)
        self.gate_up = reader.linear(
            ("mlp.gate_proj", "mlp.up_proj"), (inner, inner), hidden, bias=config.mlp_bias
        )
        self.down = reader.linear(("mlp.down_proj",), (hidden,), inner, bias=config.mlp_bias)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.output, self.gate_up, self.down

    def _qk_norm(self, reader: BlockReader) -> torch.Tensor:
        """Norm weights of all query and key heads ``[H + G, D]``, interleaved like them."""
        q = interleave(reader.vector("self_attn.q_norm.weight", self.D), self.D)
        k = interleave(reader.vector("self_attn.k_norm.weight", self.D), self.D)
        return torch.cat((q.expand(self.H, -1), k.expand(self.G, -1))).to(self.attention_dtype)

    def __call__(
        self,
        x: torch.Tensor,
        add: torch.Tensor | None,
        attention: Attention,
        pool: torch.Tensor,
        attended: torch.Tensor,
    ) -> torch.Tensor:
        """Writes the rows' KV; returns what its feed-forward adds to ``x`` ``[R, hidden]``.

        add: what the block before left to be added; goes into ``x`` in place, as does attention.
        pool: ``[N, 2, G, D]``. attended: ``[R, H * D]``, a buffer.
        """
        heads = self.qkv(rms_norm(x, self.input_norm, self.eps, add))
        attention(heads, self.qk_norm, self.eps, pool, attended)
        normed = rms_norm(x, self.post_norm, self.eps, self.output(attended))
        return self.down(silu_mul(self.gate_up(normed)))
