"""Log-probabilities of rows of logits: values, ranks, ties, padding, and whose business they are."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from instruments import drafters
from instruments.serving import serve, table_engine
from instruments.table_lm import TableLM

from outrider.speculation import logprobs
from outrider.speculation.logprobs import look_up
from outrider.speculation.request import Request, TokenLogprobs
from outrider.speculation.sampling_params import SamplingParams


def test_values_ranks_and_ties() -> None:
    logits = torch.tensor([[-1.0, 3.0, 0.0, 3.0, -0.0, -2.0, 99.0]] * 2)
    other, found = look_up(logits, np.array([2, 4]), [6, 6], 6)
    expected = torch.log_softmax(logits[0, :6], dim=0)
    assert (other.rank, found.rank) == (3, 4), "-0 is 0, and of equals the lower id comes first"
    assert found.logprob == expected[4].item()
    assert found.top_ids == [1, 3, 2, 4, 0, 5]
    assert found.top_logprobs == expected[found.top_ids].tolist()


def test_each_row_gets_as_many_as_it_asks_for_and_there_are() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]] * 3)
    found = look_up(logits, np.array([0, 1, 2]), [0, 2, 20], 3)
    assert [each.top_ids for each in found] == [[], [2, 1], [2, 1, 0]]
    assert [each.rank for each in found] == [3, 2, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_row_is_the_same_beside_others(dtype: torch.dtype) -> None:
    """Bit for bit, in a vocabulary of a size that nothing divides, with many ties."""
    rng = torch.Generator().manual_seed(0)
    logits = (torch.randn(64, 5013, generator=rng, dtype=torch.float64) * 3).to(dtype)
    if dtype is not torch.bfloat16:
        logits[:, 100:200] = logits[:, 200:300]
    tokens = np.random.default_rng(0).integers(0, 5001, 64)
    together = look_up(logits, tokens, [20] * 64, 5001)
    for row, found in enumerate(together):
        assert look_up(logits[row : row + 1], tokens[row : row + 1], [20], 5001) == [found]
        values = logits[row, :5001].float()
        order = np.lexsort((np.arange(5001), -values.numpy())).tolist()
        assert found.top_ids == order[:20]
        assert found.rank == 1 + order.index(tokens[row])
        assert found.top_logprobs == torch.log_softmax(values, dim=0)[order[:20]].tolist()


def test_steps_bring_what_the_table_says() -> None:
    lm = TableLM.random(1, vocab_size=7)
    params = SamplingParams(seed=2, max_tokens=9, temperature=0.5, logprobs=2, prompt_logprobs=1)
    outcome = serve(table_engine(lm), [3, 1, 4], params)
    text = [3, 1, 4, *outcome.token_ids]
    steps = outcome.steps
    assert [entry for step in steps for entry in step.logprobs or ()] == [
        table_entry(lm, text[:at], text[at], 2) for at in range(3, len(text))
    ]
    assert steps[0].prompt_logprobs == [None, table_entry(lm, [3], 1, 1), table_entry(lm, [3, 1], 4, 1)]
    assert all(step.prompt_logprobs is None for step in steps[1:])


def table_entry(lm: TableLM, text: list[int], token: int, count: int) -> TokenLogprobs:
    row = torch.from_numpy(lm.row(text)).float()
    order = np.argsort(-row.numpy()).tolist()
    values = torch.log_softmax(row, dim=0)
    best = order[:count]
    return TokenLogprobs(
        token, values[token].item(), 1 + order.index(token), best, [values[each].item() for each in best]
    )


def test_a_prompt_of_one_token_has_one_entry() -> None:
    params = SamplingParams(seed=2, max_tokens=1, prompt_logprobs=20)
    (step,) = serve(table_engine(TableLM.random(1, vocab_size=7)), [3], params).steps
    assert (step.prompt_logprobs, step.logprobs) == ([None], None)


def test_tokens_behind_the_end_have_no_entries() -> None:
    """A stop string of three tokens ends a text whose drafts go on."""
    lm = TableLM.cycle([1, 2, 3, 4, 5, 6, 7, 0])
    engine = table_engine(lm, drafters.Scripted(drafters.perfect([*range(8), *range(8)], 7)))
    params = SamplingParams(temperature=0.0, max_tokens=20, stop=["def"], logprobs=0)
    outcome = serve(engine, [0], params)
    assert (len(outcome.steps), outcome.token_ids) == (1, [1, 2, 3, 4, 5])
    assert [entry.token_id for step in outcome.steps for entry in step.logprobs or ()] == outcome.token_ids


def test_nothing_is_looked_up_for_who_does_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("nobody asked")

    monkeypatch.setattr(logprobs, "look_up", refuse)
    lm = TableLM.random(1, vocab_size=7)
    assert serve(table_engine(lm), [1, 2], SamplingParams(seed=1)).steps[0].logprobs is None
    with pytest.raises(AssertionError, match="nobody asked"):
        serve(table_engine(lm), [1, 2], SamplingParams(seed=1, logprobs=0))


def test_entries_can_be_sent_to_other_processes() -> None:
    entry = TokenLogprobs(3, -0.25, 1, [3], [-0.25])
    assert pickle.loads(pickle.dumps(entry)) == entry
    request = Request(prompt_ids=np.array([1]), params=SamplingParams(logprobs=3, prompt_logprobs=0))
    assert pickle.loads(pickle.dumps(request)).params == request.params
