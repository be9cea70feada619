"""The process that keeps Ray for a standing cluster on this machine alone; ``outrider up`` starts it.

It reads the configuration as JSON from standard input, prints one line of JSON once the cluster is
ready or cannot be, and then stays until SIGTERM.
"""

import json
import os
import signal
import sys

from outrider.cluster.cluster_config import ClusterConfig
from outrider.cluster.ray_runtime import local_ray
from outrider.cluster.standing import Standing, forget, own_controller, remember
from outrider.speculation.errors import OutriderError


def main() -> int:
    """Keeps the cluster; the exit code."""
    # SIGTERM becomes an exception, so that whatever has been started by then is ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = ClusterConfig.model_validate_json(sys.stdin.read())
    try:
        with local_ray(), own_controller(config):
            import ray

            address = ray.get_runtime_context().gcs_address
            remember(
                config.name,
                Standing(pid=os.getpid(), address=address, token=os.environ.get("RAY_AUTH_TOKEN")),
            )
            try:
                print(json.dumps({"address": address}), flush=True)
                while True:
                    signal.pause()
            finally:
                forget(config.name)
    except KeyboardInterrupt:
        return 0
    except OutriderError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
