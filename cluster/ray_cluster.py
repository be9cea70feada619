"""``Cluster``: targets and draft workers on Ray, used like an ``LLM``."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeAlias, TypeVar

from outrider.cluster.cluster_config import ClusterConfig, load_config
from outrider.cluster.generation import OnStep, Prompt, Results, TextGenerator
from outrider.cluster.model_card import ModelCard
from outrider.cluster.resumption import Progress
from outrider.cluster.standing import connect
from outrider.speculation.errors import ClusterError, OutriderError, TargetLostError
from outrider.speculation.request import Completion, Request, StepOutput
from outrider.speculation.sampling_params import SamplingParams

T = TypeVar("T")

BATCHES_AHEAD = 2
"""As many requests as a target is given, in batches of its size, so that its own never runs dry."""
LOT_SECONDS = 0.25
"""Between two lots of steps from a target where nobody looks at single steps."""
Item: TypeAlias = StepOutput | Completion | OutriderError


class Cluster(TextGenerator):
    """A running cluster, one's own or a standing one.

    ``close`` ends what it started, and nothing else.

    Raises:
        ClusterError: Ray, or room for a process, is missing.
        WorkerError: a process could not start.
    """

    def __init__(self, config: ClusterConfig, *, debug: bool = False) -> None:
        """debug: shows what the cluster's processes log."""
        self.config = config
        self._open = ExitStack()
        try:
            self._controller = self._open.enter_context(connect(config, debug=debug))
            self._targets: dict[str, Any] = self._controller.targets()
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """
        Raises:
            InvalidConfigError: the file is not possible.
        """
        return cls(load_config(path))

    def describe(self) -> ModelCard:
        """See ``TextGenerator``; that of any target, for they are alike."""
        return self._ask(self._controller.describe)

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        speculative: bool = True,
        pipeline: str | None = None,
    ) -> tuple[str, list[Request]]:
        """See ``TextGenerator``."""
        return self._ask(self._controller.prepare, prompt, params, speculative, pipeline)

    def steps(self, request: Request) -> Iterator[StepOutput | Completion]:
        """See ``TextGenerator``. If its target dies, another one goes on with the same tokens.

        Raises:
            TargetLostError: there is no other target.
        """
        for _, item in self._serve(iter([request]), 0.0):
            if isinstance(item, OutriderError):
                raise item
            yield item

    def complete_unordered(self, requests: Iterable[Request], on_step: OnStep | None = None) -> Results:
        """See ``TextGenerator``; spread over all targets, and as for ``steps``."""
        for request, item in self._serve(iter(requests), LOT_SECONDS if on_step is None else 0.0):
            if not isinstance(item, StepOutput):
                yield request, item
            elif on_step is not None:
                on_step(request, item)

    def failures(self) -> dict[str, str]:
        """See ``TextGenerator``: members that do not serve."""
        return {
            f"{row['name']} {row['epoch']}": f"{row['name']} is {row['phase']}: {row['note']}"
            for row in self.status()
            if row["phase"] not in ("ready", "resting")
        }

    def status(self) -> list[dict[str, Any]]:
        """A row per member; see ``Controller.status``."""
        return self._controller.status()

    def close(self) -> None:
        """See ``TextGenerator``."""
        self._open.close()

    def _serve(self, requests: Iterator[Request], interval: float) -> Iterator[tuple[Request, Item]]:
        """Everything that happens to the requests; ``interval``: see ``TargetHost.generate``."""
        again: deque[Progress] = deque()
        with self._controller.calls(interval) as calls:
            while True:
                self._hand_out(again, requests, calls)
                if not calls.open:
                    return
                call, events = calls.next()
                if events is None:
                    for progress in self._lost(call.target, calls):
                        if (given_up := progress.lose()) is None:
                            again.append(progress)
                        else:
                            yield progress.request, given_up
                    continue
                for event in events:
                    progress = call.items[event.index]
                    try:
                        for item in progress.take(event):
                            yield progress.request, item
                    except OutriderError as error:
                        yield progress.request, error

    def _hand_out(self, again: deque[Progress], requests: Iterator[Request], calls: Any) -> None:
        """Gives targets requests, half a batch at a time, whoever has least first."""
        size = self.config.target.max_num_seqs
        half = -(-size // 2)
        while self._targets:
            name = min(self._targets, key=calls.unfinished)
            if calls.unfinished(name) + half > BATCHES_AHEAD * size:
                return
            lot = [again.popleft() for _ in range(min(half, len(again)))]
            lot += [Progress(request) for request in islice(requests, half - len(lot))]
            if not lot:
                return
            calls.start(name, self._targets[name], lot)

    def _lost(self, name: str, calls: Any) -> list[Progress]:
        """What a dead target leaves behind, for the others to go on with."""
        orphans = [each for call in calls.drop(name) for each in call.items if not each.finished]
        self._targets = self._others(name, self._targets.get(name))
        if not self._targets:
            raise TargetLostError(
                f"{name} died with {len(orphans)} requests in flight and there is no other target; "
                "the cluster starts it anew as soon as there is room"
            )
        return orphans

    def _others(self, name: str, dead: Any) -> dict[str, Any]:
        """The targets that serve; the controller may not know yet that this one died."""
        targets = self._controller.targets()
        return {each: target for each, target in targets.items() if each != name or target != dead}

    def _ask(self, question: Callable[..., T], *arguments: object) -> T:
        """What any one of the targets says."""
        while True:
            name, target = self._some_target()
            try:
                return question(target, *arguments)
            except TargetLostError:
                self._targets = self._others(name, target)

    def _some_target(self) -> tuple[str, Any]:
        if not self._targets:
            self._targets = self._controller.targets()
        if not self._targets:
            raise ClusterError(f"no target of cluster {self.config.name!r} serves: {self._why()}")
        return next(iter(self._targets.items()))

    def _why(self) -> str:
        return "; ".join(self.failures().values()) or "none is ready"
