"""The scenarios that could break the output, with a drafter in a process of its own.

The target drafts for itself (every guess right), or the embedded draft model does. Faults are
made on the target's side of a real stream, where messages can be held back and thrown away.
"""

import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from forwards import opened
from instruments.processes import complete
from instruments.ragged_checks import kv

from outrider import LLM, SamplingParams
from outrider.actors.transport import Received
from outrider.cluster.launcher import LocalWorkers
from outrider.models.demo import pair
from outrider.speculation.replication.messages import Growth, TargetMessage

PROMPT = "def fibonacci(n):"
PIPELINES = pytest.mark.parametrize("pipeline", ["serial", "parallel"])
TREE = {"adaptive": False, "depth": 6}


@pytest.fixture(scope="module")
def own_worker() -> Iterator[LocalWorkers]:
    """Drafts with the target's own weights."""
    workers = LocalWorkers(1, ["--draft", str(pair.TARGET)])
    yield workers
    workers.close()


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[[LocalWorkers, str], LLM]:
    def make(workers: LocalWorkers, pipeline: str) -> LLM:
        token = workers.security.token
        assert token is not None
        monkeypatch.setenv("OUTRIDER_CLUSTER_TOKEN", token)
        config = {"workers": workers.addresses[:1], "pipeline": pipeline, "tree": TREE}
        return LLM(speculative_config=config)

    return make


def both(llm: LLM, params: SamplingParams, prompt: str = PROMPT) -> tuple[list[int], list[int], int]:
    """Tokens with the drafter and without, and how many it had right."""
    (drafted,) = complete(llm, [prompt], params)
    (plain,) = complete(llm, [prompt], params, speculative=False)
    assert (drafted.text, drafted.finish_reason, drafted.stop_reason) == (
        plain.text,
        plain.finish_reason,
        plain.stop_reason,
    )
    return drafted.token_ids, plain.token_ids, drafted.stats.num_accepted_tokens


@PIPELINES
def test_every_length_is_exact(
    pipeline: str, own_worker: LocalWorkers, connect: Callable[[LocalWorkers, str], LLM]
) -> None:
    accepted = 0
    with connect(own_worker, pipeline) as llm:
        for count in range(1, 19):
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            drafted, plain, right = both(llm, params)
            assert drafted == plain
            assert len(drafted) == count
            accepted += right
    assert accepted > 18


@PIPELINES
def test_the_end_is_found_wherever_it_falls(
    pipeline: str, own_worker: LocalWorkers, connect: Callable[[LocalWorkers, str], LLM]
) -> None:
    """Every token of the text as stop token, and every three characters of it as stop string."""
    with connect(own_worker, pipeline) as llm:
        params = SamplingParams(temperature=1.0, seed=5, max_tokens=24, ignore_eos=True)
        (plain,) = complete(llm, [PROMPT], params, speculative=False)
        accepted = 0
        for token in sorted(set(plain.token_ids))[::3]:
            with_stop = SamplingParams(temperature=1.0, seed=5, max_tokens=24, stop_token_ids=[token])
            drafted, expected, right = both(llm, with_stop)
            assert drafted == expected == plain.token_ids[: plain.token_ids.index(token) + 1]
            accepted += right
        for start in range(0, len(plain.text) - 3, 9):
            stop = plain.text[start : start + 3]
            with_stop = SamplingParams(temperature=1.0, seed=5, max_tokens=24, stop=[stop])
            drafted, expected, right = both(llm, with_stop)
            assert drafted == expected
            accepted += right
    assert accepted > 20


def test_a_perfect_drafter_and_forward_counts(
    own_worker: LocalWorkers, connect: Callable[[LocalWorkers, str], LLM]
) -> None:
    with connect(own_worker, "serial") as llm:
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        (drafted,) = complete(llm, [PROMPT], params)
        assert drafted.stats.target_steps < 20
        assert drafted.stats.num_drafts > 0
        llm.engine.target.runner.cache.check_idle()


@PIPELINES
def test_kv_after_every_commit_is_that_of_a_fresh_prefill(
    pipeline: str, workers: LocalWorkers, connect: Callable[[LocalWorkers, str], LLM]
) -> None:
    """Bit for bit, over block boundaries, with accepted nodes anywhere in the tree."""
    with connect(workers, pipeline) as llm:
        runner = llm.engine.target.runner
        (request,) = llm.prepare(PROMPT, SamplingParams(temperature=0.7, seed=3, max_tokens=60))[1]
        text = request.prompt_ids.tolist()
        with llm.engine.start(request) as run:
            while not run.finished:
                text += run.step().token_ids
                if run.finished:
                    break  # the last step's nodes are cached beyond the end of the text
                sequence = run._sequence
                fresh = opened(runner, np.array(text[: sequence.length]))
                mine, other = (kv(runner, each) for each in (sequence, fresh))
                assert mine.equal(other)
                fresh.close()
            assert run.stats.num_accepted_tokens > 0
        runner.cache.check_idle()


@PIPELINES
@pytest.mark.parametrize("seed", [1, 2])
def test_a_stream_that_loses_doubles_delays_and_reorders(
    seed: int, pipeline: str, workers: LocalWorkers, connect: Callable[[LocalWorkers, str], LLM]
) -> None:
    with connect(workers, pipeline) as llm:
        assert llm.workers is not None
        (link,) = llm.workers.pool._links
        chance = random.Random(seed)
        faults = Faults(chance, link.channel.receive, link.channel.send)
        link.channel.receive = faults.receive  # type: ignore[method-assign]
        link.channel.send = faults.send  # type: ignore[method-assign]
        params = SamplingParams(temperature=0.7, seed=seed, max_tokens=120, ignore_eos=True)
        drafted, plain, _ = both(llm, params)
        assert drafted == plain
        assert faults.made > 5


class Faults:
    """Half of all growth, and a tenth of what the target sends, meets with an accident."""

    def __init__(
        self,
        chance: random.Random,
        receive: Callable[[], list[Received]],
        send: Callable[[TargetMessage], int],
    ) -> None:
        self._chance, self._receive, self._send = chance, receive, send
        self._held: list[Received] = []
        self.made = 0

    def receive(self) -> list[Received]:
        arrived = [*self._held, *self._receive()]
        self._held = []
        return [each for received in arrived for each in self._accident(received)]

    def send(self, message: TargetMessage) -> int:
        if self._chance.random() < 0.9:
            return self._send(message)
        self.made += 1
        return sum(self._send(message) for _ in range(self._chance.choice([0, 2])))

    def _accident(self, received: Received) -> Sequence[Received]:
        if not isinstance(received.event, Growth) or self._chance.random() < 0.5:
            return [received]
        self.made += 1
        kind = self._chance.choice(["lost", "doubled", "late"])
        if kind == "late":
            self._held.append(received)
        return [received, received] if kind == "doubled" else []
