"""`tidar generate`: write text from a prompt."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tidar.errors import TidarError

if TYPE_CHECKING:
    from tidar.api import LanguageModel, StreamEvent

PromptArg = Annotated[str | None, typer.Argument(help="The prompt; `-` reads standard input.")]
FileArg = Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")]
ModelArg = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Folder or hub id; the bundled model if left out."),
]
MethodArg = Annotated[
    str | None,
    typer.Option(
        help="`tidar` or `ar`, by default what the model can do. In the plain engine also `speculative:PATH:K` (the "
        "model at PATH drafts K tokens) and `eagle:PATH:K[:tree]` (an EAGLE-3 head does), both exact; and, writing "
        "another model's text, `block-diffusion:K:THRESHOLD` and `masked-diffusion:SPAN:STEPS[:ORDER][:shift]`, the "
        "only one of LLaDA and Dream."
    ),
]
DraftLenArg = Annotated[
    int | None, typer.Option("--draft-len", "-K", help="K; by default the longest trained.")
]
SpanSetArg = Annotated[
    str,
    typer.Option(
        help="`plan` (measured here), `dense`, `single`, `two-forward`, or accept counts: `1,2,4`."
    ),
]
BetaArg = Annotated[
    float, typer.Option(help="Trust in the causal logits; only 1 is exact, below 1 is lossy.")
]
MaxNewTokensArg = Annotated[int, typer.Option("--max-new-tokens", "-n", help="At most so many.")]
TemperatureArg = Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")]
TopPArg = Annotated[float, typer.Option(help="1 keeps all.")]
TopKArg = Annotated[int, typer.Option(help="0 keeps all.")]
SeedArg = Annotated[int, typer.Option(help="Of the sampling noise.")]
SamplingArg = Annotated[
    str, typer.Option(help="`shared-noise` (text equals plain AR's) or `rejection`.")
]
StopArg = Annotated[list[str] | None, typer.Option(help="Stop string; may be given several times.")]
IgnoreEosArg = Annotated[bool, typer.Option("--ignore-eos", help="Go on after end-of-text.")]
DeviceArg = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.")]
DtypeArg = Annotated[str, typer.Option(help="auto, float32, bfloat16.")]
EngineArg = Annotated[str, typer.Option(help="plain, paged, or auto: paged on CUDA.")]
ShowStepsArg = Annotated[
    bool, typer.Option("--show-steps", help="Colour what each forward pass committed.")
]
AsJsonArg = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def generate(
    prompt: PromptArg = None,
    file: FileArg = None,
    model: ModelArg = None,
    method: MethodArg = None,
    draft_len: DraftLenArg = None,
    span_set: SpanSetArg = "plan",
    beta: BetaArg = 1.0,
    max_new_tokens: MaxNewTokensArg = 128,
    temperature: TemperatureArg = 0.0,
    top_p: TopPArg = 1.0,
    top_k: TopKArg = 0,
    seed: SeedArg = 0,
    sampling: SamplingArg = "shared-noise",
    stop: StopArg = None,
    ignore_eos: IgnoreEosArg = False,
    device: DeviceArg = "auto",
    dtype: DtypeArg = "auto",
    engine: EngineArg = "auto",
    show_steps: ShowStepsArg = False,
    as_json: AsJsonArg = False,
) -> None:
    """Write text from a prompt; the text is streamed as it is committed.

    Examples:

        tidar generate "def fib(n):" --show-steps

        tidar generate --file prompt.txt --model ./my-model -n 256 -t 0.8 --seed 7

        echo "Compute 78417 + 5691." | tidar generate - --json

        tidar generate "def fib(n):" --model ./my-model --method speculative:path/to/small:4

        tidar generate "def fib(n):" --model GSAI-ML/LLaDA-8B-Base --method masked-diffusion:32:16
    """
    import tidar

    text = _read_prompt(prompt, file)
    loaded = tidar.load(model, device=device, dtype=dtype)
    events = loaded.stream(
        text,
        method=method,
        draft_len=draft_len,
        span_set=span_set,
        beta=beta,
        engine=engine,  # type: ignore[arg-type]
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        sampling=sampling,  # type: ignore[arg-type]
        stop=stop or (),
        ignore_eos=ignore_eos,
    )
    warning = _warning(loaded, method, beta)
    _print_json(events, warning) if as_json else _print_text(events, warning, show_steps=show_steps)


def _warning(model: "LanguageModel", method: str | None, beta: float) -> str | None:
    """What is said of a text that is not AR's; None of one that is."""
    from tidar.decode.rivals import is_exact

    method = method or model.default_method
    if model.network.config.attention == "bidirectional":
        return f"{method}: tokens chosen side by side; this checkpoint has no other way to write"
    if not is_exact(method):
        return f"{method}: another model's text, not what plain decoding of these weights writes"
    return f"beta {beta}: lossy, not the model's own distribution" if beta != 1.0 else None


def _print_json(events: "Iterator[StreamEvent]", warning: str | None) -> None:
    """One JSON object: the text, its tokens and how they came; lossy where there is something to warn of."""
    from tidar.cli.show import summary

    done = list(events)
    ids = [token for event in done for token in event.ids]
    record = {"text": "".join(event.text for event in done), "ids": ids, **summary(done)}
    typer.echo(json.dumps({**record, "lossy": warning is not None}, ensure_ascii=False))


def _print_text(events: "Iterator[StreamEvent]", warning: str | None, *, show_steps: bool) -> None:
    """The text as it is committed, behind a warning; with `show_steps` coloured by forward pass, and counted."""
    from rich.console import Console

    from tidar.cli.show import stream_text, summary

    if warning is not None:
        typer.secho(warning, fg="yellow", err=True)
    facts = summary(stream_text(Console(), events, show_steps=show_steps))
    if show_steps:
        ratio, speed = facts["tokens_per_forward"], facts["decode_tokens_per_second"]
        told = f"{facts['tokens']} tokens, {facts['forwards']} forward passes after the prefill"
        if isinstance(ratio, float) and isinstance(speed, float):
            told += f", {ratio:.2f} tokens per forward, {speed:.0f} tokens/s"
        if facts["draft_forwards"]:
            told += f"; {facts['draft_forwards']} passes of the draft model"
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
