"""The commands that start, find, examine and end clusters, as processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from instruments.processes import INTERRUPTED, until

from outrider import LLM, SamplingParams

PROMPT = "def fibonacci(n):"
SECONDS = 120.0


def outrider(*words: str, folder: Path, seconds: float = SECONDS) -> "subprocess.CompletedProcess[str]":
    """Runs a command line whose temporary files stand in a folder of the test's own."""
    return subprocess.run(
        [sys.executable, "-m", "outrider.cluster.cli.main", *words],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=environment(folder),
    )


def environment(folder: Path) -> dict[str, str]:
    hidden = ("RAY_", "OUTRIDER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return {**kept, "TMPDIR": str(folder), "HOME": str(folder / "home")}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # Not pytest's own: the paths of Ray's sockets must be short.
    path = Path(f"/tmp/orc-{os.getpid()}")
    (path / "home").mkdir(parents=True)
    yield path
    assert list((path / "home").iterdir()) == [], "something was written to the user's home"
    left = [each for each in path.iterdir() if each.name.startswith("outrider-") and each.suffix == ""]
    private = path / f"outrider-{os.getuid()}"
    assert [each for each in left if each != private] == [], "temporary folders were left behind"
    if private.exists():
        assert [each.name for each in private.iterdir() if each.suffix != ".log"] == []
    subprocess.run(["rm", "-rf", str(path)], check=True)


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Path]:
    """A standing cluster's file."""
    path = folder / "cluster.yaml"
    path.write_text("name: commands\ndraft: {}\n")
    up = outrider("up", str(path), folder=folder)
    assert up.returncode == 0, up.stderr
    assert "draft-0" in up.stdout
    yield path
    down = outrider("down", str(path), folder=folder)
    assert down.returncode == 0, down.stderr
    assert until(lambda: not processes_of(folder), 15.0), processes_of(folder)
    again = outrider("status", str(path), folder=folder)
    assert again.returncode == 1
    assert "no cluster called 'commands' is up" in again.stderr


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that were started with the folder as theirs for temporary files."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) != os.getpid():
            try:
                if f"TMPDIR={folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return found


def test_a_standing_cluster_gives_the_targets_own_tokens(cluster: Path, folder: Path) -> None:
    words = ("generate", str(cluster), "--prompt", PROMPT, "--max-tokens", "24", "--json")
    with LLM() as llm:
        (wanted,) = llm.generate([PROMPT], SamplingParams(temperature=0.0, max_tokens=24), speculative=False)
    for more in ((), ("--no-speculation",), ("--pipeline", "serial")):
        done = outrider(*words, *more, folder=folder)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["token_ids"] == wanted.outputs[0].token_ids


def test_status_tells_who_serves_where(cluster: Path, folder: Path) -> None:
    done = outrider("status", str(cluster), "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert {(row["name"], row["phase"]) for row in said["members"]} == {
        ("target-0", "ready"),
        ("draft-0", "ready"),
    }
    assert said["targets"]["target-0"]["drafters"] == 1


def test_a_second_cluster_of_the_same_name_is_refused(cluster: Path, folder: Path) -> None:
    done = outrider("up", str(cluster), folder=folder)
    assert done.returncode == 1
    assert done.stderr.startswith("outrider: error: a cluster called 'commands' is up already")
    assert done.stderr.count("\n") == 1


def test_another_cluster_beside_it_works(cluster: Path, folder: Path) -> None:
    assert cluster.exists()
    other = folder / "other.yaml"
    other.write_text("name: other\n")
    done = outrider("generate", str(other), "--prompt", PROMPT, "--max-tokens", "4", "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 4


@pytest.mark.parametrize("moment", ["early", "serving"])
def test_ctrl_c_leaves_nothing(moment: str, folder: Path) -> None:
    own = folder / moment
    own.mkdir()
    path = own / "c.yaml"
    path.write_text("draft: {}\n")
    words = ["generate", str(path), "--prompt", PROMPT, "--max-tokens", "1500", "--ignore-eos"]
    process = subprocess.Popen(
        [sys.executable, "-m", "outrider.cluster.cli.main", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(own) | {"HOME": str(folder / "home")},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    if moment == "early":
        time.sleep(0.5)
    else:
        assert until(lambda: any("ray::TargetHost" in each for each in processes_of(own)), SECONDS)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode in (*INTERRUPTED, 0), said
    assert time.monotonic() - began < 15, "stopping took too long on a machine however busy"
    assert b"Traceback" not in said
    # Ray's own agents look every now and then whether their node is still there.
    assert until(lambda: not processes_of(own), 15.0), processes_of(own)
    assert [each.name for each in own.iterdir() if each.name.startswith("outrider-")] in (
        [],
        [f"outrider-{os.getuid()}"],
    )


@pytest.mark.parametrize(
    ("text", "command", "message"),
    [
        ("draft: {model: ./nowhere}\n", "up", "there is no model folder './nowhere'"),
        ("target: {num_gpus: 64}\n", "up", "target-0 needs 1 CPU, 64 GPU on one node"),
        ("target: {num_gpus: 64}\n", "generate", "target-0 needs 1 CPU, 64 GPU on one node"),
        ("address: 127.0.0.1:1\n", "generate", "no Ray cluster can be reached at 127.0.0.1:1"),
    ],
)
def test_what_cannot_start_is_said_in_one_line_and_leaves_nothing(
    text: str, command: str, message: str, folder: Path
) -> None:
    own = folder / "wrong"
    own.mkdir(exist_ok=True)
    path = own / "wrong.yaml"
    path.write_text(f"name: wrong\n{text}")
    more = ("--prompt", PROMPT) if command == "generate" else ()
    done = outrider(command, str(path), *more, folder=own)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("outrider: error: ")
    assert message in line
    assert until(lambda: not processes_of(own), 15.0), processes_of(own)


def test_check_says_what_fits_and_what_does_not(cluster: Path, folder: Path) -> None:
    done = outrider("check", str(cluster), "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert set(said["plan"]["places"]) == {"target-0", "draft-0"}
    assert {report["problem"] for reports in said["models"].values() for report in reports} == {""}
    path = folder / "large.yaml"
    path.write_text("target: {num_gpus: 3}\ndraft: {model: ./nowhere}\n")
    done = outrider("check", str(path), folder=folder)
    assert done.returncode == 1
    text = " ".join(done.stdout.split())
    assert "target-0 needs 1 CPU, 3 GPU on one node" in text
    assert "there is no model folder './nowhere'" in text


def test_doctor_measures_and_writes_a_bundle_without_secrets(cluster: Path, folder: Path) -> None:
    bundle = folder / "bundle.json"
    done = outrider("doctor", str(cluster), "--json", "--bundle", str(bundle), folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert json.loads(bundle.read_text()) == said
    found = {each["what"].partition(" ")[0]: each for each in said["findings"]}
    assert set(found) == {"configuration", "versions", "node", "clocks", "gRPC", "gloo"}
    assert all(each["verdict"] in ("ok", "warning") for each in said["findings"])
    assert "ms" in found["gRPC"]["detail"]
    assert said["config"]["security"] == "(left out)"


def test_the_demo_shows_texts_and_a_table(folder: Path) -> None:
    done = outrider("demo", "--parameters", "12M", "--tokens", "8", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("def fibonacci(n):") == 1
    rows = [line.split() for line in done.stdout.splitlines() if "yes" in line.split()]
    assert [row[-1] for row in rows] == ["yes"] * 6
    assert "NO" not in done.stdout.split()
