"""``outrider trace``: one request of a trace as a page."""

import argparse
from pathlib import Path

from outrider.cluster.cli.arguments import Commands
from outrider.cluster.given_files import writing

NAME = "trace"
SUMMARY = "show where the time of a request went, as a page"

DESCRIPTION = """\
Makes a page of what 'outrider generate --trace' wrote: a request's text, the timeline of
target and drafters, and every draft tree. The page is one file and needs no network.
"""

EXAMPLES = """\
examples:
  outrider generate --prompt 'def fibonacci(n):' --workers local --trace run.json
  outrider trace run.json
  outrider trace run.json --request 3f0c5a7d9b1e2460 -o slow.html

The trace itself also opens in ui.perfetto.dev and chrome://tracing. docs/seeing.md tells more.
"""


def register(commands: Commands) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(NAME, help=SUMMARY, description=DESCRIPTION, epilog=EXAMPLES)
    parser.set_defaults(run=run)
    parser.add_argument("file", metavar="FILE", help="what --trace wrote")
    parser.add_argument("-o", "--output", metavar="FILE", help="the page; default: beside the trace, .html")
    parser.add_argument("--request", metavar="ID", help="which request; default: the first")
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def run(arguments: argparse.Namespace) -> int:
    """Writes the page and prints where it is."""
    from outrider.cluster.seeing.page import render_page
    from outrider.cluster.seeing.story import read_story

    story = read_story(arguments.file, arguments.request)
    output = Path(arguments.output or Path(arguments.file).with_suffix(".html"))
    with writing(f"the page {str(output)!r}"):
        output.write_text(render_page(story), encoding="utf-8")
    others = len(story.requests) - 1
    beside = f"; {others} more: outrider trace --request ID" if others and arguments.request is None else ""
    print(f"{output}: request {story.request}{beside}")
    return 0
