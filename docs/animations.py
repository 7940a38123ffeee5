"""Draw pipeline schedules that move, for READMEs: `python docs/animations.py` writes them to pictures/."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT), str(ROOT / "step06_4d")]

from pipeline.schedules import make_schedule

from shared.timeline import COLORS, Event, bubble, simulate

STAGES, MICRO_BATCHES = 4, 8
# Of each schedule, its name in train.py and its chunks.
SCHEDULES = {
    "afab": ("afab", 1),
    "1F1B": ("1f1b", 1),
    "interleaved 1F1B, 2 chunks": ("1f1b", 2),
    "zero bubble": ("zero-bubble", 1),
}
PICTURES = {
    "step04_schedules.svg": ["afab", "1F1B"],
    "step06_schedules.svg": list(SCHEDULES),
}
LEFT, UNIT, ROW, TITLE = 60, 20, 22, 26
# Seconds for a unit of time, which is a forward, and those at the end.
SPEED, REST = 0.35, 2


def draw(names: list[str]) -> str:
    """An SVG in which all schedules run at once, again and again. Boxes that are still to come are pale."""
    runs = {name: events_of(*SCHEDULES[name]) for name in names}
    end = max(event.end for events in runs.values() for event in events)
    width, each = LEFT + end * UNIT + 10, TITLE + STAGES * ROW + 8
    height, seconds = each * len(names) + 4, end * SPEED + REST
    moving = f'dur="{seconds:g}s" repeatCount="indefinite" keyTimes="0;{end * SPEED / seconds:.4f};1"'
    drawn = "".join(_run(name, events, each * i) for i, (name, events) in enumerate(runs.items()))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height}" width="{width:g}" height="{height}">'
        f"<title>{', '.join(names)}: {STAGES} stages, {MICRO_BATCHES} micro-batches</title>"
        "<style>text{font:12px sans-serif;fill:#1a1a1a}.m{text-anchor:middle}rect{stroke:#fff}</style>"
        f'<rect width="{width:g}" height="{height}" fill="#fff"/>'
        f'<clipPath id="past"><rect x="{LEFT}" width="{end * UNIT:g}" height="{height}">'
        f'<animate attributeName="width" values="0;{end * UNIT:g};{end * UNIT:g}" {moving}/></rect></clipPath>'
        f'<g id="all">{drawn}</g>'
        f'<rect x="{LEFT}" width="{end * UNIT:g}" height="{height}" fill="#fff" opacity="0.7"/>'
        f'<g clip-path="url(#past)"><use href="#all"/></g>{_titles(runs, each)}'
        f'<line y2="{height}" x1="{LEFT + end * UNIT:g}" x2="{LEFT + end * UNIT:g}" stroke="#1a1a1a">'
        f'<animateTransform attributeName="transform" type="translate" values="{-end * UNIT:g} 0;0 0;0 0" {moving}/>'
        "</line></svg>\n"
    )


def events_of(schedule: str, chunks: int) -> list[Event]:
    """In units of a forward of all of a stage's layers."""
    events = simulate([make_schedule(schedule, stage, STAGES, MICRO_BATCHES, chunks) for stage in range(STAGES)])
    return [event._replace(start=event.start / chunks, end=event.end / chunks) for event in events]


def _run(name: str, events: list[Event], top: int) -> str:
    end = max(event.end for event in events)
    boxes = [
        f'<rect x="{LEFT}" y="{top + TITLE + stage * ROW}" width="{end * UNIT:g}" height="{ROW - 2}" fill="#d5d5d5"/>'
        for stage in range(STAGES)
    ]
    for event in events:
        x, y, wide = LEFT + event.start * UNIT, top + TITLE + event.stage * ROW, (event.end - event.start) * UNIT
        pale = ' fill-opacity="0.6"' if event.chunk else ""
        boxes.append(f'<rect x="{x:g}" y="{y}" width="{wide:g}" height="{ROW - 2}" fill="{COLORS[event.kind]}"{pale}/>')
        size = "" if wide > 14 else ' style="font-size:9px"'
        boxes.append(f'<text class="m"{size} x="{x + wide / 2:g}" y="{y + 14}">{event.micro_batch}</text>')
    return "".join(boxes)


def _titles(runs: dict[str, list[Event]], each: int) -> str:
    return "".join(
        f'<text x="{LEFT}" y="{each * i + 18}">{name}: bubble {bubble(events):.1%}</text>'
        + "".join(
            f'<text x="4" y="{each * i + TITLE + stage * ROW + 14}">stage {stage}</text>' for stage in range(STAGES)
        )
        for i, (name, events) in enumerate(runs.items())
    )


def main() -> None:
    for file, names in PICTURES.items():
        (ROOT / "pictures" / file).write_text(draw(names))


if __name__ == "__main__":
    main()
