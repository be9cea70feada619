"""Batch files, a job over them, and a generator that answers at once, in an order of its own."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from outrider.cluster.api.service import ModelSettings, OfferedModel
from outrider.cluster.batch_files.identity import what_is_asked, who_answers
from outrider.cluster.batch_files.job import BatchJob, JobOptions
from outrider.cluster.batch_files.lines import InputFile
from outrider.cluster.batch_files.report import Report
from outrider.cluster.batch_files.results import ResultFile
from outrider.cluster.generation import OnStep, Prompt, Results, TextGenerator
from outrider.cluster.model_card import TOKENIZER_FILES, ModelCard
from outrider.speculation.errors import OutOfBlocksError, OutriderError
from outrider.speculation.request import Completion, Request, StepOutput
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.statistics import SpeculationStatistics
from outrider.speculation.types import FinishReason

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MODEL = "tiny"
POISON = 7
"""A token of a prompt that cannot be served."""


_MODELS: dict[str, OfferedModel] = {}
"""Made once: reading a tokenizer takes longer than a whole job."""


class Killed(BaseException):
    """The process is gone."""


@dataclass(eq=False)
class Echo(TextGenerator):
    """Draws tokens from a request's seed and choice; ``window`` requests are served at once.

    dies_after: requests, whereupon nothing more happens.
    """

    folder: Path
    window: int = 8
    shuffle: int = 0
    dies_after: int | None = None
    card_changes: dict[str, Any] = field(default_factory=dict)
    served: int = 0

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        speculative: bool = True,
        pipeline: str | None = None,
    ) -> tuple[str, list[Request]]:
        raise NotImplementedError

    def steps(self, request: Request) -> Iterator[StepOutput | Completion]:
        raise NotImplementedError

    def describe(self) -> ModelCard:
        paths = [self.folder / name for name in TOKENIZER_FILES]
        values: dict[str, Any] = {
            "name": MODEL,
            "max_model_len": 64,
            "max_num_seqs": self.window,
            "vocab_size": 300,
            "device": "cpu",
            "dtype": "float32",
            "numerics": "canonical",
            "tensor_parallel_size": 1,
            "weights": "0",
            "drafting": "none",
            "tokenizer_files": {path.name: path.read_bytes() for path in paths if path.is_file()},
        }
        return ModelCard(**(values | self.card_changes))

    def complete_unordered(self, requests: Iterable[Request], on_step: OnStep | None = None) -> Results:
        assert on_step is None
        rng, waiting = np.random.default_rng(self.shuffle), iter(requests)
        flying = list(islice(waiting, self.window))
        while flying:
            if self.served == self.dies_after:
                raise Killed
            self.served += 1
            request = flying.pop(int(rng.integers(len(flying))))
            yield request, self._result(request)
            flying += islice(waiting, self.window - len(flying))

    def failures(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        pass

    def _result(self, request: Request) -> Completion | OutriderError:
        if POISON in request.prompt_ids:
            return OutOfBlocksError("it does not fit")
        seed = request.params.seed
        assert seed is not None
        ids = np.random.default_rng([seed, request.choice]).integers(1, 300, 4).tolist()
        stats = SpeculationStatistics(num_output_tokens=len(ids), target_seconds=0.5, draft_seconds=0.25)
        return Completion(
            index=request.choice,
            text=f"{ids}",
            token_ids=ids,
            finish_reason=FinishReason.LENGTH,
            stop_reason=None,
            stats=stats,
        )


def row(custom_id: str, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    """A line of an input file; a prompt of its own unless the body brings something."""
    if url == COMPLETIONS:
        body = {"prompt": f"def {custom_id}(", **body}
    else:
        body = {"messages": [{"role": "user", "content": f"def {custom_id}("}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"return_token_ids": True, **body}}


def write_lines(path: Path, lines: Sequence[object]) -> Path:
    """One object per line, strings as they are."""
    text = "".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines)
    path.write_text(text, encoding="utf-8")
    return path


def run_job(
    generator: TextGenerator,
    source: Path,
    output: Path,
    *,
    overwrite: bool = False,
    chat_template: str | None = None,
    on_answer: Callable[[Report], None] = lambda _: None,
    **options: Any,
) -> Report:
    """What ``outrider run-batch`` does once its generator is there."""
    settings = ModelSettings(names=(MODEL,), chat_template=chat_template)
    chosen = JobOptions(**{"seed": 0, **options})
    with closing(InputFile(source)) as lines, closing(ResultFile(output, overwrite=overwrite)) as results:
        card = generator.describe()
        earlier = results.begin({**what_is_asked(lines, settings, chosen), **who_answers(card)})
        model = _offered(card, settings)
        job = BatchJob(generator, model, lines, results, earlier, chosen, on_answer)
        job.run()
    return job.report


def _offered(card: ModelCard, settings: ModelSettings) -> OfferedModel:
    key = f"{card} {settings}"
    if key not in _MODELS:
        _MODELS[key] = OfferedModel(card, settings)
    return _MODELS[key]


def answers(output: Path) -> list[dict[str, Any]]:
    """The lines of an output file."""
    return [json.loads(line) for line in output.read_bytes().splitlines()]


def tokens(output: Path) -> dict[str, list[list[int]]]:
    """Token ids of every choice by custom_id, each of which stands there once."""
    rows = [each for each in answers(output) if each["error"] is None]
    found = {
        each["custom_id"]: [choice["token_ids"] for choice in each["response"]["body"]["choices"]]
        for each in rows
    }
    assert len(found) == len(rows)
    return found
