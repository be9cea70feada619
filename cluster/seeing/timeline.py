"""Who did what when, as lanes that scroll and zoom: the target above, its drafters below."""

import math
from html import escape
from statistics import median

from outrider.cluster.seeing.story import Arrow, Block, Lane, Story

STEP_PIXELS = 44
"""Width of a usual step when the page opens."""
WIDEST = 60_000
AXIS, LABEL, TRACK = 18, 22, 34
"""Heights in pixels, as in page.css."""
GAP, SMALL_GAP = 46, 6
"""Above a drafter, with arrows and without."""
TARGET_END = AXIS + LABEL + TRACK
UNITS = 100_000
"""Width of the arrows' drawing, which is stretched over all time."""


def draw_timeline(story: Story) -> str:
    """The lanes of a story as HTML."""
    steps = [step.ended - step.began for step in story.steps]
    width = min(WIDEST, round(STEP_PIXELS * story.seconds / max(median(steps), 1e-9)))
    target = _label(story.target, story.seconds) + _track(story.target, story.seconds)
    # A drafter's name stands below its track: arrows end above it.
    drafters = "".join(
        f'<div style="height:{GAP if story.arrows else SMALL_GAP}px"></div>'
        + _track(drafter, story.seconds)
        + _label(drafter, story.seconds)
        for drafter in story.drafters
    )
    lanes = _axis(story.seconds, width) + target + drafters
    return (
        '<div class="scroll" tabindex="0" aria-label="timeline">'
        f'<div class="lanes" data-width="{width}" style="width:{width}px">{lanes}{_arrows(story)}</div></div>'
    )


def busy_share(lane: Lane, kinds: tuple[str, ...], seconds: float) -> float:
    """The part of the time that a lane spent on this."""
    spent = sum(
        max(0.0, min(each.ended, seconds) - max(each.began, 0.0))
        for each in lane.blocks
        if each.kind in kinds
    )
    return min(1.0, spent / seconds) if seconds else 0.0


def _label(lane: Lane, seconds: float) -> str:
    share = busy_share(lane, ("forward", "draft"), seconds)
    works = f'<span class="dim">works {share:.0%} of the time</span>'
    return f'<div class="label"><b>{escape(lane.name)}</b> {works}</div>'


def _track(lane: Lane, seconds: float) -> str:
    return f'<div class="track">{"".join(_block(each, seconds) for each in lane.blocks)}</div>'


def _block(block: Block, seconds: float) -> str:
    began, ended = max(block.began, 0.0), min(block.ended, seconds)
    place = f"left:{100 * began / seconds:.4f}%;width:{100 * max(0.0, ended - began) / seconds:.4f}%"
    kind = block.kind if block.ours else f"{block.kind} other"
    title = block.title if block.ours else f"for other requests: {block.title}"
    told = f'class="{kind}" style="{place}" title="{escape(title)}"'
    if block.step is None:
        return f"<span {told}></span>"
    return f'<a {told} href="#step-{block.step}">{block.step}</a>'


def _axis(seconds: float, width: int) -> str:
    """A mark about every hundred pixels, at round times."""
    every = seconds * 110 / max(width, 1)
    scale = 10.0 ** math.floor(math.log10(max(every, 1e-9)))
    every = scale * next(factor for factor in (1, 2, 5, 10) if factor * scale >= every * 0.999)
    marks = [at * every for at in range(int(seconds / every) + 1)]
    digits = max(0, -math.floor(math.log10(every * 1e3)))
    return (
        '<div class="axis">'
        + "".join(
            f'<span style="left:{100 * mark / seconds:.4f}%">{mark * 1e3:.{digits}f} ms</span>'
            for mark in marks
        )
        + "</div>"
    )


def _arrows(story: Story) -> str:
    """Commits downwards and growth upwards."""
    height = (GAP + TRACK + LABEL) * len(story.drafters)
    if not story.arrows:
        return ""
    lines = {"growth": "", "commit": ""}
    for each in story.arrows:
        lines[each.kind] += _arrow(each, story.seconds)
    paths = "".join(f'<path class="{kind}" d="{line}"/>' for kind, line in lines.items())
    return (
        f'<svg class="arrows" aria-hidden="true" style="top:{TARGET_END}px;height:{height}px" '
        f'viewBox="0 0 {UNITS} {height}" preserveAspectRatio="none">{paths}</svg>'
    )


def _arrow(arrow: Arrow, seconds: float) -> str:
    left, arrived = (round(UNITS * at / seconds) for at in (arrow.left, arrow.arrived))
    drafter = (GAP + TRACK + LABEL) * arrow.drafter + GAP
    up, down = (0, drafter) if arrow.kind == "commit" else (drafter, 0)
    return f"M{left} {up}L{arrived} {down}"
