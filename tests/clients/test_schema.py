"""Bodies drawn from our own schema: no answer is a 5xx."""

import re

from instruments.client_environments import KEY, PINNED, environment, run_client
from instruments.serve_process import ServeProcess

EXAMPLES = 30


def test_no_body_that_the_schema_allows_or_forbids_makes_the_server_fail(server: ServeProcess) -> None:
    printed = run_client(
        environment("schemathesis") / "schemathesis",
        *("run", f"{server.url}/openapi.json", "--checks", "not_a_server_error"),
        *("--mode", "all", "--max-examples", str(EXAMPLES), "--seed", "1", "--request-timeout", "60"),
        *("--header", f"Authorization: Bearer {KEY}"),
        *("--phases", "examples,coverage,fuzzing", "--continue-on-failure"),
        seconds=1200,
        SCHEMATHESIS_HOOKS="schema_hooks",
        PYTHONPATH=str(PINNED.parent / "programs"),
    )
    # Its exit code tells of 5xx; this, that it asked.
    found = re.search(r"(\d+) generated, (\d+) passed", printed)
    assert found is not None, printed
    assert int(found[2]) == int(found[1]) > 10 * EXAMPLES
