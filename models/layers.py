"""One decoder block, read from a checkpoint and laid out for few rows.

R rows, H query heads, G key/value heads, D head size; of the heads, those of this rank. Query, key and
value projections are packed into one matrix, as are gate and up; within each head of queries and keys the two
halves that rotate together are interleaved, so that rotation is one complex product.
"""

import torch

from outrider.kernels.layer_stack import LayerWeights
from outrider.kernels.linear import Linear
from outrider.models.attention import Attention
from outrider.models.kernel_set import KernelSet
from outrider.models.quantization import MakeLinear
from outrider.models.sharding import Shard
from outrider.models.weights import Checkpoint


class BlockReader:
    """Reads the tensors of one block in the engine's dtype, to where it computes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        index: int,
        dtype: torch.dtype,
        device: torch.device,
        make_linear: MakeLinear,
    ) -> None:
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device
        self._make_linear = make_linear
        self._prefix = f"model.layers.{index}."

    def vector(self, name: str, size: int, rows: slice | None = None) -> torch.Tensor:
        return self._here(self._checkpoint.tensor(f"{self._prefix}{name}", (size,), rows=rows))

    def linear(
        self,
        names: tuple[str, ...],
        shape: tuple[int, int],
        *,
        rows: slice | None = None,
        columns: slice | None = None,
        bias: bool,
    ) -> Linear:
        """The given rows or columns of the matrices ``names``, each of this ``shape``, stacked."""
        weights, biases = [], []
        for name in names:
            full_name = f"{self._prefix}{name}.weight"
            weight = self._checkpoint.tensor(full_name, shape, rows=rows, columns=columns)
            weights.append(self._here(weight))
            if bias:
                biases.append(self.vector(f"{name}.bias", shape[0], rows))
        return self._make_linear(torch.cat(weights), torch.cat(biases) if bias else None)

    def rotary_linear(self, shard: Shard) -> Linear:
        """Queries, keys and values stacked, with the rotating halves of each head interleaved."""
        config, D = shard.whole, shard.whole.head_dim
        parts = (
            ("q", config.num_heads * D, shard.query),
            ("k", config.num_kv_heads * D, shard.key_value),
            ("v", config.num_kv_heads * D, shard.key_value),
        )
        weights, biases = [], []
        for kind, size, rows in parts:
            name = f"{self._prefix}self_attn.{kind}_proj.weight"
            weight = self._here(self._checkpoint.tensor(name, (size, config.hidden_size), rows=rows))
            weights.append(weight if kind == "v" else interleave(weight, D))
            if config.qkv_bias:
                bias = self.vector(f"self_attn.{kind}_proj.bias", size, rows)
                biases.append(bias if kind == "v" else interleave(bias, D))
        return self._make_linear(torch.cat(weights), torch.cat(biases) if biases else None)

    def _here(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, self._dtype)


def interleave(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorders dimension 0 within heads from (first half, second half) to alternating pairs."""
    rest = x.shape[1:]
    return x.view(-1, 2, head_dim // 2, *rest).transpose(1, 2).reshape(x.shape)


class Block:
    """Attention and feed-forward of one layer."""

    def __init__(
        self,
        shard: Shard,
        checkpoint: Checkpoint,
        index: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: KernelSet,
        make_linear: MakeLinear,
    ) -> None:
        reader = BlockReader(checkpoint, index, dtype, device, make_linear)
        config = shard.whole
        self._rms_norm, self._silu_mul = kernels.rms_norm, kernels.silu_mul
        hidden, inner, D = config.hidden_size, config.intermediate_size, config.head_dim
        self.ranks, self.eps = shard.ranks, config.rms_norm_eps
        self.attention_dtype = torch.promote_types(dtype, torch.float32)
        self.H, self.G, self.D = shard.own.num_heads, shard.own.num_kv_heads, D
        self.input_norm = reader.vector("input_layernorm.weight", hidden)
        self.qkv = reader.rotary_linear(shard)
        self.qk_norm = self._qk_norm(reader) if config.qk_norm else None
        self.output = reader.linear(
            ("self_attn.o_proj",),
            (hidden, config.num_heads * D),
            columns=shard.attended,
            bias=config.output_bias and shard.adds_biases,
        )
        self.post_norm = reader.vector("post_attention_layernorm.weight", hidden)
        self.gate_up = reader.linear(
            ("mlp.gate_proj", "mlp.up_proj"), (inner, hidden), rows=shard.inner, bias=config.mlp_bias
        )
        self.down = reader.linear(
            ("mlp.down_proj",),
            (hidden, inner),
            columns=shard.inner,
            bias=config.mlp_bias and shard.adds_biases,
        )

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.output, self.gate_up, self.down

    @property
    def weights(self) -> LayerWeights:
        return LayerWeights(
            input_norm=self.input_norm,
            qkv=self.qkv,
            qk_norm=self.qk_norm,
            output=self.output,
            post_norm=self.post_norm,
            gate_up=self.gate_up,
            down=self.down,
        )

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
        heads = self.qkv(self._rms_norm(x, self.input_norm, self.eps, add))
        attention(heads, self.qk_norm, self.eps, pool, attended)
        add = self.ranks.sum(self.output(attended))
        inner = self._silu_mul(self.gate_up(self._rms_norm(x, self.post_norm, self.eps, add)))
        return self.ranks.sum(self.down(inner))
