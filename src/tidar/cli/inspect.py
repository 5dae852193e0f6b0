"""`tidar inspect`: draws the masks, and prints what is in a checkpoint."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tidar.picture import Picture


class What(StrEnum):
    """What there is to look at."""

    training = "training"
    prefill = "prefill"
    decode = "decode"
    model = "model"


WhatArg = Annotated[What, typer.Argument(help="Which mask to draw, or model.")]
FolderArg = Annotated[
    str | None, typer.Argument(metavar="[DIR]", help="model: the checkpoint to describe.")
]
DraftLenArg = Annotated[int, typer.Option("--draft-len", "-K", help="Rows per span, K.")]
LengthArg = Annotated[int, typer.Option(help="training: tokens of the sequence.")]
OffsetArg = Annotated[int, typer.Option(help="training: start of the grid of spans.")]
DocumentsArg = Annotated[
    str | None,
    typer.Option(help="training: lengths of packed documents, such as 5,7, not --length."),
]
PromptLenArg = Annotated[int, typer.Option(help="prefill: tokens of the prompt.")]
PrefixArg = Annotated[int, typer.Option(help="decode: committed tokens.")]
SpanSetArg = Annotated[
    str, typer.Option(help="decode: dense, single, none, or accept counts such as 1,2,4.")
]
DraftsArg = Annotated[
    int | None, typer.Option(help="decode: draft rows in the step, 1 to K (default K).")
]
PngArg = Annotated[
    Path | None, typer.Option(help="Also draw it into this file (needs tidar[plot]).")
]
AsJsonArg = Annotated[bool, typer.Option("--json", help="Print matrices or facts as JSON.")]


def inspect(
    what: WhatArg = What.decode,
    folder: FolderArg = None,
    draft_len: DraftLenArg = 4,
    length: LengthArg = 12,
    offset: OffsetArg = 0,
    documents: DocumentsArg = None,
    prompt_len: PromptLenArg = 8,
    prefix: PrefixArg = 6,
    span_set: SpanSetArg = "dense",
    drafts: DraftsArg = None,
    png: PngArg = None,
    as_json: AsJsonArg = False,
) -> None:
    """Draw the attention masks, or describe a checkpoint.

    The masks are computed from the one visibility rule that training and decoding use, so the
    picture is the code.

    Examples:

        tidar inspect decode --draft-len 4 --span-set 1,2,4

        tidar inspect training --documents 5,7 --draft-len 4 --offset 1 --png training.png

        tidar inspect prefill --prompt-len 8 --draft-len 4

        tidar inspect model path/to/checkpoint --json
    """
    import json

    from tidar.errors import TidarError

    if what is What.model:
        if folder is None:
            raise TidarError("Which checkpoint? For example: tidar inspect model path/to/folder")
        facts = describe_model(folder)
        typer.echo(json.dumps(facts, indent=2) if as_json else facts_text(facts))
        return
    if folder is not None:
        raise TidarError(f"inspect {what} draws a mask and takes no folder ({folder!r} was given).")
    picture = make_picture(
        what,
        draft_len=draft_len,
        documents=_lengths(documents) if documents else [length],
        offset=offset,
        prompt_len=prompt_len,
        prefix=prefix,
        span_set=span_set,
        drafts=drafts,
    )
    from tidar.picture import draw_text, save_png

    if png is not None:
        save_png(picture, png)
    typer.echo(json.dumps(picture.to_json()) if as_json else draw_text(picture))
    if png is not None:
        typer.echo(f"Wrote {png}", err=True)


def register(app: typer.Typer, wrap: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Adds the command to the app, `wrap` around it."""
    app.command("inspect")(wrap(inspect))


def _lengths(text: str) -> list[int]:
    from tidar.errors import TidarError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise TidarError(
            f"documents {text!r} are not understood: give lengths such as 5,7."
        ) from None


def make_picture(
    what: What,
    *,
    draft_len: int,
    documents: list[int],
    offset: int,
    prompt_len: int,
    prefix: int,
    span_set: str,
    drafts: int | None,
) -> "Picture":
    """The picture that the options ask for."""
    from tidar.layout import Schedule
    from tidar.picture import decode_picture, prefill_picture, training_picture

    if what is What.training:
        return training_picture(documents, draft_len, offset)
    if what is What.prefill:
        return prefill_picture(prompt_len, draft_len)
    return decode_picture(prefix, Schedule.parse(draft_len, span_set), drafts)


