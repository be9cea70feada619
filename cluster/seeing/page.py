"""One request as a page: its text, its timeline and every draft tree. It needs nothing but itself."""

from html import escape
from pathlib import Path

from outrider.cluster.seeing.story import Step, Story
from outrider.cluster.seeing.timeline import busy_share, draw_timeline
from outrider.cluster.seeing.trees import draw_tree, printable, visible

_HERE = Path(__file__).parent
LATE_DRAWN = 12
"""Most nodes that came too late that a step shows; it says how many there were."""


def render_page(story: Story) -> str:
    """The whole page as HTML."""
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    body = "".join((_header(story), _tiles(story), _text(story), _timeline(story), _steps(story)))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>Where the time went: {escape(story.request)}</title><style>{style}</style></head>"
        f"<body><main>{body}</main><script>{script}</script></body></html>\n"
    )


def _header(story: Story) -> str:
    others = len(story.requests) - 1
    lost = f" The trace lost its first {story.dropped} events." if story.dropped else ""
    beside = f" The same trace has {_count(others, 'other request')}." if others else ""
    return (
        "<header><div><h1>Where the time went</h1>"
        f'<p class="dim">Request <code>{escape(story.request)}</code>, {escape(story.settings)}.'
        f"{beside}{lost}</p></div>"
        '<button hidden data-does="theme">Light / dark</button></header>'
    )


def _tiles(story: Story) -> str:
    steps = [step for step in story.steps if not step.only_cached]
    tokens = sum(len(step.committed) for step in steps)
    drafted, accepted = sum(len(step.tree) for step in steps), sum(step.num_accepted for step in steps)
    tiles = [
        (f"{tokens}", f"tokens in {_duration(story.seconds)}"),
        (f"{len(steps)}", "steps of the target"),
        (f"{tokens / max(1, len(steps)):.2f}", "tokens per step; 1 without speculation"),
        (f"{accepted} of {drafted}", "verified draft tokens were accepted"),
        (f"{busy_share(story.target, ('forward',), story.seconds):.0%}", "of the time the target computes"),
    ]
    waits = busy_share(story.target, ("wait",), story.seconds)
    if waits:
        tiles.append((f"{waits:.0%}", "of the time the target waits for drafters"))
    tiles += [
        (f"{busy_share(lane, ('draft',), story.seconds):.0%}", f"of the time drafting: {lane.name}")
        for lane in story.drafters
    ]
    shown = "".join(
        f'<div class="tile"><b>{value}</b><span>{escape(what)}</span></div>' for value, what in tiles
    )
    return f'<div class="tiles">{shown}</div>'


def _text(story: Story) -> str:
    tokens = "".join(
        f'<a class="{"hit" if at < step.num_accepted else "own"}" href="#step-{step.number}" '
        f'title="step {step.number}">{escape(printable(token))}</a>'
        for step in story.steps
        for at, token in enumerate(step.committed)
    )
    key = _key(("hit-fill", "drafted, and accepted by the target"), ("own-fill", "the target's own token"))
    return (
        f"<section><h2>The text, token by token</h2>{key}"
        f'<p class="text"><span class="prompt">{escape(printable(story.prompt))}</span>{tokens}</p></section>'
    )


def _timeline(story: Story) -> str:
    kinds = {block.kind for lane in (story.target, *story.drafters) for block in lane.blocks}
    names = [
        ("forward", "target computes; its number is the step's"),
        ("draft", "drafter computes"),
        ("wait", "target waits for a drafter"),
        ("reconcile", "target takes in what was drafted"),
    ]
    entries = [(f"swatch-{kind}", what) for kind, what in names if kind in kinds]
    if any(not block.ours for lane in (story.target, *story.drafters) for block in lane.blocks):
        entries.append(("swatch-other", "pale: for other requests"))
    entries.append(("swatch-idle", "idle: a bubble"))
    if story.arrows:
        entries += [("arrow commit", "committed tokens, told to the drafter")]
        entries += [("arrow growth", "drafted tokens, taken in by the target")]
    buttons = "".join(
        f'<button hidden data-does="{does}">{what}</button>'
        for does, what in (("closer", "Zoom in"), ("away", "Zoom out"), ("whole", "All of it"))
    )
    return (
        f'<section><div class="bar"><h2>The time</h2><div>{buttons}</div></div>'
        f"{_key(*entries)}{draw_timeline(story)}</section>"
    )


def _steps(story: Story) -> str:
    kinds = [("hit-fill", "✓ accepted"), ("own-fill", "● the target's own token"), ("miss-fill", "rejected")]
    if any(step.late for step in story.steps):
        kinds.append(("late-fill", "came too late: below tokens that the target had not taken"))
    key = _key(*kinds)
    cards = "".join(map(_step, story.steps))
    return (
        '<section><h2>The steps and their draft trees</h2><p class="dim">Each tree begins with the last '
        "committed token. A node's score is the drafter's estimate that the target takes the whole path "
        f"to it.</p>{key}{cards}</section>"
    )


def _step(step: Step) -> str:
    took = f"{_duration(step.ended - step.began)}, {_count(step.rows, 'row')}"
    if step.only_cached:
        what, drawn = f"cached text up to token {step.position}; {took}", ""
    else:
        chips = "".join(
            f'<span class="{"hit" if at < step.num_accepted else "own"}">{escape(visible(token))}</span>'
            for at, token in enumerate(step.committed)
        )
        verified = f"{step.num_accepted} of {len(step.tree)} drafted tokens accepted"
        ending = f"; the text ends ({escape(step.finish_reason)})" if step.finish_reason else ""
        what = f"{verified if step.tree else 'nothing drafted'}; {took}{ending}"
        what += f' <span class="chips mono">{chips}</span>'
        drawn = _scrolled(draw_tree(step.tree, root=step.root, own=step.own)) if step.tree else ""
    return (
        f'<div class="step" id="step-{step.number}"><h3>Step {step.number}</h3> '
        f'<div class="what">{what}</div>{drawn}{_late(step)}</div>'
    )


def _late(step: Step) -> str:
    if not step.late:
        return ""
    shown = step.late[:LATE_DRAWN]
    some = f"; {len(shown)} of them are shown" if step.num_late > len(shown) else ""
    title = f"{_count(step.num_late, 'drafted token')} came too late for this step{some}"
    drawn = _scrolled(draw_tree(shown, root="…", late=True))
    return f"<details><summary>{title}</summary>{drawn}</details>"


def _scrolled(drawing: str) -> str:
    return f'<div class="scroll" tabindex="0">{drawing}</div>'


def _key(*entries: tuple[str, str]) -> str:
    rows = "".join(f'<li><i class="{kind}"></i>{escape(what)}</li>' for kind, what in entries)
    return f'<ul class="key">{rows}</ul>'


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
