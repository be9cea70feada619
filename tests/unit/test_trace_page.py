"""``outrider trace``: the page stands alone, is sound HTML, and hostile texts stay texts."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from outrider.cluster.seeing.page import render_page
from outrider.cluster.seeing.story import Node, read_story
from outrider.cluster.seeing.trees import COLUMN, MARGIN, ROW, draw_tree

Run = Callable[..., tuple[int, str, str]]
EVIL = "</script><script>alert(1)</script><!--\"'&"
VOID = {"meta", "br", "img", "input", "link", "hr"}
OWN = {"request": "r1"}
TEXTS = {"1": "def", "2": " f", "3": EVIL, "4": "\n", "5": "\x00\x1b", "6": "€"}


def slice_(name: str, kind: str, lane: int, began: float, took: float, **args: Any) -> dict[str, Any]:
    place = {"pid": lane, "tid": 1, "ts": began, "dur": took}
    return {"ph": "X", "name": name, "cat": kind, **place, "args": args}


def a_trace() -> dict[str, Any]:
    """Two steps of one request, a worker, growth that came too late, and another request."""
    tree = {"tokens": [3, 2, 4], "parents": [-1, -1, 0], "scores": [0.5, 0.25, 0.125]}
    first = {"request": "r1", "step": 0, "position": 2, "rows": 5}
    second = {"request": "r1", "step": 1, "position": 4, "rows": 1}
    about = {"choice": 0, "seed": 1, "temperature": 0.0, "prompt_token_ids": [1, 2]}
    late = {"ids": [4, 5], "tokens": [3, 6], "parents": [2, 4], "scores": [0.5, 0.4]}
    return {
        "displayTimeUnit": "ms",
        "otherData": {
            "outrider_trace": 1,
            "dropped_events": 0,
            "requests": [{"id": "r1", **about}, {"id": EVIL, **about}],
            "texts": TEXTS,
        },
        "traceEvents": [
            {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "target"}},
            {"ph": "M", "name": "process_name", "pid": 10, "args": {"name": f"draft worker {EVIL}"}},
            slice_("step 0", "step", 1, 0, 1000, step=0, requests=1, rows=5),
            slice_("forward", "forward", 1, 100, 800, step=0, requests=1, rows=5),
            slice_("1 of 3 accepted", "request", 3, 0, 1000, **first, tree=tree, chosen=[3, 4, 1, 2],
                   accepted=[0, 2], committed=[3, 4, 2], text=""),
            slice_("draft step", "draft", 10, 200, 300, request="r1", steps=1, rows=2, nodes=2,
                   taken_in=1010, late_nodes=40, late=late),
            {"ph": "s", "id": 0, "name": "growth", "cat": "growth", "pid": 10, "ts": 400, "args": OWN},
            {"ph": "f", "id": 0, "name": "growth", "cat": "growth", "pid": 1, "ts": 1010, "args": OWN},
            slice_("wait for drafters", "wait", 1, 1000, 10, request_ids=["r1"]),
            slice_("forward", "forward", 1, 1100, 800, step=1, requests=1, rows=1),
            slice_("nothing drafted", "request", 3, 1000, 1000, **second,
                   tree={"tokens": [], "parents": [], "scores": []}, chosen=[5], accepted=[],
                   committed=[5], text="", finish_reason="length"),
            slice_("nothing drafted", "request", 3, 3000, 1000, **{**second, "request": EVIL},
                   tree={"tokens": [], "parents": [], "scores": []}, chosen=[5], accepted=[],
                   committed=[5], text=""),
        ],
    }  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(a_trace()), encoding="utf-8")
    return path


class Sound(HTMLParser):
    """Every element that begins also ends, in order; no id twice."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        assert not [name for name in values if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open and self.open[-1] not in ("script", "style") else ""


def parsed(page: str) -> Sound:
    parser = Sound()
    parser.feed(page)
    parser.close()
    assert not parser.open
    assert len(parser.ids) == len(set(parser.ids))
    return parser


@pytest.mark.parametrize("request_id", [None, EVIL])
def test_the_page_is_sound_and_needs_no_network(file: Path, request_id: str | None) -> None:
    page = render_page(read_story(str(file), request_id))
    found = parsed(page)
    assert found.counts["script"] == found.counts["style"] == 1
    assert not re.search(r"https?://|//[a-z]|url\(|@import|<link|<img", page, re.IGNORECASE)
    assert set(found.links) <= {f"#{name}" for name in found.ids}
    assert "alert(1)" in found.text, "hostile texts are shown as they are"
    assert not set(page) & set(map(chr, range(0x20))) - {"\n"}


def test_a_request_is_told_as_it_was(file: Path) -> None:
    story = read_story(str(file))
    first, second = story.steps
    assert [node.accepted for node in first.tree] == [True, False, True]
    assert (first.committed, first.num_accepted, first.own) == ([EVIL, "\n", " f"], 2, " f")
    assert (first.root, second.root) == (" f", " f")
    assert [(node.text, node.parent) for node in second.late] == [(EVIL, -1), ("€", 0)]
    assert (first.num_late, second.num_late) == (0, 40)
    assert story.prompt == "def f"
    assert story.seconds == pytest.approx(0.002)
    (drafter,) = story.drafters
    assert [(block.began, block.ended) for block in drafter.blocks] == [(0.0002, 0.0005)]
    page = parsed(render_page(story))
    assert "2 of 3 drafted tokens accepted" in page.text
    assert "40 drafted tokens came too late for this step; 2 of them are shown" in page.text
    assert "3.00 s" not in page.text


