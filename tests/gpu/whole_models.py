"""Whole models on a device: against the CPU and transformers, captured and not, drafted for and plain."""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from forwards import bushy_tree, chunked_logits, extend, opened, random_ids, verify
from gpu.setup import Figures, Setup, assert_no_worse, ratio_of_errors
from instruments import drafters
from instruments.cuda_stand_in import rerun
from instruments.model_checks import VOCAB, model_engine
from instruments.serving import serve
from transformers import LlamaConfig, LlamaForCausalLM

from outrider.actors.model_runner import ModelRunner
from outrider.models.block_pool import BLOCK, blocks_for
from outrider.models.config import load_config
from outrider.models.cuda_graphs import CudaCapture
from outrider.models.decoder import Decoder
from outrider.models.device import CPU
from outrider.models.kernel_set import Capture
from outrider.models.numerics import MAX_ROWS, Numerics
from outrider.models.triton_set import triton_set
from outrider.models.weights import Checkpoint
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.tree import DraftTree

WARM, REPEATS = 3, 20
"""Steps before timed ones, and timed ones."""


@contextmanager
def random_model(setup: Setup) -> Iterator[tuple[Path, LlamaForCausalLM]]:
    """A bfloat16 model as transformers saves it, and itself on the CPU."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**setup.model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, setup.model["hidden_size"] ** -0.5)
    with tempfile.TemporaryDirectory() as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        yield Path(folder), model


def capture_of(setup: Setup) -> Capture:
    return CudaCapture() if setup.device == "cuda" else rerun


def on_device(
    folder: Path,
    setup: Setup,
    numerics: Numerics,
    *,
    capture: Capture | None = None,
) -> ModelRunner:
    decoder = Decoder(
        load_config(folder),
        Checkpoint(folder),
        dtype=torch.bfloat16,
        numerics=numerics,
        max_model_len=setup.model["max_position_embeddings"],
        device=torch.device(setup.device),
        kernels=triton_set(capture),
    )
    return ModelRunner(decoder, num_blocks=4 * blocks_for(decoder.max_model_len + MAX_ROWS))


def on_cpu(folder: Path, dtype: torch.dtype) -> ModelRunner:
    config = load_config(folder)
    context = config.max_position_embeddings
    decoder = Decoder(
        config, Checkpoint(folder), dtype=dtype, numerics=Numerics.CANONICAL, max_model_len=context
    )
    return ModelRunner(decoder, num_blocks=blocks_for(context + MAX_ROWS))


def chunks_of(length: int) -> list[int]:
    """A text in pieces, none of them more than a forward takes."""
    sizes = [min(5, length)]
    while sum(sizes) < length:
        sizes.append(min(MAX_ROWS - 3, length - sum(sizes)))
    return sizes


def check_models(setup: Setup) -> Figures:
    """Logits against float64, beside those of transformers on the device and of bfloat16 on the CPU.

    The latter's keys and values are float32, so their error may be smaller: it is only reported.
    """
    ratios, over_the_cpus = {}, {}
    with random_model(setup) as (folder, model):
        ids = random_ids(setup.text)
        chunks = chunks_of(setup.text)
        exact, _ = chunked_logits(on_cpu(folder, torch.float64), ids, chunks)
        on_this_cpu, _ = chunked_logits(on_cpu(folder, torch.bfloat16), ids, chunks)
        with torch.inference_mode():
            plain = model.to(setup.device)(input_ids=torch.from_numpy(ids)[None].to(setup.device)).logits[0]
        for numerics in Numerics:
            logits, _ = chunked_logits(on_device(folder, setup, numerics), ids, chunks)
            assert logits.dtype is torch.bfloat16
            got = logits.to(CPU)
            ratios[str(numerics)] = ratio_of_errors(got, plain.to(CPU), exact)
            over_the_cpus[str(numerics)] = round(ratio_of_errors(got, on_this_cpu, exact), 3)
    return {**assert_no_worse(ratios), "error_over_the_cpus": over_the_cpus}


def check_captured_steps(setup: Setup) -> Figures:
    """Replayed and eager logits of a prompt's piece, a tree and plain decoding: bits with ``canonical``."""
    differences = {}
    tree = bushy_tree(random_ids(2, VOCAB), junk=1)[0]
    with random_model(setup) as (folder, _):
        for numerics in Numerics:
            results = []
            for capture in (None, capture_of(setup)):
                runner = on_device(folder, setup, numerics, capture=capture)
                sequence = opened(runner, random_ids(setup.text - 3, VOCAB))
                lone = verify(runner, sequence, 5, DraftTree.empty())
                results.append(torch.cat((lone, verify(runner, sequence, 7, tree))))
            eager, captured = results
            if numerics is Numerics.CANONICAL:
                assert torch.equal(eager, captured)
            worst = (eager.double() - captured.double()).abs().max() / eager.double().abs().max()
            assert worst < 2 * torch.finfo(torch.bfloat16).eps, worst
            differences[str(numerics)] = float(worst)
    return {"largest_relative_difference": differences}


