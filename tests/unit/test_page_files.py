"""What the page consists of and may do, as far as no browser is needed; see tests/clients/test_page.py."""

import asyncio
import re

import httpx
import pytest

from outrider.cluster.api.app import PAGE, PAGE_FILES, build_app
from outrider.cluster.api.service import Service


def get(path: str) -> httpx.Response:
    """Of a server without any model: the page needs none."""

    async def make() -> Service:
        raise AssertionError("nothing is started")

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=build_app(make))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path)

    return asyncio.run(ask())


def test_the_folder_holds_what_is_served_and_nothing_else() -> None:
    assert {each.name for each in PAGE.iterdir()} == {"index.html", *PAGE_FILES}


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in PAGE_FILES)])
def test_a_file_comes_with_its_type_and_may_use_this_server_alone(path: str) -> None:
    reply = get(path)
    assert reply.status_code == 200
    kind = PAGE_FILES.get(path.removeprefix("/page/"), "text/html")
    assert reply.headers["content-type"].partition(";")[0] == kind
    assert reply.headers["content-security-policy"].startswith("default-src 'self';")
    assert "unsafe" not in reply.headers["content-security-policy"]
    assert reply.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", ["index.html", "other.js", "..%2fapp.py", "%2e%2e/app.py", "style.css/"])
def test_there_are_no_other_files(name: str) -> None:
    assert get(f"/page/{name}").status_code in (307, 404)


def test_text_from_others_cannot_become_markup() -> None:
    for path in PAGE.glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", path.read_text()
        )


def test_nothing_comes_from_elsewhere() -> None:
    for path in PAGE.iterdir():
        addresses = set(re.findall(r"https?://[^\s\"'`)]+", path.read_text(encoding="utf-8")))
        assert addresses <= {"http://www.w3.org/2000/svg"}, path