def describe_model(source: str) -> dict[str, Any]:
    """Facts about a checkpoint: config, parameters, `"tidar"` entry, bytes on disk."""
    import dataclasses
    from collections import Counter

    from tidar.decode.rivals import default_method
    from tidar.model import flops_per_row, num_parameters
    from tidar.tokens import Tokenizer
    from tidar.weights import load_checkpoint

    checkpoint = load_checkpoint(source, dtype="auto")
    method = default_method(checkpoint.config, checkpoint.meta)
    config, files = checkpoint.config, sorted(checkpoint.folder.iterdir())
    sizes = {file.name: file.stat().st_size for file in files if file.is_file()}
    weights = list(checkpoint.model.parameters())
    dtypes = Counter(str(weight.dtype).removeprefix("torch.") for weight in weights)
    tokenizer = Tokenizer.load(checkpoint.folder) if Tokenizer.is_in(checkpoint.folder) else None
    return {
        "source": source,
        "folder": str(checkpoint.folder),
        "config": dataclasses.asdict(config),
        "tidar": checkpoint.meta.to_json() if checkpoint.meta else None,
        "method": None if method in ("ar", "tidar") else method,
        "parameters": num_parameters(config),
        "dtypes": dict(dtypes),
        "weight_bytes": sum(weight.numel() * weight.element_size() for weight in weights),
        "cache_bytes_per_token": 2
        * config.num_layers
        * config.num_kv_heads
        * config.head_dim
        * checkpoint.model.embed.weight.element_size(),
        "flops_per_row": flops_per_row(config, 0.0),
        "tokenizer": None
        if tokenizer is None
        else {"vocabulary": tokenizer.vocab_size, "end_of_text": sorted(tokenizer.eos_ids)},
        "files": sizes,
    }


def _amount(number: float, unit: str = "") -> str:
    """12_345_678 -> '12.3 M'."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g} {prefix}{unit}"
    return f"{number:g} {unit}".strip()


def facts_text(facts: dict[str, Any]) -> str:
    """`describe_model` for a person."""
    config, tokenizer = facts["config"], facts["tokenizer"]
    rope = config["rope"]
    tied = "tied embeddings" if config["tie_embeddings"] else "separate output matrix"
    lines = [
        ("checkpoint", facts["folder"]),
        ("family", f"{config['model_type']}, {tied}"),
        ("parameters", f"{facts['parameters']:,} ({_amount(facts['parameters'])})"),
        ("weights", f"{_amount(facts['weight_bytes'], 'B')} in {', '.join(facts['dtypes'])}"),
        ("layers", f"{config['num_layers']} of hidden size {config['hidden_size']}, "
                   f"feed-forward {config['intermediate_size']}"),
        ("attention", f"{config['num_heads']} heads, {config['num_kv_heads']} for keys and values, "
                      f"of size {config['head_dim']}"),
        ("positions", f"{config['max_positions']}, RoPE {rope['kind']}, base {rope['theta']:g}"),
        ("vocabulary", f"{config['vocab_size']} rows"),
        ("reads", _how_it_reads(facts)),
        ("cache", f"{_amount(facts['cache_bytes_per_token'], 'B')} per token" + (
            ", of one pass alone" if config["attention"] == "bidirectional" else "")),
        ("compute", f"{_amount(facts['flops_per_row'], 'FLOP')} per row, attention not counted"),
        ("tokenizer", "none in the folder" if tokenizer is None else
         f"{tokenizer['vocabulary']} tokens, end of text {tokenizer['end_of_text']}"),
        ("tidar", _training(facts)),
        ("files", ", ".join(f"{n} {_amount(size, 'B')}" for n, size in facts["files"].items())),
    ]  # fmt: skip
    return "\n".join(f"{name:<11} {value}" for name, value in lines)


def _how_it_reads(facts: dict[str, Any]) -> str:
    """What a row sees, what it predicts, and by which method such a checkpoint writes."""
    config = facts["config"]
    if config["attention"] == "causal" and facts["method"] is not None:
        return (
            f"block diffusion, its clean rows {config['span_attention']}: no causal loss has trained it, so "
            f"what reads it causally (ar, tidar, a draft model) may write poorly; --method {facts['method']}"
        )
    if config["attention"] == "causal":
        return "causally: a row sees those before it and predicts the next position"
    predicts = "the next position (label shift)" if config["label_shift"] else "its own position"
    return (
        f"masked diffusion: every row sees every other and predicts {predicts}; mask token "
        f"{config['mask_token_id']}; --method {facts['method']}"
    )


def _training(facts: dict[str, Any]) -> str:
    """The "tidar" entry in words."""
    meta = facts["tidar"]
    if meta is not None and meta["draft_lens"]:
        lens = ", ".join(map(str, meta["draft_lens"]))
        return (
            f"trained with K = {lens}, mask token {meta['mask_token_id']}, alpha {meta['alpha']:g}, "
            f"masking {meta['masking']}"
            + (
                f"; for {meta['objective']}, clean rows {meta['span_attention']}"
                if "objective" in meta
                else ""
            )
        )
    if meta is not None:
        return f"trained for masked diffusion, mask token {meta['mask_token_id']}"
    if facts["config"]["attention"] == "bidirectional":
        return "no entry: a masked diffusion checkpoint as published"
    return "no entry: an ordinary autoregressive checkpoint. `tidar train` converts it."
