"""A rank of a tensor-parallel target that follows, in a process of its own; ``LocalRanks`` starts it.

Its only argument is a JSON object, see ``RankSettings``. It prints one line once it can be reached by the
others, then loads its part of the model and does what rank 0 says, until rank 0 or its parent is gone.
"""

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

from outrider.actors.target_worker import follow
from outrider.cluster.child import stop_at_end_of_input
from outrider.models.decoder import Decoder
from outrider.models.decoder_loader import load_decoder
from outrider.models.device import take_device
from outrider.models.numerics import Numerics
from outrider.models.parallel import RankGroup, find_store
from outrider.models.resolve import resolve_model
from outrider.speculation.errors import OutriderError


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSettings:
    """Which rank of how many this is, where rank 0 is, and what all of them load.

    device: of this rank, as PyTorch spells it.
    """

    rank: int
    size: int
    host: str
    port: int
    model: str
    dtype: str
    numerics: str
    max_model_len: int | None
    threads: int
    device: str = "cpu"
    quantization: str | None = None


def join(settings: RankSettings, on_found: Callable[[], None] = lambda: None) -> tuple[Decoder, RankGroup]:
    """Joins the group and loads this rank's part of the model.

    on_found: called when rank 0 has been found.

    Raises:
        TargetGroupError: another rank is gone.
        ModelError: this rank's part cannot be loaded.
    """
    folder = resolve_model(settings.model)
    store = find_store(settings.host, settings.port)
    on_found()
    device = torch.device(settings.device)
    take_device(device)
    ranks = RankGroup(store, settings.rank, settings.size, host=settings.host, device=device)
    decoder = load_decoder(
        folder,
        dtype=settings.dtype,
        numerics=Numerics(settings.numerics),
        max_model_len=settings.max_model_len,
        ranks=ranks,
        device=device,
        quantization=settings.quantization,
    )
    return decoder, ranks


def serve(settings: RankSettings) -> None:
    """Joins and follows; errors as for ``join``."""
    torch.set_num_threads(settings.threads)
    follow(*join(settings, lambda: print("ready", flush=True)))


def main() -> None:
    """Follows until the end; anything that goes wrong becomes the last line of standard error."""
    threading.Thread(target=stop_at_end_of_input, daemon=True).start()
    try:
        serve(RankSettings(**json.loads(sys.argv[1])))
    except Exception as error:
        if not isinstance(error, OutriderError):
            traceback.print_exc()
        said = " ".join(f"{error}".splitlines())
        print(f"outrider: error: {said or type(error).__name__}", file=sys.stderr, flush=True)
        # The others see the connections close. Until the interpreter has shut down they would not know why.
        os._exit(1)


if __name__ == "__main__":
    main()
