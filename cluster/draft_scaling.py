"""How many draft workers of a pool there should be, by the sessions that they have.

Drafters see no HTTP requests: what shows how much they are wanted is how many requests they draft for.
Plain Python, told what happens and what time it is.
"""

import math

FULL = 0.8
"""Share of its sessions up to which a worker should be used: requests that find no room are decoded plainly,
and nobody counts them."""
QUIET_SECONDS = 60.0
"""That one worker fewer would have to be enough before there is one fewer."""


class DraftScaling:
    """One pool, of ``least`` to ``most`` workers with ``sessions_each`` at most."""

    def __init__(self, least: int, most: int, sessions_each: int) -> None:
        self.wanted = least
        """Workers that there should be now."""
        self.sessions: dict[str, int] = {}
        """Of each worker that serves."""
        self._least, self._most, self._full = least, most, FULL * sessions_each
        self._quiet_since: float | None = None

    def observe(self, worker: str, sessions: int, now: float) -> None:
        """So many requests are drafted for by this worker."""
        self.sessions[worker] = sessions
        self.poll(now)

    def forget(self, worker: str) -> None:
        """It is gone."""
        self.sessions.pop(worker, None)

    def poll(self, now: float) -> None:
        """Updates ``wanted``: up at once, down by one after a quiet while."""
        enough = math.ceil(sum(self.sessions.values()) / self._full)
        enough = min(self._most, max(self._least, enough))
        if enough >= self.wanted:
            self.wanted, self._quiet_since = enough, None
        elif self._quiet_since is None:
            self._quiet_since = now
        elif now - self._quiet_since >= QUIET_SECONDS:
            self.wanted, self._quiet_since = self.wanted - 1, None
            self.poll(now)

    @property
    def next_due(self) -> float | None:
        """When ``poll`` may have something to do, if nothing else happens."""
        return None if self._quiet_since is None else self._quiet_since + QUIET_SECONDS