def test_other_requests_forwards_are_told_apart(file: Path) -> None:
    trace = a_trace()
    trace["traceEvents"].append(slice_("forward", "forward", 1, 1950, 40, step=7, requests=1, rows=2))
    file.write_text(json.dumps(trace), encoding="utf-8")
    blocks = [block for block in read_story(str(file)).target.blocks if block.kind == "forward"]
    assert [(block.ours, block.step) for block in blocks] == [(True, 0), (True, 1), (False, None)]


def test_arrows_are_the_request_s_own(file: Path) -> None:
    trace = a_trace()
    (arrow,) = read_story(str(file)).arrows
    assert (arrow.kind, arrow.drafter, arrow.left, arrow.arrived) == ("growth", 0, 0.0004, 0.00101)
    for event in trace["traceEvents"]:
        if event["ph"] in "sf":
            event["args"] = {"request": EVIL}
    file.write_text(json.dumps(trace), encoding="utf-8")
    assert read_story(str(file)).arrows == []


def test_a_tree_has_its_accepted_path_along_the_top_and_no_two_boxes_in_one_place() -> None:
    nodes = [
        Node(text="a", parent=-1, score=0.6),
        Node(text="b", parent=-1, score=0.3, accepted=True),
        Node(text="c", parent=0, score=0.2),
        Node(text="d", parent=1, score=0.1, accepted=True),
        Node(text="e", parent=1, score=0.05),
    ]
    drawn = draw_tree(nodes, root="r", own="o")
    boxes = [(int(x), int(y)) for x, y in re.findall(r'<rect x="(\d+)" y="(\d+)"', drawn)]
    assert len(boxes) == len(set(boxes)) == 7
    places = [((x - MARGIN) // COLUMN, (y - MARGIN) // ROW) for x, y in boxes]
    root, a, b, _, d, e, own = places
    assert [root, b, d, own] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert a[0] == 1
    assert e == (2, 1)


def test_the_command_writes_the_page_beside_the_trace_or_where_it_is_told(
    outrider_: Run, file: Path, tmp_path: Path
) -> None:
    code, out, err = outrider_("trace", str(file))
    assert (code, err) == (0, "")
    assert out == f"{file.with_suffix('.html')}: request r1; 1 more: outrider trace --request ID\n"
    elsewhere = tmp_path / "page.html"
    assert outrider_("trace", str(file), "--request", "r1", "-o", str(elsewhere))[0] == 0
    assert elsewhere.read_text(encoding="utf-8") == file.with_suffix(".html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ("", "cannot be read: it is not JSON"),
        ("[1]", "is not a trace that 'outrider generate --trace' wrote"),
        ('{"traceEvents": []}', "is not a trace that 'outrider generate --trace' wrote"),
        ('{"otherData": {"outrider_trace": 1, "requests": []}}', "the trace has no requests"),
        ('{"otherData": {"outrider_trace": 1}}', "is damaged (KeyError: 'requests')"),
        (
            '{"otherData": {"outrider_trace": 1, "requests": [{"id": "a"}], "texts": {}}, "traceEvents": []}',
            "is damaged (ValueError: min()",
        ),
    ],
)
def test_what_is_no_trace_is_refused_in_one_line(
    content: str | None, message: str, outrider_: Run, tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    code, out, err = outrider_("trace", str(file))
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_an_unknown_request_and_a_page_that_cannot_be_written(outrider_: Run, file: Path) -> None:
    code, _, err = outrider_("trace", str(file), "--request", "r2")
    assert (code, err.count("\n")) == (2, 1)
    assert "the trace has no request 'r2'; it has r1, " in err
    code, _, err = outrider_("trace", str(file), "-o", "/no/such/page.html")
    assert (code, err.count("\n")) == (2, 1)
    assert "the page '/no/such/page.html' cannot be written: No such file" in err


@pytest.mark.parametrize("flag", ["--trace", "--record"])
def test_a_file_that_cannot_be_written_is_refused_before_a_model_is_loaded(outrider_: Run, flag: str) -> None:
    words = ("generate", "--prompt", "a", "--target", "/no/model", flag, "/no/such/file")
    code, out, err = outrider_(*words)
    assert (code, out) == (2, "")
    assert "'/no/such/file' cannot be written: No such file or directory" in err
    assert err.count("\n") == 1


def test_a_trace_and_a_recording_are_two_files(outrider_: Run, tmp_path: Path) -> None:
    file = str(tmp_path / "x")
    words = ("generate", "--prompt", "a", "--target", "/no/model", "--trace", file, "--record", file)
    code, _, err = outrider_(*words)
    assert (code, "trace and record must be two files" in err) == (2, True)
    assert not Path(file).exists()


@pytest.mark.parametrize("flag", ["--trace", "--record"])
def test_a_cluster_writes_no_such_files(outrider_: Run, flag: str, tmp_path: Path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text("name: x\n", encoding="utf-8")
    code, _, err = outrider_("generate", str(config), "--prompt", "a", flag, str(tmp_path / "f"))
    assert code == 2
    assert f"{flag} is for generating in this process" in err
