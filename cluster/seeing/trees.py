"""A draft tree as SVG: the root on the left, the accepted path straight along the top."""

from html import escape

from outrider.cluster.seeing.story import ROOT, Node

COLUMN, ROW = 138, 30
WIDTH, HEIGHT = 114, 22
MARGIN = 4
LETTERS = 10
"""That fit a box beside a score."""

_PICTURES = {code: 0x2400 + code for code in range(0x20)} | dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)
_VISIBLE = _PICTURES | {ord(" "): "·", ord("\n"): "⏎", ord("\t"): "⇥"}


def visible(text: str) -> str:
    """A token's text with what cannot be seen made visible."""
    return text.translate(_VISIBLE)


def printable(text: str) -> str:
    """Running text for a page: line breaks stay, other control characters become pictures."""
    kept = {code: picture for code, picture in _PICTURES.items() if chr(code) not in "\n\t"}
    return text.translate(kept)


def draw_tree(nodes: list[Node], *, root: str, own: str = "", late: bool = False) -> str:
    """The nodes, parents first, below a box with the text of ``root``.

    own: the target's token after the accepted path, drawn at its end. late: they were never verified.
    """
    drawing = _Drawing(nodes, own)
    boxes = [_box(0, drawing.row(ROOT), root, "root", "the last committed token")]
    lines = []
    for index, node in enumerate(nodes):
        kind = "hit" if node.accepted else "late" if late else "miss"
        lines.append(_line(drawing.at(node.parent), drawing.at(index), kind))
        boxes.append(_box(*drawing.at(index), node.text, kind, _told(node, kind), f"{node.score:.0%}"))
    if own:
        lines.append(_line(drawing.at(drawing.last), drawing.at(len(nodes)), "own"))
        boxes.append(_box(*drawing.at(len(nodes)), own, "own", f"{own!r}: the target's own token"))
    width = COLUMN * drawing.num_columns - (COLUMN - WIDTH) + 2 * MARGIN
    height = ROW * drawing.num_rows - (ROW - HEIGHT) + 2 * MARGIN
    what = "draft tree" if not late else "nodes that came too late"
    # Lines lie below boxes.
    return (
        f'<svg class="tree" role="img" aria-label="{what}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">{"".join(lines)}{"".join(boxes)}</svg>'
    )


class _Drawing:
    """Columns are depths; a node stands in the row of its first child, leaves have rows of their own."""

    def __init__(self, nodes: list[Node], own: str) -> None:
        self._depths = {ROOT: 0}
        children: dict[int, list[int]] = {}
        for index, node in enumerate(nodes):
            self._depths[index] = self._depths[node.parent] + 1
            children.setdefault(node.parent, []).append(index)
        self.last = max((index for index, node in enumerate(nodes) if node.accepted), default=ROOT)
        """The end of the accepted path."""
        if own:
            self._depths[len(nodes)] = self._depths[self.last] + 1
            children.setdefault(self.last, []).insert(0, len(nodes))
        self._rows: dict[int, int] = {}
        self.num_rows = 0
        waiting = [ROOT]
        while waiting:
            here = waiting.pop()
            below = sorted(children.get(here, ()), key=lambda each: not _leads(nodes, each))
            waiting += reversed(below)
            self._rows[here] = self.num_rows
            if not below:
                self.num_rows += 1
        self.num_columns = max(self._depths.values()) + 1

    def row(self, node: int) -> int:
        return self._rows[node]

    def at(self, node: int) -> tuple[int, int]:
        """Column and row."""
        return self._depths[node], self._rows[node]


def _leads(nodes: list[Node], index: int) -> bool:
    """Whether a node belongs to the path that became text; the target's own token has the last index."""
    return index == len(nodes) or nodes[index].accepted


def _told(node: Node, kind: str) -> str:
    """What a box tells whoever points at it."""
    outcome = {"hit": "accepted", "miss": "rejected", "late": "came too late"}[kind]
    chosen = f"; behind it the target takes {node.chosen!r}" if node.chosen else ""
    return f"{node.text!r}: {outcome}, score {node.score:.4f}{chosen}"


def _box(column: int, row: int, text: str, kind: str, told: str, score: str = "") -> str:
    left, top = MARGIN + COLUMN * column, MARGIN + ROW * row
    shown = {"hit": "✓ ", "own": "● "}.get(kind, "") + visible(text)
    shown = shown if len(shown) <= LETTERS else shown[: LETTERS - 1] + "…"
    corner = f'<text class="score" x="{left + WIDTH - 6}" y="{top + 15}">{score}</text>' if score else ""
    return (
        f'<g class="{kind}"><title>{escape(told)}</title>'
        f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>'
        f'<text x="{left + 7}" y="{top + 15}">{escape(shown)}</text>{corner}</g>'
    )


def _line(parent: tuple[int, int], child: tuple[int, int], kind: str) -> str:
    x1, y1 = MARGIN + COLUMN * parent[0] + WIDTH, MARGIN + ROW * parent[1] + HEIGHT // 2
    x2, y2 = MARGIN + COLUMN * child[0], MARGIN + ROW * child[1] + HEIGHT // 2
    middle = (x1 + x2) // 2
    return f'<path class="{kind}" d="M{x1} {y1}C{middle} {y1} {middle} {y2} {x2} {y2}"/>'
