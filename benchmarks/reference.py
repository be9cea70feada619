"""Other projects' parallel speculative decoding, run from checkouts of theirs, with this project's models.

Each takes two processes of one thread, its drafter on one core and its target on another. Their code is not
changed; what it expects of GPUs and of the libraries of its time is put in its way here:

- PEARL (smart-lty/ParallelSpeculativeDecoding): of ``accelerate`` a barrier and a gathering, over gloo;
  caches as lists of pairs and logits in float32, as transformers had them in 2024; "cuda:1" is the CPU.
- AMUSD (BradMcDanel/AMUSD): models on the CPU, caches that are cropped to a length, and no end of text.
"""

import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import distributed
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

START_SECONDS, TEXT_SECONDS = 180.0, 120.0


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a decoder is told.

    checkout: of the other project. window: PEARL's gamma. cores: of drafter and target. store: a new file.
    """

    checkout: Path
    target: Path
    draft: Path
    dtype: str
    tokens: int
    window: int
    cores: tuple[int, int]
    store: Path


@dataclass(frozen=True)
class Answer:
    """A text of the wanted length, of which so many tokens at its end nobody verified, or more."""

    tokens: list[int]
    unverified: int = 0


class Reference:
    """The processes of another project's decoder. The first one's answer counts."""

    def __init__(self, name: str, setup: Setup) -> None:
        """
        name: of ``REFERENCES``.

        Raises:
            SystemExit: it did not start.
        """
        context = get_context("spawn")
        self._name, self._pipes, self._processes = name, [], []
        for run in REFERENCES[name]:
            ours, theirs = context.Pipe()
            process = context.Process(target=run, args=(theirs, setup))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._receive(START_SECONDS)

    def run(self, ids: list[int]) -> Answer:
        """
        Raises:
            SystemExit: it failed, or hangs.
        """
        for pipe in self._pipes:
            pipe.send(ids)
        return self._receive(TEXT_SECONDS)[0]

    def close(self) -> None:
        """Ends the processes and theirs, whatever they do."""
        for process in self._processes:
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
            process.join()

    def _receive(self, seconds: float) -> list[Any]:
        answers = []
        for pipe in self._pipes:
            try:
                if not pipe.poll(seconds):
                    raise SystemExit(f"{self._name} did not answer within {seconds:g} s")
                answers.append(pipe.recv())
            except EOFError:
                raise SystemExit(f"{self._name} ended; what it printed says why") from None
        return answers


@contextmanager
def reference(name: str, setup: Setup) -> Iterator[Reference]:
    """name: of ``REFERENCES``."""
    running = Reference(name, setup)
    try:
        yield running
    finally:
        running.close()


def _draft_rank(pipe: Connection, setup: Setup) -> None:
    _pearl(pipe, setup, 0)


def _target_rank(pipe: Connection, setup: Setup) -> None:
    _pearl(pipe, setup, 1)


def _pearl(pipe: Connection, setup: Setup, rank: int) -> None:
    _settle(setup, setup.cores[rank])
    distributed.init_process_group("gloo", init_method=f"file://{setup.store}", rank=rank, world_size=2)
    sys.modules["accelerate"] = ModuleType("accelerate")
    sys.modules["accelerate"].Accelerator = _Accelerator  # type: ignore[attr-defined]
    to = torch.Tensor.to
    torch.Tensor.to = (
        lambda self, *args, **kwargs: (  # type: ignore[method-assign]
            self if args[:1] == ("cuda:1",) else to(self, *args, **kwargs)
        )
    )
    theirs = importlib.import_module("src.engine").Decoding
    nothing = dict.fromkeys(theirs.__abstractmethods__)
    model = _Of2024(setup.draft if rank == 0 else setup.target, setup.dtype)
    decoding = type("Pearl", (theirs,), nothing)(
        SimpleNamespace(
            seed=0, eval_mode="para_sd", max_tokens=setup.tokens, temp=0, top_k=0, top_p=0, gamma=setup.window
        )
    )
    decoding.draft_model = decoding.target_model = model
    decoding.vocab_size = model.model.config.vocab_size
    rejections = decoding.num_acc_tokens

    def decode(ids: list[int]) -> Answer:
        found = decoding.parallel_speculative_decoding(torch.tensor([ids]))[0, len(ids) :].tolist()
        # A step that rejects notes how many it had accepted; one that does not appends what was just drafted.
        verified = len(rejections) > decoding.accelerator.rejections_before
        beyond = len(found) - setup.tokens
        return Answer(found[: setup.tokens], 0 if verified else max(0, setup.window - 1 - beyond))

    decoding.accelerator.rejections = rejections
    _serve(pipe, decode)


class _Accelerator:
    """What PEARL uses of accelerate's."""

    num_processes = 2

    def __init__(self) -> None:
        self.is_main_process = distributed.get_rank() == 0
        self.rejections: list[int] = []
        self.rejections_before = 0

    def wait_for_everyone(self) -> None:
        self.rejections_before = len(self.rejections)
        distributed.barrier()

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        found = [torch.empty_like(tensor) for _ in range(self.num_processes)]
        distributed.all_gather(found, tensor.contiguous())
        return torch.cat(found)


class _Of2024:
    """A model with caches as lists of pairs, and logits in float32."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.model = _model(path, getattr(torch, dtype))
        self.device = self.model.device

    def __call__(
        self, ids: torch.Tensor, past_key_values: Sequence[tuple[torch.Tensor, torch.Tensor]] = (), **_: bool
    ) -> SimpleNamespace:
        cache = DynamicCache()
        for keys, values in past_key_values or ():
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        out = self.model(ids, past_key_values=cache, use_cache=True)
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
        return SimpleNamespace(logits=out.logits.float(), past_key_values=pairs)


def _amusd(pipe: Connection, setup: Setup) -> None:
    _settle(setup, setup.cores[1])
    # Its processes inherit what is changed here.
    torch.multiprocessing.set_start_method("fork", force=True)
    theirs = importlib.import_module("amusd")
    theirs.DynamicCache = _CroppedToLength

    def init_model(path: Path, _: str, dtype: torch.dtype) -> tuple[Any, SimpleNamespace]:
        os.sched_setaffinity(0, {setup.cores[path == setup.target]})
        torch.set_num_threads(1)
        return _model(path, dtype), SimpleNamespace(eos_token_id=-1)

    theirs.init_model = init_model
    draft, target = (
        theirs.ModelConfig(path, "cpu", getattr(torch, setup.dtype)) for path in (setup.draft, setup.target)
    )
    decoder = theirs.AsyncMultiGPUSpeculativeDecoder(draft, target, max_new_tokens=setup.tokens)
    _serve(pipe, lambda ids: Answer(decoder.generate(torch.tensor([ids])).tolist()[: setup.tokens]))


class _CroppedToLength(DynamicCache):
    def crop(self, length: int) -> None:
        super().crop(min(0, length - self.get_seq_length()))


def _model(path: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def _settle(setup: Setup, core: int) -> None:
    """A group of its own, which can be ended as a whole; one core, one thread."""
    os.setsid()
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    sys.path.insert(0, str(setup.checkout))


def _serve(pipe: Connection, decode: Callable[[list[int]], Answer]) -> None:
    pipe.send(None)
    try:
        while True:
            pipe.send(decode(pipe.recv()))
    except EOFError:
        os.killpg(0, signal.SIGKILL)


REFERENCES: dict[str, Sequence[Callable[[Connection, Setup], None]]] = {
    "pearl": (_draft_rank, _target_rank),
    "amusd": (_amusd,),
}
