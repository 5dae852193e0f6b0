"""How decoded text looks in a terminal: each forward pass in a colour of its own."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from tidar.api import StreamEvent

STEP_COLOURS = ("bright_cyan", "bright_yellow", "bright_green", "bright_magenta")
PREFILL_COLOUR = "bold white"


def stream_text(
    console: Console, events: "Iterable[StreamEvent]", *, show_steps: bool
) -> "list[StreamEvent]":
    """Prints text as it is committed and returns the events; with `show_steps` in colours by forward pass."""
    seen = []
    for event in events:
        seen.append(event)
        if not event.text:
            continue
        style = ""
        if show_steps:
            style = PREFILL_COLOUR if event.prefill else STEP_COLOURS[len(seen) % len(STEP_COLOURS)]
        console.print(Text(event.text, style=style), end="", soft_wrap=True, highlight=False)
    console.print()
    return seen


def summary(events: "list[StreamEvent]") -> dict[str, object]:
    """Counts of one text: tokens, decode forwards, tokens per forward, seconds, accepts."""
    from tidar.decode.request import tokens_per_forward

    steps = [event for event in events if not event.prefill]
    decoded = sum(len(event.ids) for event in steps)
    seconds = sum(event.seconds for event in steps)
    return {
        "tokens": sum(len(event.ids) for event in events),
        "forwards": len(steps),
        "tokens_per_forward": tokens_per_forward(decoded, len(steps)),
        "decode_tokens_per_second": decoded / seconds if seconds else None,
        "prefill_seconds": sum(event.seconds for event in events if event.prefill),
        "decode_seconds": seconds,
        "draft_forwards": sum(event.draft_forwards for event in steps),
        "accepts": [event.accepted for event in steps],
        "finish": events[-1].finish if events else None,
    }
