"""A decoder's step with PyTorch's operators, as lean as they allow: what native kernels are compared with."""

from pathlib import Path

import torch
import torch.nn.functional as F

from outrider.models.config import load_config
from outrider.models.weights import Checkpoint


class LeanLoop:
    """A Llama in bfloat16, its cache allocated once, products that have the same input put together.

    Rows are a chain behind the text, and logits are computed for all of them, as a step of Outrider does.
    """

    def __init__(self, folder: Path, context: int, most_rows: int) -> None:
        config, checkpoint = load_config(folder), Checkpoint(folder)
        self._eps, self._context = config.rms_norm_eps, context
        self._heads, self._kv_heads, self._dim = config.num_heads, config.num_kv_heads, config.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size
        of_heads = {
            "q": self._heads * self._dim,
            "k": self._kv_heads * self._dim,
            "v": self._kv_heads * self._dim,
        }

        def read(name: str, *shape: int) -> torch.Tensor:
            return checkpoint.tensor(f"model.{name}.weight", shape).to(torch.bfloat16)

        self._embedding, self._norm = (
            read("embed_tokens", config.vocab_size, hidden),
            read("norm", hidden),
        )
        self._layers = [
            (
                read(f"layers.{i}.input_layernorm", hidden),
                torch.cat(
                    [read(f"layers.{i}.self_attn.{n}_proj", outs, hidden) for n, outs in of_heads.items()]
                ),
                read(f"layers.{i}.self_attn.o_proj", hidden, of_heads["q"]),
                read(f"layers.{i}.post_attention_layernorm", hidden),
                torch.cat([read(f"layers.{i}.mlp.{n}_proj", inner, hidden) for n in ("gate", "up")]),
                read(f"layers.{i}.mlp.down_proj", hidden, inner),
            )
            for i in range(config.num_layers)
        ]
        length = context + most_rows
        inverse = config.rope.theta ** (-torch.arange(0, self._dim, 2) / self._dim)
        angles = (torch.arange(length)[:, None] * inverse).repeat(1, 2)
        self._cos, self._sin = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)
        self._cache = torch.zeros(
            config.num_layers, 2, 1, self._kv_heads, length, self._dim, dtype=torch.bfloat16
        )
        self._masks = torch.ones(most_rows, length, dtype=torch.bool).tril(context)

    def fill(self, tokens: torch.Tensor) -> None:
        """Puts a text of ``context`` tokens into the cache."""
        self._forward(tokens, 0, torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril())

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits ``[rows, vocabulary]`` of a chain of tokens behind the text."""
        rows = len(tokens)
        mask = None if rows == 1 else self._masks[:rows, : self._context + rows]
        return self._forward(tokens, self._context, mask)

    def _forward(self, tokens: torch.Tensor, start: int, mask: torch.Tensor | None) -> torch.Tensor:
        rows, H, G, D = len(tokens), self._heads, self._kv_heads, self._dim
        end = start + rows
        cos, sin = self._cos[start:end], self._sin[start:end]
        x = self._embedding[tokens]
        for (input_norm, qkv, output, post_norm, gate_up, down), (keys, values) in zip(
            self._layers, self._cache, strict=True
        ):
            heads = F.linear(F.rms_norm(x, x.shape[1:], input_norm, self._eps), qkv)
            heads = heads.view(rows, H + 2 * G, D).transpose(0, 1)
            turned = heads[: H + G]
            half = torch.cat((-turned[..., D // 2 :], turned[..., : D // 2]), -1)
            turned = turned * cos + half * sin
            keys[0, :, start:end], values[0, :, start:end] = turned[H:], heads[H + G :]
            attended = F.scaled_dot_product_attention(
                turned[None, :H], keys[:, :, :end], values[:, :, :end], mask, enable_gqa=True
            )
            x = x + F.linear(attended[0].transpose(0, 1).reshape(rows, H * D), output)
            gate, up = F.linear(F.rms_norm(x, x.shape[1:], post_norm, self._eps), gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        return F.linear(F.rms_norm(x, x.shape[1:], self._norm, self._eps), self._embedding)
