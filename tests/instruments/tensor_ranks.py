"""Tensor-parallel runners over processes that are started once and serve many models."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from forwards import blocks_of

from outrider.actors.model_runner import ModelRunner
from outrider.actors.target_worker import TargetLeader
from outrider.cluster.target_rank import RankSettings
from outrider.models.decoder_loader import load_decoder
from outrider.models.numerics import Numerics
from outrider.models.parallel import LOOPBACK, RankGroup, open_store


class RankServers:
    """Processes for the ranks from 1 on.

    words: see ``rank_server``.
    """

    def __init__(self, count: int, *words: str) -> None:
        script = Path(__file__).with_name("rank_server.py")
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-W", "error", script, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(count)
        ]

    @contextmanager
    def runner(
        self,
        folder: Path,
        size: int,
        *,
        dtype: str = "float32",
        numerics: Numerics = Numerics.CANONICAL,
        num_sequences: int = 1,
    ) -> Iterator[ModelRunner]:
        """A runner whose network ``size`` ranks hold; afterwards they are free for another."""
        store = open_store()
        settings = RankSettings(
            rank=0, size=size, host=LOOPBACK, port=store.port, model=str(folder), dtype=dtype,
            numerics=str(numerics), max_model_len=None, threads=1,
        )  # fmt: skip
        others = self._processes[: size - 1]
        for rank, process in enumerate(others, 1):
            self._say(process, json.dumps({**asdict(settings), "rank": rank}))
        for process in others:
            self._expect(process, "ready")
        ranks = RankGroup(store, 0, size)
        decoder = load_decoder(folder, dtype=dtype, numerics=numerics, max_model_len=None, ranks=ranks)
        leader = TargetLeader(decoder, ranks)
        try:
            yield ModelRunner(leader, num_blocks=blocks_of(leader, num_sequences))
        finally:
            leader.stop()
        for process in others:
            self._expect(process, "done")

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.stdout.close()
            process.kill()
            process.wait()

    @staticmethod
    def _say(process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()

    @staticmethod
    def _expect(process: subprocess.Popen[str], word: str) -> None:
        assert process.stdout is not None
        assert process.stdout.readline() == word + "\n"
