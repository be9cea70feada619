"""What a cluster's processes log, a line for each thing that happens to a request or a member."""

import logging


def log_as(component: str) -> None:
    """Sends this process's log lines to standard error, with the component's name."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter(
            f"%(asctime)s.%(msecs)03d {component} %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"
        )
    )
    logger = logging.getLogger("outrider")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)
