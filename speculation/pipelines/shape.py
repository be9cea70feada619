"""Bounds of a draft tree, as users set them."""

from dataclasses import dataclass

from outrider.speculation.errors import InvalidConfigError
from outrider.speculation.tree import MAX_TREE_DEPTH

DEFAULT_SPECULATIVE_TOKENS = 16
MAX_VERIFIED_NODES = 63
"""Nodes that fit one forward, of the target beside the root or of the drafter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeShape:
    """Bounds of the tree of one round.

    num_speculative_tokens: most nodes that one target step verifies.
    width: nodes that one draft step expands, all in one forward.
    children: most children that a node is given.
    depth: most draft steps of one round.
    min_score: nodes with a lower path score are not expanded by a drafter in another process.
    adaptive: draft and verify only what is expected to pay, possibly nothing; otherwise
        always take ``depth`` draft steps and verify ``num_speculative_tokens`` nodes.

    Raises:
        InvalidConfigError: a bound is not positive or the depth exceeds what attention takes.
    """

    num_speculative_tokens: int = DEFAULT_SPECULATIVE_TOKENS
    width: int = 4
    children: int = 4
    depth: int = 12
    min_score: float = 0.005
    adaptive: bool = True

    def __post_init__(self) -> None:
        for name in ("num_speculative_tokens", "width", "children", "depth"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidConfigError(f"{name} must be a positive integer, not {value!r}")
        if not 0.0 <= self.min_score <= 1.0:
            raise InvalidConfigError(f"min_score must be from 0 to 1, not {self.min_score!r}")
        if self.depth > MAX_TREE_DEPTH:
            raise InvalidConfigError(f"depth {self.depth} is more than {MAX_TREE_DEPTH}")
        for name in ("num_speculative_tokens", "width"):
            if getattr(self, name) > MAX_VERIFIED_NODES:
                raise InvalidConfigError(f"{name} {getattr(self, name)} is more than {MAX_VERIFIED_NODES}")
