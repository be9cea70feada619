"""What must be known of a target to prepare requests for it, wherever its files are."""

import tempfile
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Self

from outrider.cluster.sampled_digest import sampled_digest
from outrider.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from outrider.cluster.llm import LLM

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""That a model folder may hold; none is code."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """One target.

    vocab_size: tokens that can be chosen. weights: tells apart models of one name, see ``sampled_digest``.
    drafting: what drafts for it, in words. tokenizer_files: contents of those of its folder.
    """

    name: str
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    device: str
    dtype: str
    numerics: str
    tensor_parallel_size: int
    weights: str
    drafting: str
    tokenizer_files: dict[str, bytes] = field(repr=False)

    @classmethod
    def of(cls, llm: "LLM") -> Self:
        """That of a loaded target."""
        model = llm.model
        paths = [model.folder / name for name in TOKENIZER_FILES]
        weights = "".join(sampled_digest(path) for path in sorted(model.folder.glob("*.safetensors")))
        return cls(
            name=model.folder.name,
            max_model_len=model.decoder.max_model_len,
            max_num_seqs=llm.max_num_seqs,
            vocab_size=model.vocab_size,
            device=llm.device.type,
            dtype=str(model.decoder.dtype).removeprefix("torch."),
            numerics=str(model.decoder.numerics),
            tensor_parallel_size=llm.tensor_parallel_size,
            weights=blake2b(weights.encode(), digest_size=16).hexdigest(),
            drafting=llm.drafting,
            tokenizer_files={path.name: path.read_bytes() for path in paths if path.is_file()},
        )

    def tokenizer(self) -> Tokenizer:
        """Made from the files; errors as for ``Tokenizer.load``."""
        with tempfile.TemporaryDirectory(prefix="outrider-") as folder:
            for name, contents in self.tokenizer_files.items():
                Path(folder, name).write_bytes(contents)
            return Tokenizer.load(Path(folder))