def check_flips(setup: Setup) -> Figures:
    """Texts that speculation changed: none with ``canonical``."""
    changed = {}
    with random_model(setup) as (folder, _):
        for numerics in Numerics:
            runner = on_device(folder, setup, numerics, capture=capture_of(setup))
            changed[str(numerics)] = sum(is_changed(runner, setup, sample) for sample in range(setup.samples))
    assert changed["canonical"] == 0, changed
    return {"texts": setup.samples, "changed": changed}


def is_changed(runner: ModelRunner, setup: Setup, sample: int) -> bool:
    prompt = random_ids(3, VOCAB, seed=sample).tolist()
    temperature = 0.7 * (sample % 2)
    params = SamplingParams(temperature=temperature, seed=sample, max_tokens=setup.text - 4, ignore_eos=True)
    plain = serve(model_engine(runner, None), prompt, params).token_ids
    truth = [*prompt, *plain, *([1] * 8)]
    scripted = drafters.Scripted(drafters.partly_right(truth, 4, 16, VOCAB, sample))
    return serve(model_engine(runner, scripted, depth=4), prompt, params).token_ids != plain


class RandomWeights(Checkpoint):
    """Weights that nobody saved, made where they are needed."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self._device = folder, device

    def tensor(
        self, name: str, shape: tuple[int, ...], *, rows: slice | None = None, columns: slice | None = None
    ) -> torch.Tensor:
        assert rows in (None, slice(0, shape[0])), "one rank only"
        assert columns in (None, slice(0, shape[-1])), "one rank only"
        weight = torch.randn(shape, dtype=torch.bfloat16, device=self._device)
        return weight if "norm" in name else weight.mul_(shape[-1] ** -0.5)


def time_decoding(setup: Setup) -> Figures:
    """Steps of a large random model for one text: milliseconds, and the share of a copy's bandwidth.

    What is counted as read: weights but for the embedding, and the text's keys and values.
    """
    if setup.large is None:
        return {}
    figures: Figures = {"copy_gb_per_s": round(copy_bandwidth(setup) / 1e9)}
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(**setup.large).to_dict() | {"architectures": ["LlamaForCausalLM"]}
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        for numerics in Numerics:
            for captured in (True, False):
                name = f"{numerics}, {'captured' if captured else 'eager'}"
                figures[name] = _decoding_times(Path(folder), setup, numerics, captured, figures)
                torch.cuda.empty_cache()
    for context in setup.decoded:
        fast, canonical = (figures[f"{each}, captured"][f"{context}"]["ms"] for each in ("fast", "canonical"))
        figures[f"price of canonical at {context}"] = round(canonical / fast, 3)
    return figures


def _decoding_times(
    folder: Path, setup: Setup, numerics: Numerics, captured: bool, figures: Figures
) -> Figures:
    config = load_config(folder)
    decoder = Decoder(
        config,
        RandomWeights(folder, setup.device),
        dtype=torch.bfloat16,
        numerics=numerics,
        max_model_len=config.max_position_embeddings,
        device=torch.device(setup.device),
        kernels=triton_set(capture_of(setup) if captured else None),
    )
    runner = ModelRunner(decoder, num_blocks=blocks_for(config.max_position_embeddings) + 4)
    weights = sum(linear.shape[0] * linear.shape[1] for block in decoder.blocks for linear in block.linears)
    weights = 2 * (weights + decoder.head.shape[0] * decoder.head.shape[1])
    times: dict[str, Any] = {"row_class": decoder.classes.linear}
    sequence = opened(runner, random_ids(1))
    trees = DraftTree.empty(), bushy_tree(random_ids(7), junk=0)[0], bushy_tree(random_ids(15), junk=0)[0]
    for context in setup.decoded:
        extend(runner, sequence, random_ids(context - sequence.length))
        read = weights + context * decoder.block_bytes / BLOCK
        ms = {len(tree) + 1: 1e3 * seconds_of(runner, sequence, tree) for tree in trees}
        share = read / (ms[1] / 1e3) / (1e9 * figures["copy_gb_per_s"])
        times[f"{context}"] = {
            "ms": round(ms[1], 3),
            "of_copy_bandwidth": round(share, 3),
            **{f"ms_of_{rows}_rows": round(each, 3) for rows, each in ms.items() if rows > 1},
        }
    return times


def seconds_of(runner: ModelRunner, sequence: Any, tree: DraftTree) -> float:
    """A step as an engine sees it: from numbers on the CPU to a token there."""
    seconds = []
    for _ in range(WARM + REPEATS):
        began = time.perf_counter()
        logits = verify(runner, sequence, 5, tree)
        logits.argmax(1).cpu()
        seconds.append(time.perf_counter() - began)
        sequence.length -= 1
    return median(seconds[WARM:])


def copy_bandwidth(setup: Setup) -> float:
    """Bytes per second that a copy of 2 GiB reads and writes."""
    source = torch.empty(2**31, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    ms = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.numel() / (ms / 1e3)
