"""Builds the embedded demo pair: tokenizer, target, and a draft distilled from the target.

    python -m outrider.models.demo.build --out DIR [--tokens N] [--draft-tokens N] [--threads 2]

Seeded and offline. Three steps, each skipped when its result already stands in DIR:
a byte-level BPE over the training split, a target trained on next tokens, and a draft
trained on the Kullback-Leibler divergence from the target's distribution (Hinton et al.,
"Distilling the Knowledge in a Neural Network", at temperature 1 and without hard labels).
Both are saved as bfloat16 safetensors in Hugging Face folders. About an hour on two cores
with AVX-512 bf16.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from outrider.models.demo import corpus

VOCAB_SIZE = 4096
SHORT_LENGTH = 512
LONG_LENGTH = 2048
LONG_SHARE = 0.12
"""Last share of training at ``LONG_LENGTH``, so that the whole context is usable."""

# GPT-4's split: runs of indentation stay together, digits go in threes.
SPLIT_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Shape and schedule of one model; ``peak_lr`` is reached after ``warmup_steps``.

    tokens: seen in training. tokens_per_step: in one batch, at least ``LONG_LENGTH``.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    peak_lr: float
    tokens: int
    tokens_per_step: int
    seed: int
    warmup_steps: int = 100

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.hidden_size // self.num_heads,
            max_position_embeddings=LONG_LENGTH,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="sdpa",
        )


def train_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training split, saved as a Hugging Face tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[corpus.END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (corpus.read_source(path) for path in corpus.source_files(held_out=False))
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=corpus.END_OF_TEXT,
        eos_token=corpus.END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=LONG_LENGTH,
    )
    fast.save_pretrained(folder)
    return fast


def encode_files(tokenizer: PreTrainedTokenizerFast, paths: list[Path]) -> torch.Tensor:
    """One int64 stream ``[tokens]`` of all files, each ended by the end-of-text token."""
    encodings = tokenizer.backend_tokenizer.encode_batch([corpus.read_source(p) for p in paths])
    ids: list[int] = []
    for encoding in encodings:
        ids += encoding.ids
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def training_stream(tokenizer: PreTrainedTokenizerFast, seed: int) -> torch.Tensor:
    paths = list(corpus.source_files(held_out=False))
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
    return encode_files(tokenizer, [paths[i] for i in order])


def batches(stream: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Batches ``[rows, length+1]`` until enough tokens were seen; each epoch is cut at a new offset."""
    generator = torch.Generator().manual_seed(recipe.seed)
    phases = ((SHORT_LENGTH, round(recipe.tokens * (1 - LONG_SHARE))), (LONG_LENGTH, recipe.tokens))
    seen = 0
    for length, until in phases:
        rows = recipe.tokens_per_step // length
        while seen < until:
            offset = int(torch.randint(length, (1,), generator=generator))
            windows = stream[offset:].unfold(0, length + 1, length)
            order = torch.randperm(len(windows), generator=generator)
            for start in range(0, len(order) - rows + 1, rows):
                yield windows[order[start : start + rows]]
                seen += rows * length
                if seen >= until:
                    break


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Linear warm-up, then cosine down to a tenth of a percent of the peak."""
    if step < recipe.warmup_steps:
        return recipe.peak_lr * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
    return recipe.peak_lr * max(0.001, 0.5 * (1 + math.cos(math.pi * done)))


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher ‖ student) over positions; both are logits ``[rows, length, vocab]``."""
    return F.kl_div(
        F.log_softmax(student.float(), -1).flatten(0, 1),
        F.log_softmax(teacher.float(), -1).flatten(0, 1),
        reduction="batchmean",
        log_target=True,
    )


def next_token_loss(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def train(
    recipe: Recipe, stream: torch.Tensor, *, teacher: LlamaForCausalLM | None, name: str
) -> LlamaForCausalLM:
    """Trains one model in bfloat16 autocast with float32 weights; distils when a teacher is given."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(recipe.config())
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.peak_lr, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    steps = math.ceil(recipe.tokens / recipe.tokens_per_step)
    began = time.monotonic()
    recent = 0.0
    for step, rows in enumerate(batches(stream, recipe)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
            if teacher is None:
                loss = next_token_loss(logits, rows)
            else:
                with torch.no_grad():
                    wanted = teacher(input_ids=rows[:, :-1], use_cache=False).logits
                loss = distillation_loss(logits, wanted)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent += loss.item()
        if (step + 1) % 50 == 0:
            minutes = (time.monotonic() - began) / 60
            print(f"{name} step {step + 1}/{steps} loss {recent / 50:.4f} {minutes:.1f} min", flush=True)
            recent = 0.0
    return model.to(torch.bfloat16)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)


def ngram_overlap(train_ids: list[int], held_out_ids: list[int], n: int) -> float:
    """Share of held-out n-grams that also occur in the training text."""
    known = {tuple(train_ids[i : i + n]) for i in range(len(train_ids) - n + 1)}
    total = len(held_out_ids) - n + 1
    hits = sum(tuple(held_out_ids[i : i + n]) in known for i in range(total))
    return hits / total


def report(folder: Path, tokenizer: PreTrainedTokenizerFast, stream: torch.Tensor) -> None:
    """Writes ``corpus.json``: the split and how much of the held-out text the pair has seen."""
    held_out = corpus.held_out_library_files()
    ids = encode_files(tokenizer, held_out).tolist()
    known = stream.tolist()
    figures = {
        "held_out_packages": list(corpus.HELD_OUT_PACKAGES),
        "train_files": len(list(corpus.source_files(held_out=False))),
        "train_tokens": len(known),
        "held_out_files": len(held_out),
        "held_out_tokens": len(ids),
        "held_out_ngrams_seen_in_training": {
            str(n): round(ngram_overlap(known, ids, n), 4) for n in (4, 8, 16, 32)
        },
    }
    (folder / "corpus.json").write_text(json.dumps(figures, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=6_000_000, help="seen by the target")
    parser.add_argument("--draft-tokens", type=int, default=8_000_000, help="seen by the draft")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    target_dir, draft_dir = args.out / "target", args.out / "draft"
    if (target_dir / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(target_dir)
    else:
        tokenizer = train_tokenizer(target_dir)
    stream = training_stream(tokenizer, seed=1)
    report(args.out, tokenizer, stream)
    if not (target_dir / "model.safetensors").exists():
        recipe = Recipe(
            hidden_size=384, intermediate_size=1024, num_layers=6, num_heads=6, num_kv_heads=2,
            peak_lr=1.5e-3, tokens=args.tokens, tokens_per_step=4096, seed=2,
        )  # fmt: skip
        save(train(recipe, stream, teacher=None, name="target"), tokenizer, target_dir)
    if not (draft_dir / "model.safetensors").exists():
        teacher = LlamaForCausalLM.from_pretrained(target_dir, dtype=torch.bfloat16).eval()
        recipe = Recipe(
            hidden_size=192, intermediate_size=512, num_layers=3, num_heads=3, num_kv_heads=1,
            peak_lr=2.5e-3, tokens=args.draft_tokens, tokens_per_step=2048, seed=3,
        )  # fmt: skip
        save(train(recipe, stream, teacher=teacher, name="draft"), tokenizer, draft_dir)


if __name__ == "__main__":
    main()
