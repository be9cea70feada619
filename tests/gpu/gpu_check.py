"""Checks kernels, whole models and captured steps on a real device, and times them: ``make gpu-check``.

Prints what it finds and, as its last line, one JSON object. Exits with 1 if a check failed; without a
CUDA device it says so, does nothing and exits with 0.

A check is a function of a ``Setup`` that returns figures for the JSON and raises AssertionError; to
add one, add it to ``CHECKS``. Errors are compared with those of PyTorch's own operators in the same
dtype, both against float64.
"""

import json
import sys
import traceback
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
import triton
from gpu.ranks import check_two_ranks
from gpu.setup import FULL, Figures, Setup, assert_no_worse, name_of, random, ratio_of_errors
from gpu.whole_models import check_captured_steps, check_flips, check_models, time_decoding
from instruments.paged_batches import BLOCK, PagedBatch, Text, chain, paged_batch
from torch.nn.attention.bias import causal_lower_right

from outrider.kernels import gumbel as gumbel_reference
from outrider.kernels.gpu import gumbel, pointwise
from outrider.kernels.gpu.kv_move import kv_move
from outrider.kernels.gpu.path_attention import path_attention
from outrider.kernels.gpu.rotary import rotate_and_write
from outrider.kernels.gpu.tree_attention import tree_attention
from outrider.kernels.kv_move import kv_move as kv_move_reference
from outrider.kernels.paged_attention import tree_attention_reference
from outrider.kernels.rotary import rotate_and_write_reference

SLOWEST = 1.5
"""Attention of chains may take so many times as long as PyTorch's."""


