"""`tidar demo`: the bundled model at work, step by step, then beside plain autoregressive decoding."""

import statistics
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tidar.api import LanguageModel

PROMPTS = (
    (
        "Python",
        "# Time:  O(n)\n# Space: O(n)\n\n"
        "class Solution(object):\n"
        "    def twoSum(self, nums, target):\n"
        '        """\n'
        "        :type nums: List[int]\n"
        "        :type target: int\n"
        "        :rtype: List[int]\n"
        '        """',
    ),
    (
        "Python",
        "# Time:  O(n)\n# Space: O(1)\n\n"
        "# Definition for singly-linked list.\n"
        "class ListNode(object):\n"
        "    def __init__(self, x):",
    ),
    ("arithmetic", "Compute 78417 + 5691.\n"),
    ("arithmetic", "Multiply 613 by 4.\n"),
)
ROWS = (
    ("AR", "ar", None, "plan"),
    ("TiDAR, planned", "tidar", None, "plan"),
    ("TiDAR, K=16 dense", "tidar", 16, "dense"),
)


def demo(
    runs: Annotated[int, typer.Option(min=1, help="Timed runs per method; medians are shown.")] = 2,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=2)] = 320,
) -> None:
    """Show the bundled model writing several tokens per forward pass, exactly as plain AR would.

    Colours change with each forward pass. The table counts decode forwards; the prefill is in none of its
    figures. Greedy decoding, float32, this machine.
    """
    from rich.console import Console

    import tidar
    from tidar.cli.show import stream_text

    console = Console()
    model = tidar.load(device="cpu", dtype="float32")
    for kind, prompt in PROMPTS:
        console.rule(f"[bold]{kind}[/]: one colour per forward pass (K = 16, all spans)")
        console.print(prompt, end="", style="dim", markup=False, highlight=False)
        events = model.stream(prompt, draft_len=16, span_set="dense", max_new_tokens=max_new_tokens)
        stream_text(console, events, show_steps=True)
    console.print(_table(model, runs, max_new_tokens))


def _table(model: "LanguageModel", runs: int, max_new_tokens: int) -> object:
    """AR and TiDAR side by side for each kind of text; methods take turns, so all meet the same noise."""
    from rich.table import Table

    from tidar.cli.bench_tables import number
    from tidar.decode.request import tokens_per_forward

    table = Table(title="greedy, float32, CPU; medians of interleaved runs; prefill excluded")
    for column in ("text", "method", "tokens", "forwards", "T/NFE", "tokens/s", "same tokens"):
        table.add_column(column, justify="left" if column in ("text", "method") else "right")
    for kind in dict(PROMPTS):
        prompts = [prompt for each, prompt in PROMPTS if each == kind]
        results: dict[str, list[tuple[int, int, int, float, list[list[int]]]]] = {}
        for run in range(runs + 1):  # the first run warms up
            for label, method, draft_len, span_set in ROWS:
                measured = _measure(model, prompts, method, draft_len, span_set, max_new_tokens)
                if run:
                    results.setdefault(label, []).append(measured)
        expected = results["AR"][0][4]
        for label, measurements in results.items():
            tokens, decoded, forwards, *_ = measurements[0]
            speed = statistics.median(each[1] / each[3] for each in measurements)
            same = "yes" if all(each[4] == expected for each in measurements) else "NO"
            table.add_row(
                kind,
                label,
                str(tokens),
                str(forwards),
                number(tokens_per_forward(decoded, forwards)),
                f"{speed:.0f}",
                same,
            )
        table.add_section()
    return table


def _measure(
    model: "LanguageModel",
    prompts: list[str],
    method: str,
    draft_len: int | None,
    span_set: str,
    max_new_tokens: int,
) -> tuple[int, int, int, float, list[list[int]]]:
    """Tokens, tokens of decode steps, decode forwards, decode seconds and the ids of each text."""
    tokens = decoded = forwards = 0
    seconds = 0.0
    texts = []
    for prompt in prompts:
        ids: list[int] = []
        for event in model.stream(
            prompt,
            method=method,
            draft_len=draft_len,
            span_set=span_set,
            max_new_tokens=max_new_tokens,
        ):
            ids += event.ids
            if not event.prefill:
                decoded += len(event.ids)
                forwards += 1
                seconds += event.seconds
        tokens += len(ids)
        texts.append(ids)
    return tokens, decoded, forwards, seconds, texts
