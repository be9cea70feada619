"""The server's page, in a real browser: skipped where there is no Chromium."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import uvicorn
from instruments.browser import Browser, Page, chromium, find_chromium

from outrider import LLM, SamplingParams
from outrider.cluster.api.app import build_app
from outrider.cluster.api.backend import Health
from outrider.cluster.api.calls import Limits
from outrider.cluster.api.local_backend import LocalBackend
from outrider.cluster.api.service import ModelSettings, ServedModel, Service
from outrider.cluster.server import listening_socket
from outrider.models.demo import pair

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

SECONDS = 60.0
KEY = "sk-outrider"
PROMPT = "def fibonacci(n):\n    "
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
MOST = 400


class Crowded(LocalBackend):
    """Names and notes of processes are whatever others made them."""

    async def health(self) -> Health:
        health = await super().health()
        lost = {"name": HOSTILE, "role": "draft", "phase": "failed", "note": HOSTILE, "address": HOSTILE}
        return replace(health, members=[*health.members, lost])


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    # Small as the pair is, drafting would hardly ever pay: these trees do not ask.
    config = {"model": str(pair.DRAFT), "num_speculative_tokens": 4, "tree": {"adaptive": False}}
    with LLM(max_num_seqs=2, max_model_len=512, speculative_config=config) as model:
        yield model


@contextmanager
def serving(
    llm: LLM, *, backend: type[LocalBackend] = LocalBackend, keys: tuple[str, ...] = ()
) -> Iterator[int]:
    """A server's port; it has a loop and a thread of its own."""
    backends: list[LocalBackend] = []

    async def make() -> Service:
        backends.append(backend(llm))
        settings = ModelSettings(names=("demo",), limits=Limits(max_tokens=MOST))
        return Service([ServedModel(backends[0], settings)])

    listener = listening_socket("127.0.0.1", 0)
    listener.listen()  # a page that is asked for before the server is there waits for it
    server = uvicorn.Server(
        uvicorn.Config(build_app(make, keys=keys), log_config=None, timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    folder: Path = tmp_path_factory.mktemp("chromium")
    with chromium(CHROMIUM, folder / "profile") as made:
        yield made


def opened(browser: Browser, port: int, *, login: str = "") -> Page:
    """The page, once it has heard from its server."""
    page = browser.open()
    page.look(1280, scheme="light")
    page.go(f"http://{login}127.0.0.1:{port}/")
    page.wait(
        "!document.querySelector('#state').classList.contains('bad') && document.querySelector('#members td')"
    )
    return page


def generate(page: Page, *, max_tokens: int, seed: int = 3) -> None:
    """Fills the form and presses Ctrl+Enter in the prompt."""
    page.evaluate(f"document.getElementById('max_tokens').value = {max_tokens}")
    page.evaluate(f"document.getElementById('seed').value = {seed}")
    page.evaluate("document.getElementById('prompt').focus()")
    page.press("Enter", code=13, modifiers=2)


def test_both_runs_are_shown_and_found_identical(browser: Browser, llm: LLM) -> None:
    (expected,) = llm.generate([PROMPT], SamplingParams(max_tokens=48, temperature=0.7, seed=3))
    with serving(llm) as port:
        page = opened(browser, port)
        generate(page, max_tokens=48)
        page.wait("document.querySelector('#verdict').textContent")
        assert "Identical texts, 48 tokens" in page.text("#verdict")
        assert page.text("#with .text") == page.text("#without .text") == PROMPT + expected.outputs[0].text
        accepted = page.evaluate(
            "[...document.querySelectorAll('#with mark')].map((each) => each.textContent)"
        )
        assert "".join(accepted)
        assert page.evaluate("document.querySelectorAll('#without mark').length") == 0
        assert page.text("#without .stats").startswith("Tokens/s")
        # What is drafted shows in the live figures, too.
        page.wait("document.querySelectorAll('.figure .value')[3].textContent.endsWith('tokens/step')")
        assert page.complaints == []
        assert {each.split("/")[2] for each in page.requests} == {f"127.0.0.1:{port}"}


def test_what_others_wrote_is_shown_as_text(browser: Browser, llm: LLM) -> None:
    with serving(llm, backend=Crowded) as port:
        page = opened(browser, port)
        assert page.text("#members").count(HOSTILE) == 3
        assert "1 of 2 processes not ready" in page.text("#state")
        assert page.evaluate("document.querySelectorAll('main img, main script').length") == 0
        assert page.evaluate("document.title") == "Outrider"


def test_errors_of_the_api_are_shown(browser: Browser, llm: LLM) -> None:
    with serving(llm) as port:
        page = opened(browser, port)
        generate(page, max_tokens=MOST + 1)
        page.wait("!document.querySelector('#with .error').hidden")
        assert f"max_tokens must be at most {MOST} here" in page.text("#with .error")
        assert page.text("#without .phase") == "not run"
        assert page.evaluate("!document.getElementById('generate').disabled")


def test_stop_ends_the_request(browser: Browser, llm: LLM) -> None:
    with serving(llm) as port:
        page = opened(browser, port)
        generate(page, max_tokens=MOST)
        page.wait("document.querySelector('#with .own')")
        page.evaluate("document.getElementById('stop').click()")
        page.wait("document.querySelector('#with .phase').textContent === 'stopped'")
        assert page.text("#without .phase") == "not run"
        assert page.text("#verdict") == ""
        page.wait("document.querySelectorAll('.figure .value')[1].textContent === '0of 2'")


def test_a_hidden_page_asks_nothing_and_a_lost_server_is_told(browser: Browser, llm: LLM) -> None:
    with serving(llm) as port:
        page = opened(browser, port)
        page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        page.evaluate("new Promise((resolve) => setTimeout(resolve, 1200))")  # a look may be under way
        asked = len(page.requests)
        page.evaluate("new Promise((resolve) => setTimeout(resolve, 3000))")
        assert len(page.requests) == asked
    page.evaluate("Object.defineProperty(document, 'hidden', {value: false, configurable: true})")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait("document.querySelector('#state').classList.contains('bad')")
    assert page.text("#state") == "The server does not answer; next try in 2 s"
    page.wait("document.querySelector('#state').textContent.endsWith('next try in 4 s')")


def test_a_key_given_as_a_password_is_all_it_takes(browser: Browser, llm: LLM) -> None:
    with serving(llm, keys=(KEY,)) as port:
        page = opened(browser, port, login=f"anybody:{KEY}@")
        generate(page, max_tokens=8)
        page.wait("document.querySelector('#verdict').textContent")
        assert "Identical texts, 8 tokens" in page.text("#verdict")
        assert page.complaints == []
