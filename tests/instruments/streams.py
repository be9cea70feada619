"""Messages on a stream for tests that do not care what is in them."""

from outrider.speculation.replication.messages import Close, Lost

LOST = Lost(session=1, generation=1, reason="no room")
CLOSE = Close(session=1, generation=1)
