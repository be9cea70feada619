"""The decoder of Llama, Qwen2 and Qwen3: rows in, logits out."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from outrider.kernels.layer_stack import Ends, LayerStack
from outrider.kernels.native import library
from outrider.kernels.paged_attention import PagedPaths, TreeKeys
from outrider.kernels.path_attention import MAX_HEAD_DIM, PathAttention, PathKeys
from outrider.kernels.tree_attention import Scratch, TreeAttention
from outrider.models.attention import Attention, PagedAttention, SharedAttention
from outrider.models.batch import Batch
from outrider.models.block_pool import BLOCK
from outrider.models.config import ModelConfig
from outrider.models.cuda_graphs import CapturedSteps, common_rooms, largest_room
from outrider.models.device import CPU
from outrider.models.device_memory import DeviceMemory, measured, scarcest
from outrider.models.kernel_set import ON_CPU, KernelSet
from outrider.models.kv_cache import TRASH_SLOT, KVCache
from outrider.models.layers import Block
from outrider.models.numerics import MAX_ROWS, MAX_TAIL, Numerics, RowClasses, agreed, probe
from outrider.models.packed_batch import PackedBatch, Room
from outrider.models.parallel import ALONE, TensorParallel
from outrider.models.quantization import linear_maker
from outrider.models.rope import rope_frequencies
from outrider.models.sharding import Shard
from outrider.models.weights import Checkpoint
from outrider.speculation.errors import UnsupportedModelError
from outrider.speculation.tree import MAX_TREE_DEPTH


class Decoder:
    """A network whose weights are loaded and packed, or the part of it that one rank holds.

    max_model_len: tokens of the longest sequence; the rotation table and score buffers
        are made for it once.
    ranks: those that hold the other parts. All of them load and run the same forwards together.
    device, kernels: where it computes and with what.
    quantization: of the weights of linear layers, ``int8`` or None.
    config: as if this rank's part were all of the network, but for its vocabulary.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        numerics: Numerics,
        max_model_len: int,
        ranks: TensorParallel = ALONE,
        device: torch.device = CPU,
        kernels: KernelSet = ON_CPU,
        quantization: str | None = None,
    ) -> None:
        self.ranks, self.shard = ranks, Shard(config, ranks)
        self.config, self.dtype, self.max_model_len = self.shard.own, dtype, max_model_len
        self.device, self.kernels = device, kernels
        self.attention_dtype = torch.promote_types(dtype, torch.float32)
        self._captured: CapturedSteps | None = None
        slides = config.sliding_window is not None and config.sliding_window < max_model_len
        self.window = config.sliding_window if slides else None
        """Tokens that a row attends; None where that is the whole context."""
        self.embedding = self.shard.of_vocabulary(checkpoint, "model.embed_tokens.weight", dtype, device)
        make_linear = linear_maker(quantization, checkpoint.folder, device)
        self.blocks = [
            Block(
                self.shard,
                checkpoint,
                i,
                dtype=dtype,
                device=device,
                kernels=kernels,
                make_linear=make_linear,
            )
            for i in range(config.num_layers)
        ]
        self.norm = checkpoint.tensor("model.norm.weight", (config.hidden_size,)).to(device, dtype)
        head = (
            self.embedding
            if config.tie_word_embeddings
            else self.shard.of_vocabulary(checkpoint, "lm_head.weight", dtype, device)
        )
        self.head = make_linear(head, None)
        H, G = self.config.num_heads, self.config.num_kv_heads
        self.heads = (G, H // G, config.head_dim)
        self.rotation = self._rotation_table()
        self.classes = self._row_classes(numerics)
        self.stack = self._layer_stack()
        """All of it in one call; None where its parts run one after the other."""
        gathers = not (self.classes.by_path or self.classes.by_tree)
        keys = max_model_len + MAX_TAIL if gathers else 0
        self.scratch = Scratch(MAX_ROWS, self.heads, keys, self.attention_dtype)

    @property
    def numerics(self) -> Numerics:
        return Numerics.CANONICAL if self.classes.canonical else Numerics.FAST

    @property
    def kv_dtype(self) -> torch.dtype:
        """That of keys and values: the model's, or ``attention_dtype`` where PyTorch's products attend.

        CPU libraries multiply small bfloat16 matrices at less than half of float32's speed.
        """
        paged_or_native = self.kernels.paged is not None or self.classes.by_path
        return self.dtype if paged_or_native else self.attention_dtype

    @property
    def block_bytes(self) -> int:
        """Memory that a block of the cache takes, in all layers."""
        config = self.config
        entry = 2 * config.num_kv_heads * config.head_dim * self.kv_dtype.itemsize
        return config.num_layers * BLOCK * entry

    def make_cache(self, num_blocks: int, *, prefix_caching: bool = True) -> KVCache:
        """A pool of blocks for this network."""
        return KVCache(
            layers=self.config.num_layers,
            kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            num_blocks=num_blocks,
            dtype=self.kv_dtype,
            numerics=self.numerics,
            prefix_caching=prefix_caching,
            window=self.window,
            device=self.device,
            move=self.kernels.kv_move,
        )

    def memory(self, rows: int) -> DeviceMemory:
        """What is free of the device, and what a step of so many rows takes; 0 runs none.

        Of several ranks, all of which have to be asked, the scarcest.
        """
        return scarcest(measured(lambda: self._rehearse(rows) if rows else None), self.ranks)

    @torch.inference_mode()
    def _rehearse(self, rows: int) -> None:
        """Runs a step of so many rows below the longest text, for the memory that it takes on a device.

        Its rows attend nothing. Logits are those of four times as many rows as trees ask for: whoever
        chooses from them needs as much again.
        """
        packed = PackedBatch(largest_room(self.classes, rows, self.max_model_len), self.device)
        packed.load(None)
        batch = replace(packed.batch, logit_rows=slice(0, min(rows, 4 * MAX_ROWS)))
        self._run(batch, self.make_cache(0))

    @torch.inference_mode()
    def capture(self, cache: KVCache) -> None:
        """Captures common steps over this cache, which ``forward`` then replays, where that is possible."""
        capture = self.kernels.capture
        # What ranks send each other is not captured (docs/gpu.md).
        if capture is not None and self.ranks.size == 1:
            self._captured = CapturedSteps(
                lambda batch: self._run(batch, cache),
                common_rooms(self.classes, self.max_model_len),
                classes=self.classes,
                device=self.device,
                capture=capture,
            )

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Runs the rows and writes their KV.

        Returns logits ``[wanted, vocab]`` of the wanted rows in the model's dtype, at rank 0;
        other ranks get no more than their own part. cache: where steps were captured, that one.
        """
        if self.kernels.paged is None:
            return self._run(batch, cache)
        logits = None if self._captured is None else self._captured.forward(batch)
        return self._run(self._on_device(batch), cache) if logits is None else logits

    def _on_device(self, batch: Batch) -> Batch:
        """The batch, filled up to a row class, where the network is."""
        packed = PackedBatch(Room.of(batch, self.classes.linear_rows(len(batch.tokens))), self.device)
        packed.load(batch)
        wanted = batch.logit_rows
        return replace(
            packed.batch, logit_rows=wanted if isinstance(wanted, slice) else packed.wanted(len(wanted))
        )

    def _run(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        rows = len(batch.tokens)
        tokens, positions, slots = self._padded(batch, self.classes.linear_rows(rows))
        attention = self._attention(batch, positions, slots)
        if self.stack is not None and isinstance(attention, PathAttention):
            return self.stack(tokens, batch.logit_rows, attention, cache.pool)
        x = self.shard.embed(self.embedding, tokens)
        attended = x.new_zeros(len(x), self.config.num_heads * self.config.head_dim)
        add = None
        for block, pool in zip(self.blocks, cache.layers, strict=True):
            add = block(x, add, attention, pool, attended)
        assert add is not None
        x += add
        return self._logits(x, batch.logit_rows)

    def _attention(self, batch: Batch, positions: torch.Tensor, slots: torch.Tensor) -> Attention:
        """The step's attention; positions, slots: int64 ``[R]``, filled up to a row class."""
        keys, rows = batch.attended, len(batch.tokens)
        if isinstance(keys, PathKeys):
            native = library.layers(self.embedding)
            assert native is not None
            H, G, D = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
            return PathAttention(
                native,
                keys,
                turns=self.rotation,
                positions=batch.positions,
                slots=batch.slots,
                shape=(H, G, D),
                block=BLOCK,
            )
        if isinstance(keys, PagedPaths | TreeKeys):
            assert self.kernels.paged is not None
            return PagedAttention(self.kernels.paged, keys, turns=self.rotation[positions], slots=slots)
        canonical = self.classes.canonical
        return SharedAttention(
            TreeAttention(keys, self.heads, self.scratch, rows=rows, canonical=canonical),
            self.heads,
            rotation=self._rotation(positions),
            slots=slots,
        )

    def _logits(self, x: torch.Tensor, wanted: slice | torch.Tensor) -> torch.Tensor:
        """Logits ``[wanted, vocab]``; the head, too, takes whole row classes only.

        x: ``[R, hidden]``, R being a multiple of the row class.
        """
        quantum = self.classes.linear
        if isinstance(wanted, slice):
            # The rows around them complete the classes, so nothing is copied.
            start = wanted.start // quantum * quantum
            taken = x[start : self.classes.linear_rows(wanted.stop)]
            kept = slice(wanted.start - start, wanted.stop - start)
        else:
            taken = x[F.pad(wanted, (0, -len(wanted) % quantum), value=0)]
            kept = slice(0, len(wanted))
        if not len(taken):
            return x.new_empty(0, self.config.vocab_size)
        normed = self.kernels.rms_norm(taken, self.norm, self.config.rms_norm_eps)
        logits = self.head(normed)[kept]
        return self.ranks.columns(logits)[:, : self.config.vocab_size]

    @staticmethod
    def _padded(batch: Batch, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, positions and slots, filled up to a row class with rows nobody looks at."""
        extra = rows - len(batch.tokens)
        if not extra:
            return batch.tokens, batch.positions, batch.slots
        return (
            F.pad(batch.tokens, (0, extra), value=0),
            F.pad(batch.positions, (0, extra), value=0),
            F.pad(batch.slots, (0, extra), value=TRASH_SLOT),
        )

    def _layer_stack(self) -> LayerStack | None:
        """A step in one call, where all in it is native and ranks have nothing to sum in between."""
        if self.kernels.paged is not None or not self.classes.by_path or self.ranks.size > 1:
            return None
        if self.classes.linear > 1:  # rows to fill up a class would have nothing to attend
            return None
        ends = Ends(embedding=self.embedding, norm=self.norm, head=self.head)
        return LayerStack.of([block.weights for block in self.blocks], ends, self.config.rms_norm_eps)

    def _rotation_table(self) -> torch.Tensor:
        """Complex ``[positions, 2, D / 2]``: turns of queries, scaled by 1/sqrt(D), and of keys."""
        frequencies, magnitude = rope_frequencies(self.config.rope, self.config.head_dim)
        positions = torch.arange(self.max_model_len + MAX_TREE_DEPTH, dtype=self.attention_dtype)
        angles = positions[:, None] * frequencies.to(self.attention_dtype)
        turn = torch.polar(torch.full_like(angles, magnitude), angles)
        return torch.stack((turn * self.config.head_dim**-0.5, turn), dim=1).to(self.device)

    def _rotation(self, positions: torch.Tensor) -> torch.Tensor:
        """Complex ``[R, H + G, D / 2]``, the turn of every query and key head of each row."""
        turns = self.rotation[positions]
        return torch.cat(
            (
                turns[:, :1].expand(-1, self.config.num_heads, -1),
                turns[:, 1:].expand(-1, self.config.num_kv_heads, -1),
            ),
            dim=1,
        )

    @torch.inference_mode()
    def _row_classes(self, numerics: Numerics) -> RowClasses:
        paged = self.kernels.paged is not None
        if paged and numerics is Numerics.FAST:
            return agreed(RowClasses(canonical=False, by_tree=True), self.ranks)
        native = library.layers(self.embedding) is not None and self.config.head_dim <= MAX_HEAD_DIM
        by_path = paged or native
        if self.window is not None and not by_path:
            raise UnsupportedModelError(
                f"sliding_window {self.window}, shorter than max_model_len {self.max_model_len}, needs "
                f"bfloat16 or float32 and the native kernels, not {self.dtype}"
            )
        if numerics is Numerics.FAST:
            return agreed(RowClasses(canonical=False, by_path=by_path), self.ranks)
        own = probe(
            [*self.blocks[0].linears, self.head],
            heads=self.heads,
            max_keys=self.max_model_len,
            dtype=self.dtype,
            attention_dtype=self.attention_dtype,
            by_path=by_path,
            device=self.device,
        )
        return agreed(own, self.ranks)
