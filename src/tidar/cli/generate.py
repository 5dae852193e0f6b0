"""`tidar generate`: write text from a prompt."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tidar.errors import TidarError


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; `-` reads standard input.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Folder or hub id; the bundled model if left out."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="`tidar` or `ar`; by default what the model can do.")
    ] = None,
    draft_len: Annotated[
        int | None, typer.Option("--draft-len", "-K", help="K; by default the longest trained.")
    ] = None,
    span_set: Annotated[
        str,
        typer.Option(help="`plan` (measured here), `dense`, `single`, or accept counts: `1,2,4`."),
    ] = "plan",
    beta: Annotated[
        float, typer.Option(help="Trust in the causal logits; only 1 is exact, below 1 is lossy.")
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="1 keeps all.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all.")] = 0,
    seed: Annotated[int, typer.Option()] = 0,
    sampling: Annotated[
        str, typer.Option(help="`shared-noise` (text equals plain AR's) or `rejection`.")
    ] = "shared-noise",
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop string; may be given several times.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after end-of-text.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16.")] = "auto",
    show_steps: Annotated[
        bool, typer.Option("--show-steps", help="Colour what each forward pass committed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Write text from a prompt; the text is streamed as it is committed.

    Examples:

        tidar generate "def fib(n):" --show-steps

        tidar generate --file prompt.txt --model ./my-model -n 256 -t 0.8 --seed 7

        echo "Compute 78417 + 5691." | tidar generate - --json
    """
    from rich.console import Console

    import tidar
    from tidar.cli.show import stream_text, summary

    text = _read_prompt(prompt, file)
    loaded = tidar.load(model, device=device, dtype=dtype)
    options: dict[str, Any] = {
        "method": method,
        "draft_len": draft_len,
        "span_set": span_set,
        "beta": beta,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "sampling": sampling,
        "stop": stop or (),
        "ignore_eos": ignore_eos,
    }
    events = loaded.stream(text, **options)
    if as_json:
        done = list(events)
        ids = [token for event in done for token in event.ids]
        record = {"text": "".join(event.text for event in done), "ids": ids, **summary(done)}
        typer.echo(json.dumps({**record, "lossy": beta != 1.0}, ensure_ascii=False))
        return
    if beta != 1.0:
        typer.secho(f"beta {beta}: lossy, not the model's own distribution", fg="yellow", err=True)
    facts = summary(stream_text(Console(), events, show_steps=show_steps))
    if show_steps:
        ratio, speed = facts["tokens_per_forward"], facts["decode_tokens_per_second"]
        told = f"{facts['tokens']} tokens, {facts['forwards']} forward passes after the prefill"
        if isinstance(ratio, float) and isinstance(speed, float):
            told += f", {ratio:.2f} tokens per forward, {speed:.0f} tokens/s"
        typer.secho(told, dim=True, err=True)


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the one place that was named. Raises TidarError for none, two, or an unreadable file."""
    if (prompt is None) == (file is None):
        raise TidarError(
            "Give the prompt once: as an argument, with --file, or `-` for standard input."
        )
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TidarError(f"The prompt file {file} cannot be read as text: {error}.") from None
    return sys.stdin.read() if prompt == "-" else str(prompt)
