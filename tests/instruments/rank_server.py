"""A process that is one rank after another: each line of its standard input says which.

With the argument ``stand-in`` it computes as on a device, see ``cuda_stand_in``.
"""

import json
import sys

from outrider.cluster.target_rank import RankSettings, serve

if sys.argv[1:] == ["stand-in"]:
    import cuda_stand_in
    import numpy as np
    import pytest

    np.seterr(all="ignore")  # As whoever uses Triton's interpreter has to.
    cuda_stand_in.use(pytest.MonkeyPatch())

for line in sys.stdin:
    serve(RankSettings(**json.loads(line)))
    print("done", flush=True)