def ragged(setup: Setup, shape: tuple[int, int, int], dtype: torch.dtype, window: int | None) -> PagedBatch:
    """Decoding, the end of a prompt, a full tree, a chain, a first token, a tree below nothing."""
    texts = [
        Text(committed=setup.context),
        Text(committed=setup.context // 3, chunk=min(64, setup.context // 3)),
        Text(committed=setup.context // 2, parents=[(node - 1) // 2 for node in range(setup.tree)]),
        Text(committed=BLOCK - 1, parents=chain(8)),
        Text(committed=1),
        Text(committed=0, chunk=0, parents=[-1, 0, 0]),
    ]
    return paged_batch(texts, shape, dtype, window=window, device=setup.device)


def attention_of_pytorch(batch: PagedBatch) -> torch.Tensor:
    """Every row by itself over its gathered keys, in the batch's dtype."""
    rows = []
    for q, slots in zip(batch.q, batch.slots, strict=True):
        keys, values = batch.pool[slots].permute(1, 2, 0, 3)[:, None]
        row = F.scaled_dot_product_attention(q[None, :, None], keys, values, scale=1.0, enable_gqa=True)
        rows.append(row[0, :, 0])
    return torch.stack(rows)


def check_attention(setup: Setup) -> Figures:
    """Both kernels on ragged batches, with and without a window."""
    ratios = {}
    for dtype in setup.dtypes:
        for shape in setup.shapes:
            for window in (None, setup.context // 4):
                batch = ragged(setup, shape, dtype, window)
                exact = tree_attention_reference(batch.q, batch.pool, batch.tree, BLOCK)
                plain = attention_of_pytorch(batch)
                name = f"{name_of(shape, dtype)} window {window}"
                tree = tree_attention(batch.q, batch.pool, batch.tree, BLOCK)
                path = path_attention(batch.q, batch.pool, batch.paths, BLOCK)
                ratios[f"tree {name}"] = ratio_of_errors(tree, plain, exact)
                ratios[f"path {name}"] = ratio_of_errors(path, plain, exact)
    return assert_no_worse(ratios)


def check_canonical_bits(setup: Setup) -> Figures:
    """A row's bits are the same alone, and the same when its nodes have become text elsewhere."""
    compared = 0
    for dtype in setup.dtypes:
        for shape in setup.shapes:
            batch = ragged(setup, shape, dtype, None)
            together = path_attention(batch.q, batch.pool, batch.paths, BLOCK)
            for row in range(0, len(batch.q), 7):
                length = len(batch.slots[row])
                text = paged_batch([Text(committed=length)], shape, dtype, device=setup.device, seed=1)
                text.pool[text.slots[0]] = batch.pool[batch.slots[row]]
                alone = path_attention(batch.q[row : row + 1], text.pool, text.paths, BLOCK)
                assert torch.equal(alone[0], together[row]), (name_of(shape, dtype), row)
                compared += 1
    return {"rows": compared}


def check_pointwise(setup: Setup) -> Figures:
    ratios = {}
    for dtype in setup.dtypes:
        x, add = (random(setup, setup.rows, setup.hidden, seed=seed).to(dtype) for seed in (0, 1))
        weight = random(setup, setup.hidden, seed=2).to(dtype)
        total = x + add
        exact = F.rms_norm(total.double(), weight.shape, weight.double(), 1e-6)
        plain = F.rms_norm(total, weight.shape, weight, 1e-6)
        got = pointwise.rms_norm(x, weight, 1e-6, add)
        assert torch.equal(x, total)
        ratios[f"rms_norm {dtype}"] = ratio_of_errors(got, plain, exact)
        gate, up = total[:, ::2], total[:, 1::2]
        got = pointwise.silu_mul(torch.cat((gate, up), 1))
        exact = F.silu(gate.double()) * up.double()
        ratios[f"silu_mul {dtype}"] = ratio_of_errors(got, F.silu(gate) * up, exact)
    return assert_no_worse(ratios)


def check_rotation(setup: Setup) -> Figures:
    ratios = {}
    for dtype in setup.dtypes:
        for H, G, D in setup.shapes:
            heads = random(setup, setup.rows, (H + 2 * G) * D).to(dtype)
            norm, angles = random(setup, H + G, D, seed=1), random(setup, setup.rows, 2, D // 2, seed=2)
            turns = torch.polar(torch.ones_like(angles), 1000 * angles)
            slots = torch.randperm(2 * setup.rows, device=setup.device)[: setup.rows]
            pool = torch.zeros(2 * setup.rows, 2, G, D, dtype=dtype, device=setup.device)
            plain, exact = pool.clone(), pool.double()
            wide = (heads.double(), norm.double(), 1e-6, turns.to(torch.complex128), slots)
            exact_q = rotate_and_write_reference(*wide, exact)
            plain_q = rotate_and_write_reference(heads, norm, 1e-6, turns, slots, plain)
            q = rotate_and_write(heads, norm, 1e-6, turns, slots, pool)
            name = name_of((H, G, D), dtype)
            ratios[f"queries {name}"] = ratio_of_errors(q, plain_q, exact_q)
            ratios[f"entries {name}"] = ratio_of_errors(pool, plain, exact)
    return assert_no_worse(ratios)


def check_kv_move(setup: Setup) -> Figures:
    for dtype in setup.dtypes:
        pool = random(setup, 4, 3 * setup.rows, 2, 8, 128).to(dtype)
        expected = pool.clone()
        source, target = torch.randperm(3 * setup.rows, device=setup.device)[: 2 * setup.rows].chunk(2)
        kv_move(pool, source, target)
        kv_move_reference(expected, source, target)
        assert torch.equal(pool, expected)
    return {}


def check_race(setup: Setup) -> Figures:
    """Winners are the CPU's; noise is, but for the last bit where a library's logarithm shows."""
    keys = torch.from_numpy(gumbel_reference.stream_keys(5, np.arange(setup.rows), 0))
    expected = gumbel_reference.exponential_noise(*keys, setup.vocab)
    on_device = keys.to(setup.device)
    noise = gumbel.exponential_noise(*on_device, setup.vocab).cpu()
    torch.testing.assert_close(noise, expected, rtol=2 * torch.finfo(torch.float32).eps, atol=0)
    different = float((noise != expected).double().mean())
    assert different < 1e-5, different
    probs = (2 * random(setup, setup.rows, setup.vocab)).softmax(-1)
    probs[0], probs[1, 5:] = 0, 0
    winners = gumbel.draw(probs, *on_device).cpu()
    assert torch.equal(winners, gumbel_reference.draw(probs.cpu(), *keys))
    return {"different_noise": different}


def time_chains(setup: Setup) -> Figures:
    """At most ``SLOWEST`` times as long as PyTorch's attention over the same keys, contiguous.

    Milliseconds for chains of eight nodes.
    """
    figures = {}
    H, G, D = setup.shapes[0]
    for context, sequences in setup.timed:
        text = Text(committed=context, parents=chain(8))
        batch = paged_batch([text] * sequences, setup.shapes[0], setup.dtypes[0], device=setup.device)
        rows = len(text.paths())
        keys = random(setup, sequences, G, context + 8, D).to(setup.dtypes[0])
        q, values = batch.q.view(sequences, rows, H, D).transpose(1, 2).contiguous(), keys.clone()
        mask = causal_lower_right(rows, context + 8)
        calls: dict[str, Callable[[], torch.Tensor]] = {
            "tree": lambda b=batch: tree_attention(b.q, b.pool, b.tree, BLOCK),
            "path": lambda b=batch: path_attention(b.q, b.pool, b.paths, BLOCK),
            "pytorch": lambda q=q, k=keys, v=values, mask=mask: F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=1.0, enable_gqa=True
            ),
        }
        times = {name: triton.testing.do_bench(call, return_mode="median") for name, call in calls.items()}
        read = 2 * keys.numel() * keys.itemsize
        assert times["tree"] <= SLOWEST * times["pytorch"], (context, sequences, times)
        figures[f"{sequences} x {context}"] = {
            **{f"{name}_ms": round(ms, 4) for name, ms in times.items()},
            "tree_gb_per_s": round(read / times["tree"] / 1e6, 1),
        }
    return figures


Check = Callable[[Setup], Figures]
CHECKS: tuple[Check, ...] = (
    check_attention,
    check_canonical_bits,
    check_pointwise,
    check_rotation,
    check_kv_move,
    check_race,
    check_models,
    check_captured_steps,
    check_flips,
    check_two_ranks,
    time_chains,
    time_decoding,
)


def run(checks: Sequence[Check], setup: Setup) -> dict[str, Figures]:
    """Every check's figures; one that fails does not keep the others from running."""
    results = {}
    for check in checks:
        try:
            results[check.__name__] = {"ok": True, **check(setup)}
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            results[check.__name__] = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        print(check.__name__, results[check.__name__], flush=True)
    return results


def main(checks: Sequence[Check] = CHECKS, setup: Setup = FULL) -> int:
    if not torch.cuda.is_available() and setup.device == "cuda":
        print("There is no CUDA device: nothing was checked.")
        print(json.dumps({"ran": False}))
        return 0
    results = run(checks, setup)
    passed = all(result["ok"] for result in results.values())
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    device = torch.cuda.get_device_name() if setup.device == "cuda" else setup.device
    print(json.dumps({"ran": True, "ok": passed, "device": device, **versions, "checks": results}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
