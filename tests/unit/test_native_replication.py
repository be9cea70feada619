"""The native module of reconciliation: what is done without it."""

import subprocess
import sys
from os import environ

import pytest

from outrider.kernels.native import library

MAKE_TWO_REPLICAS = """
import sys
{before}
import numpy as np
from outrider.speculation.living_tree import LivingTree
from outrider.speculation.replication.replica import Replica
from outrider.speculation.replication.text import CommittedText
from outrider.speculation.tree import Law
for _ in range(2):
    replica = Replica(LivingTree(Law.COUPLED), CommittedText(np.array([1, 2])), 9)
print(replica._grafter)
"""


@pytest.mark.parametrize(
    ("before", "variables", "why"),
    [
        ("sys.modules['outrider.kernels.native._replication'] = None", {library.VARIABLE: ""}, "not built"),
        ("", {library.VARIABLE: "off"}, "switched off by OUTRIDER_CPU_KERNEL"),
    ],
)
def test_without_the_module_arrays_do_it_and_one_line_says_so(
    before: str, variables: dict[str, str], why: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MAKE_TWO_REPLICAS.format(before=before)],
        env=environ | variables, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["None"]
    lines = [line for line in done.stderr.splitlines() if line.startswith("native")]
    assert lines == [f"native reconciliation is {why}: NumPy is used, which is slower"]
