"""How long a target that waits for its drafter's answer waits, and when it no longer does."""

MAX_PATIENCE = 0.2
"""Seconds that a target waits for a drafter at most; a stall must stay under a quarter second."""
PATIENCE = 4.0
"""Expected durations of a round after which a drafter counts as late."""
LEAST_PATIENCE = 0.02
PAUSE = 20.0
"""A wait in vain is made good before the next one: no wait for so many times what it cost."""


def patience(expected: float | None) -> float:
    """Seconds to wait for an answer that should take ``expected``; None: nobody knows."""
    if expected is None:
        return MAX_PATIENCE
    return min(MAX_PATIENCE, max(LEAST_PATIENCE, PATIENCE * expected))


class Lateness:
    """One request's waiting, which may be in vain."""

    def __init__(self) -> None:
        self._asked: float | None = None
        """When the decision at hand was first asked for."""
        self._resume_at = float("-inf")

    def wait_until(self, deadline: float, now: float) -> float | None:
        """Until when to wait, at most until ``deadline``; None: go on without the drafter."""
        if now < self._resume_at:
            return None
        if self._asked is None:
            self._asked = now
        # A worker that takes over meanwhile begins a new round, but no new wait.
        until = min(deadline, self._asked + MAX_PATIENCE)
        if now < until:
            return until
        self._resume_at = now + PAUSE * (now - self._asked)
        return None

    def decided(self, *, answered: bool) -> None:
        """The decision was made. answered: a drafter that was late has caught up."""
        self._asked = None
        if answered:
            self._resume_at = float("-inf")
