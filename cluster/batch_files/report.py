"""What a batch job has done, in figures."""

from dataclasses import dataclass, field
from typing import Any

from outrider.cluster.api.choices import Usage
from outrider.speculation.statistics import SpeculationStatistics


@dataclass(slots=True, kw_only=True)
class Report:
    """rows, failed: answered so far, with those of earlier runs; the rest is about this run alone.

    seconds: since the first line was read.
    """

    rows: int = 0
    failed: int = 0
    earlier: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    stats: SpeculationStatistics = field(default_factory=SpeculationStatistics)

    def add(self, usage: Usage) -> None:
        """What a served row took."""
        self.prompt_tokens += usage.prompt_tokens
        self.output_tokens += usage.completion_tokens
        self.stats.merge(usage.stats)

    @property
    def tokens_per_second(self) -> float:
        """Of output; 0.0 before there is any."""
        return self.output_tokens / self.seconds if self.seconds else 0.0

    @property
    def line(self) -> str:
        """For people."""
        earlier = f" ({self.earlier} of them earlier)" if self.earlier else ""
        return (
            f"{self.rows} rows{earlier}, {self.failed} failed; {self.prompt_tokens} prompt tokens and "
            f"{self.output_tokens} output tokens in {self.seconds:.1f} s, "
            f"{self.tokens_per_second:.1f} tokens/s; "
            f"mean acceptance length {self.stats.mean_acceptance_length:.2f}; device-seconds: "
            f"target {self.stats.target_seconds:.1f}, draft {self.stats.draft_seconds:.1f}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "rows": self.rows,
            "failed": self.failed,
            "rows_of_earlier_runs": self.earlier,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "mean_acceptance_length": self.stats.mean_acceptance_length,
            "target_device_seconds": self.stats.target_seconds,
            "draft_device_seconds": self.stats.draft_seconds,
            "speculative_decoding": self.stats.as_dict(),
        }
