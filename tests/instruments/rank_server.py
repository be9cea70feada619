"""A process that is one rank after another: each line of its standard input says which."""

import json
import sys

from outrider.cluster.target_rank import RankSettings, serve

for line in sys.stdin:
    serve(RankSettings(**json.loads(line)))
    print("done", flush=True)
