"""Replies in OpenAI's shapes: whole ones and the chunks of streams, for texts and for chats."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from outrider.cluster.api.choices import Choices, Piece
from outrider.cluster.api.fields import ChatBody, CompletionBody, GenerationBody, content_text
from outrider.cluster.api.marks import Marks
from outrider.models.tokenizer import Tokenizer
from outrider.speculation.request import TokenLogprobs


class Format(ABC):
    """How one call's reply looks. model: the name it was asked by; fingerprint: what numbers served it."""

    object_name: str
    chunk_name: str
    prefix: str

    def __init__(
        self, body: GenerationBody, choices: Choices, tokenizer: Tokenizer, model: str, fingerprint: str
    ) -> None:
        self.body, self.choices, self.tokenizer = body, choices, tokenizer
        self._marks: dict[int, Marks] = {}
        self.head = {
            "id": f"{self.prefix}-{uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self) -> dict[str, Any]:
        """The reply, once all choices are complete."""
        pieces = list(self.choices.wholes())
        return {
            **self.head,
            "object": self.object_name,
            "choices": [self._extended(piece, self.choice(piece)) for piece in pieces],
            "usage": self.choices.usage.as_dict(),
            **self._closing(),
        }

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """What one piece adds."""
        chunk = {
            **self.head,
            "object": self.chunk_name,
            "choices": [self._extended(piece, self.delta(piece))],
        }
        if self.body.stream_options.continuous_usage_stats:
            chunk["usage"] = self.choices.usage.as_dict()
        return chunk

    def last_chunk(self) -> dict[str, Any]:
        """Usage and statistics of all of it, for whoever asked for the usage."""
        usage = self.choices.usage.as_dict()
        return {**self.head, "object": self.chunk_name, "choices": [], "usage": usage, **self._closing()}

    @abstractmethod
    def choice(self, piece: Piece) -> dict[str, Any]:
        """A whole choice."""

    @abstractmethod
    def delta(self, piece: Piece) -> dict[str, Any]:
        """A choice in a stream."""

    def _closing(self) -> dict[str, Any]:
        """What OpenAI's replies do not have: the seed that gives the same tokens again, and statistics."""
        return {
            "seed": self.choices.call.seed,
            "metrics": {"speculative_decoding": self.choices.usage.stats.as_dict()},
        }

    def _extended(self, piece: Piece, choice: dict[str, Any]) -> dict[str, Any]:
        """With what vLLM's replies have beside OpenAI's, and the steps."""
        choice |= {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
        if self.body.return_token_ids:
            choice["token_ids"] = piece.token_ids if self.choices.call.keeps_text else []
            if piece.first:
                choice["prompt_token_ids"] = piece.choice.request.prompt_ids.tolist()
        if self.body.prompt_logprobs is not None and piece.prompt_logprobs is not None:
            choice["prompt_logprobs"] = [self._by_token(each) for each in piece.prompt_logprobs]
        if self.body.return_draft_tokens and self.choices.call.keeps_text:
            choice["steps"] = self._steps(piece)
        return choice

    def _steps(self, piece: Piece) -> list[dict[str, Any]]:
        """Those that brought something; the texts of their parts, joined, are the generated text."""
        index = piece.choice.index
        if index not in self._marks:
            self._marks[index] = Marks(self.tokenizer, skip_special_tokens=self.body.skip_special_tokens)
        marks = self._marks[index]
        # Where a target's death lies between, a text's end may come without tokens.
        return [marks.take(step) for step in piece.steps if step.token_ids or step.text or step.finish_reason]

    def _by_token(self, entry: TokenLogprobs | None) -> dict[str, Any] | None:
        """vLLM's form: what is known of a position, by token id."""
        if entry is None:
            return None
        rows = [(entry.token_id, entry.logprob, entry.rank)]
        rows += [
            (token, logprob, rank)
            for rank, (token, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), 1)
        ]
        return {
            str(token): {"logprob": logprob, "rank": rank, "decoded_token": self.tokenizer.token_text(token)}
            for token, logprob, rank in rows
        }

    def _name(self, token: int) -> str:
        return (
            f"token_id:{token}" if self.body.return_tokens_as_token_ids else self.tokenizer.token_text(token)
        )


class CompletionFormat(Format):
    """``/v1/completions``."""

    object_name = chunk_name = "text_completion"
    prefix = "cmpl"
    body: CompletionBody

    def choice(self, piece: Piece) -> dict[str, Any]:
        echoed = piece.choice.prompt if self.body.echo and piece.first else ""
        keeps = self.choices.call.keeps_text
        return {
            "index": piece.choice.index,
            "text": echoed + (piece.text if keeps else ""),
            "logprobs": self._logprobs(piece, keeps=keeps),
        }

    delta = choice

    def _logprobs(self, piece: Piece, *, keeps: bool) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        entries: list[TokenLogprobs | None] = []
        ids: list[int] = []
        if self.body.echo and piece.prompt_logprobs is not None:
            entries += piece.prompt_logprobs
            ids += piece.choice.request.prompt_ids.tolist()
        if keeps and piece.logprobs is not None:
            entries += piece.logprobs
            ids += piece.token_ids
        offsets = []
        for token in ids:
            offsets.append(piece.choice.num_characters)
            piece.choice.num_characters += len(self.tokenizer.token_text(token))
        return {
            "tokens": [self._name(token) for token in ids],
            "token_logprobs": [None if each is None else each.logprob for each in entries],
            "top_logprobs": [None if each is None else self._top(each) for each in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The most probable ones and the token itself; of two with one text the more probable stands."""
        pairs = [(entry.token_id, entry.logprob), *zip(entry.top_ids, entry.top_logprobs, strict=True)]
        top: dict[str, float] = {}
        for token, logprob in sorted(pairs, key=lambda pair: -pair[1]):
            top.setdefault(self._name(token), logprob)
        return top


class ChatFormat(Format):
    """``/v1/chat/completions``."""

    object_name, chunk_name = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"
    body: ChatBody

    def choice(self, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": self._echoed(piece) + piece.text, "refusal": None}
        return {"index": piece.choice.index, "message": message, "logprobs": self._logprobs(piece)}

    def delta(self, piece: Piece) -> dict[str, Any]:
        delta = {"content": self._echoed(piece) + piece.text}
        if piece.first:
            delta = {"role": "assistant", **delta}
        return {"index": piece.choice.index, "delta": delta, "logprobs": self._logprobs(piece)}

    def _echoed(self, piece: Piece) -> str:
        """The last message, which with ``echo`` the answer goes on from."""
        if not self.body.echo or not piece.first:
            return ""
        return content_text("messages", self.body.messages[-1].get("content"))

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self.body.logprobs or piece.logprobs is None:
            return None
        return {"content": [self._entry(each) for each in piece.logprobs]}

    def _entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        top = zip(entry.top_ids, entry.top_logprobs, strict=True)
        return {
            **self._token(entry.token_id, entry.logprob),
            "top_logprobs": [self._token(token, logprob) for token, logprob in top],
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        spelt = list(self.tokenizer.token_bytes(token))
        return {"token": self._name(token), "logprob": logprob, "bytes": spelt}


def model_list(names: Sequence[tuple[str, int, str]], created: int) -> dict[str, Any]:
    """``GET /v1/models``: name, longest context and numerics of each."""
    return {
        "object": "list",
        "data": [
            {
                "id": name,
                "object": "model",
                "created": created,
                "owned_by": "outrider",
                "root": name,
                "parent": None,
                "max_model_len": length,
                "numerics": numerics,
            }
            for name, length, numerics in names
        ],
    }
