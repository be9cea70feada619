"""Ways of decoding one and the same prompts: plainly, and with a draft worker on a core of its own."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeAlias

import torch

from outrider.actors.tracing import Trace
from outrider.cluster.delay_relay import DelayRelay
from outrider.cluster.llm import LLM
from outrider.cluster.remote_drafting import CONNECT_SECONDS
from outrider.speculation.errors import OutriderError, WorkerError
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.statistics import SpeculationStatistics

PLAIN, ALL_CORES = "plain", "plain, all cores"
PIPELINES = ("serial", "pearl", "parallel")

Run: TypeAlias = Callable[[str, SamplingParams], tuple[list[int], SpeculationStatistics]]


@dataclass(slots=True, kw_only=True)
class Way:
    """One way of decoding, and what came of it, prompt by prompt.

    costs: what its steps have shown; None where another process keeps that.
    """

    run: Run
    costs: CostEstimates | None = None
    seconds: list[float] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    stats: SpeculationStatistics = field(default_factory=SpeculationStatistics)

    def take(self, prompt: str, params: SamplingParams, *, counts: bool) -> None:
        """Decodes a prompt; to warm up, if it does not count."""
        began = time.perf_counter()
        text, stats = self.run(prompt, params)
        seconds = time.perf_counter() - began
        if counts:
            self.seconds.append(seconds)
            self.texts.append(text)
            self.stats.merge(stats)

    @property
    def decoding_seconds(self) -> float:
        """Without the prompts, which the simulator leaves out."""
        return sum(self.seconds) - self.stats.prefill_seconds

    @property
    def between_forwards(self) -> float:
        """Seconds of a step beside its forward and waiting."""
        rest = self.decoding_seconds - self.stats.target_seconds - self.stats.wait_seconds
        return max(0.0, rest / self.stats.target_steps)


class Rig:
    """A target on the first of this process's cores, its draft worker on the last, and, in a process of its
    own, the same target on all of them. Leave it by ``rigged``.

    target_seconds: of a step of one row, measured before the worker was there.
    """

    def __init__(self, llm: LLM, every_core: "AllCores") -> None:
        self.llm = llm
        self._every_core = every_core
        self._first = deepcopy(llm.engine.costs)
        self.target_seconds = float(self._first.curve(1)[0])

    def ways(self) -> dict[str, Way]:
        """All of them, with nothing learnt but the step times measured at the start."""
        return {
            PLAIN: self._way(None),
            ALL_CORES: Way(run=self._every_core.run),
            **{name: self._way(name) for name in PIPELINES},
        }

    @contextmanager
    def link(self, round_trip: float) -> Iterator[None]:
        """The worker is so many seconds away, there and back, beside what the machine takes itself."""
        workers = self.llm.workers
        assert workers is not None
        assert workers.local is not None
        with ExitStack() as relays:
            addresses = workers.local.addresses
            if round_trip:
                addresses = [
                    relays.enter_context(DelayRelay(address, round_trip / 2)).address for address in addresses
                ]
            workers.replace(addresses)
            relays.callback(workers.replace, [])
            if not workers.pool.wait_for_workers(CONNECT_SECONDS):
                raise WorkerError(f"the draft worker did not answer within {CONNECT_SECONDS:g} s")
            yield

    def _way(self, pipeline: str | None) -> Way:
        llm, costs = self.llm, deepcopy(self._first)

        def run(prompt: str, params: SamplingParams) -> tuple[list[int], SpeculationStatistics]:
            # Each way learns apart: beside a busy drafter steps may be slower than without it.
            llm.engine.costs = costs
            _, (request,) = llm.prepare(prompt, params, speculative=pipeline is not None, pipeline=pipeline)
            done = llm.complete(request)
            return done.token_ids, done.stats

        return Way(run=run, costs=costs)


@contextmanager
def rigged(target: Path, draft: Path, dtype: str, trace: Trace | None = None) -> Iterator[Rig]:
    """
    Raises:
        WorkerError, ModelError, InvalidConfigError: see ``LLM``.
    """
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as opened:
        # Before this process keeps to one core, which its children would inherit.
        every_core = opened.enter_context(closing(AllCores(target, dtype, len(cores))))
        opened.enter_context(alone_on(cores[0]))
        llm = opened.enter_context(
            LLM(
                str(target),
                speculative_config={"model": str(draft), "workers": "local"},
                device="cpu",
                dtype=dtype,
                max_num_seqs=1,
                enable_prefix_caching=False,
                trace=trace,
            )
        )
        assert llm.workers is not None
        assert llm.workers.local is not None
        for pid in llm.workers.local.pids:
            move_process(pid, cores[-1])
        every_core.await_start()
        yield Rig(llm, every_core)


class AllCores:
    """Plain decoding in a process of its own, with so many threads. It ends when its owner does."""

    def __init__(self, target: Path, dtype: str, threads: int) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(target), dtype, threads))
        with _inherited_by_children():
            self._process.start()
        theirs.close()

    def await_start(self) -> None:
        """
        Raises:
            WorkerError: the process ended before it was ready.
        """
        self._receive()

    def run(self, prompt: str, params: SamplingParams) -> tuple[list[int], SpeculationStatistics]:
        """As ``Way.run``."""
        self._pipe.send((prompt, params))
        return self._receive()

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._process.terminate()
        self._process.join()
        self._pipe.close()

    def _receive(self) -> tuple[list[int], SpeculationStatistics]:
        try:
            answer: tuple[list[int], SpeculationStatistics] = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise WorkerError(
                f"the process for plain decoding on all cores ended with {self._process.exitcode}"
            ) from None
        return answer


def _serve(pipe: Connection, target: str, dtype: str, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        llm = LLM(target, device="cpu", dtype=dtype, max_num_seqs=1, enable_prefix_caching=False)
    except OutriderError:
        return  # The other process meets with the same, and says so.
    pipe.send(([], SpeculationStatistics()))
    with suppress(EOFError):
        while True:
            prompt, params = pipe.recv()
            done = llm.generate(prompt, params)[0].outputs[0]
            pipe.send((done.token_ids, done.stats))


@contextmanager
def alone_on(core: int) -> Iterator[None]:
    """This thread, and those that it starts, on one core."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


@contextmanager
def _inherited_by_children() -> Iterator[None]:
    """What a process for plain decoding needs before it runs its first line."""
    # Ctrl-C reaches the whole terminal group, but the process is its owner's to end.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def move_process(pid: int, core: int) -> None:
    """All threads of a process to a core."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})
