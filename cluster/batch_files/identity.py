"""What the answers of a job depend on: only a job with the same of it may be resumed."""

from hashlib import blake2b

from outrider.cluster.api.service import ModelSettings
from outrider.cluster.batch_files.job import JobOptions
from outrider.cluster.batch_files.lines import InputFile
from outrider.cluster.batch_files.results import Settings
from outrider.cluster.model_card import ModelCard


def what_is_asked(source: InputFile, settings: ModelSettings, options: JobOptions) -> Settings:
    """All but the model."""
    return {
        "the input": f"{source.size} bytes with hash {source.digest}",
        "seed": options.seed,
        "keep_order": options.keep_order,
        "served_model_name": list(settings.names),
        "chat_template": settings.chat_template,
        "max_tokens": settings.limits.max_tokens,
        "max_choices": settings.limits.max_choices,
    }


def who_answers(card: ModelCard) -> Settings:
    """What of a model decides on its tokens. Who drafts for it, and how many at once it serves, does not."""
    files = repr(sorted(card.tokenizer_files.items())).encode()
    return {
        "model": card.name,
        "the hash of the weights": card.weights,
        "the hash of configuration and tokenizer": blake2b(files, digest_size=16).hexdigest(),
        "device": card.device,
        "dtype": card.dtype,
        "numerics": card.numerics,
        "max_model_len": card.max_model_len,
        "tensor_parallel_size": card.tensor_parallel_size,
    }
