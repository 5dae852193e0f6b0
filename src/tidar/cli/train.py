"""`tidar train`: convert a checkpoint to TiDAR, or train one from scratch."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidar.errors import TidarError

if TYPE_CHECKING:
    from tidar.training.config import TrainConfig
    from tidar.training.objective import TrainingModel

SAMPLED = 256
"""Texts that --self-data samples side by side, and writes to the disk together."""

PROMPT_TOKENS = 32
"""Tokens of a held-out sequence that the interval measurement takes as its prompt."""

BaseArg = Annotated[
    str | None,
    typer.Option(help="Folder or hub id to start from (Llama, Mistral, Qwen2, Qwen3)."),
]
DataArg = Annotated[
    list[str] | None,
    typer.Option(help="File, folder, glob or dataset name, or `PATH=WEIGHT`; may be repeated."),
]
OutArg = Annotated[Path | None, typer.Option(help="Run folder; the checkpoint is OUT/model.")]
ConfigArg = Annotated[
    Path | None, typer.Option(help="YAML recipe; options on the command line win.")
]
SelfDataArg = Annotated[
    int, typer.Option(min=0, help="Texts to sample from the base itself as training data.")
]
ArchArg = Annotated[
    Path | None, typer.Option(help="From scratch: JSON or YAML with config.json's fields.")
]
TokenizerArg = Annotated[
    Path | None, typer.Option(help="From scratch: folder with tokenizer.json.")
]
ObjectiveArg = Annotated[
    str | None,
    typer.Option(help="`tidar`, `ar`, `eagle`, `block-diffusion` or `masked-diffusion`."),
]
DraftLensArg = Annotated[str | None, typer.Option(help="K, or several to mix: `4,8,16`.")]
AlphaArg = Annotated[float | None, typer.Option(help="Weight of the causal loss.")]
MaskingArg = Annotated[str | None, typer.Option(help="`full` or `random`.")]
AnchorsArg = Annotated[str | None, typer.Option(help="`grid`, or `random` offsets of it.")]
SoftLabelsArg = Annotated[
    float | None, typer.Option(help="Share of the loss taken against a teacher's distribution.")
]
TeacherArg = Annotated[
    str | None,
    typer.Option(help="`causal` (own head, teaches drafting) or `base` (frozen; teaches both)."),
]
DraftVocabArg = Annotated[
    int | None,
    typer.Option(
        "--draft-vocab-size",
        help="Eagle: tokens that the head can draft, the most frequent ones; 32,000 or all by default.",
    ),
]
TttArg = Annotated[
    int | None,
    typer.Option("--ttt-length", help="Eagle: draft steps unrolled in training; 7 by default."),
]
LabelShiftArg = Annotated[
    bool | None,
    typer.Option(
        "--label-shift/--no-label-shift",
        help="Masked diffusion: the row before predicts (Dream); by default as the base.",
    ),
]
SpanAttentionArg = Annotated[
    str | None,
    typer.Option(
        help="Block diffusion: clean rows are `causal`, or see their `full` span; by default as the base."
    ),
]
DocumentsArg = Annotated[
    str | None,
    typer.Option(help="Both diffusions: `apart`, or packed ones `joined` to one text."),
]
SeqLenArg = Annotated[int | None, typer.Option(help="Clean tokens per sequence.")]
EvalDataArg = Annotated[
    list[str] | None, typer.Option(help="Held-out text, `NAME=PATH`; may be repeated.")
]
EvalEveryArg = Annotated[
    int | None, typer.Option(help="Steps between held-out losses and real decoding.")
]
KeepModelsArg = Annotated[
    str | None,
    typer.Option(
        help="Steps after which the model alone is kept too, `OUT/model-STEP`: `500,1000`."
    ),
]
EvalPromptsArg = Annotated[int, typer.Option(help="Held-out prompts decoded at each evaluation.")]
ResumeArg = Annotated[
    bool | None, typer.Option("--resume", help="Carry on from the last whole checkpoint in OUT.")
]
AsJsonArg = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def train(
    context: typer.Context,
    base: BaseArg = None,
    data: DataArg = None,
    out: OutArg = None,
    config: ConfigArg = None,
    self_data: SelfDataArg = 0,
    arch: ArchArg = None,
    tokenizer: TokenizerArg = None,
    objective: ObjectiveArg = None,
    draft_lens: DraftLensArg = None,
    alpha: AlphaArg = None,
    masking: MaskingArg = None,
    anchors: AnchorsArg = None,
    soft_labels: SoftLabelsArg = None,
    teacher: TeacherArg = None,
    draft_vocab_size: DraftVocabArg = None,
    ttt_length: TttArg = None,
    label_shift: LabelShiftArg = None,
    span_attention: SpanAttentionArg = None,
    documents: DocumentsArg = None,
    seq_len: SeqLenArg = None,
    eval_data: EvalDataArg = None,
    eval_every: EvalEveryArg = None,
    eval_prompts: EvalPromptsArg = 8,
    keep_models: KeepModelsArg = None,
    resume: ResumeArg = None,
    as_json: AsJsonArg = False,
) -> None:
    """Convert a checkpoint to TiDAR with the joint loss, or train one from scratch.

    With `--objective` it trains for another method: plain causal text (`ar`), block diffusion (BD3-LM, SDAR), masked
    diffusion (LLaDA; Dream with `--label-shift`), or an EAGLE-3 draft head. At the end it says how that decodes.

    Any field of `transformers.TrainingArguments` is an option too: `--learning-rate 1e-5`, `--max-steps 1000`,
    `--per-device-train-batch-size 8`, `--gradient-checkpointing true`. Ctrl-C saves a checkpoint; the same
    command with `--resume` carries on. Every `--eval-every` steps the real decoder measures tokens per
    forward on held-out prompts (not for `ar`, where it is 1), beside the losses (`OUT/log.jsonl`, TensorBoard).

    Examples:

        tidar train --base Qwen/Qwen2.5-0.5B --data corpus.jsonl --out runs/q --draft-lens 4,8,16

        tidar train --base ./my-llama --self-data 10000 --out runs/mine --max-steps 2000

        tidar train --config recipe.yaml --out runs/again --resume
    """
    values: dict[str, Any] = {**_recipe(config), **_extra_options(context.args)}
    values.update(_own_options(context))
    if self_data:
        _sample_self_data(values, self_data)
    _tell(_run(values, eval_prompts), as_json)


def _tell(record: dict[str, Any], as_json: bool) -> None:
    """Prints what the run did."""
    if as_json:
        typer.echo(json.dumps(record))
        return
    speed, mfu = record["tokens_per_second"], record["mfu"]
    told = f"{record['steps']} steps, {record['clean_tokens']:,} clean tokens"
    told += f", {speed:,.0f} clean tokens/s" if speed else ""
    typer.echo(told + (f", MFU {mfu:.1%}" if mfu else ""))
    typer.echo(f"Checkpoint: {record['model']}")
    if record["methods"]:
        typer.echo(f"Decodes with --method {record['methods'][-1]}")


def _run(values: dict[str, Any], eval_prompts: int) -> dict[str, Any]:
    """Trains by these options; what the run did, as JSON values. Exit code 130 after an interrupt."""
    from dataclasses import asdict

    from tidar.cli.interval import methods_of
    from tidar.training.config import TrainConfig
    from tidar.training.start import read_as_base
    from tidar.training.trainer import TrainingInterrupted
    from tidar.training.trainer import train as run

    settings = read_as_base(TrainConfig.from_mapping(values))
    try:
        result = run(settings, on_interval=_measurement(settings, eval_prompts))
    except TrainingInterrupted as stopped:
        typer.echo(str(stopped), err=True)
        raise typer.Exit(130) from None
    except KeyboardInterrupt:  # before the first step, or a second Ctrl-C
        typer.echo(
            f"\nInterrupted; what {settings.out} holds is whole. Give the same command with --resume "
            "to carry on from its last checkpoint, or from the start where it has none.",
            err=True,
        )
        raise typer.Exit(130) from None
    others = [name for name in methods_of(settings) if settings.objective != "tidar"]
    return {**asdict(result), "model": str(result.model), "methods": others}


def _recipe(path: Path | None) -> dict[str, Any]:
    """The options of a YAML recipe; paths in it are relative to the working directory."""
    if path is None:
        return {}
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TidarError(f"The recipe {path} cannot be read as YAML: {error}.") from None
    if not isinstance(values, dict):
        raise TidarError(f"The recipe {path} must be a mapping of options to values.")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _own_options(context: typer.Context) -> dict[str, Any]:
    """The options of `train` that were given and that belong to the configuration of a run."""
    ours = ("config", "self_data", "eval_prompts", "as_json")
    given = {name: value for name, value in context.params.items() if name not in ours}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in given.items()
        if value is not None and value != ()  # 0 and no are values
    }


def _extra_options(arguments: list[str]) -> dict[str, str]:
    """Options that are not ours, `--name value` or `--name=value`, for TrainingArguments."""
    values: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            raise TidarError(f"{argument!r} is not an option; options begin with --.")
        name, equals, value = argument[2:].partition("=")
        if not equals:
            value = next(rest, "")
            if not value or value.startswith("--"):
                raise TidarError(f"--{name} needs a value, such as --{name} true.")
        values[name.replace("-", "_")] = value
    return values


def _sample_self_data(values: dict[str, Any], texts: int) -> None:
    """Writes `OUT/self-data.jsonl`, sampled from the base, and makes it training data.

    Texts that an interrupted run has sampled already are kept and the rest is added. All options are
    checked before, since sampling may take long.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise TidarError(
            f"--self-data samples in one process and this is one of {processes}. Sample first with "
            f"one: tidar train --self-data {texts} --max-steps 1 --out DIR ... Then give all of them "
            "--data DIR/self-data.jsonl instead of --self-data."
        )
    if not values.get("base") or not values.get("out"):
        raise TidarError(
            "--self-data samples text from a base model: give --base and --out as well."
        )
    from tidar.cli.self_sampling import BaseSampler
    from tidar.training.checkpoints import start_point
    from tidar.training.config import TrainConfig
    from tidar.training.self_data import claim_corpus, sample_corpus

    out = Path(values["out"]).expanduser()
    given = values.get("data") or []
    own = str(out / "self-data.jsonl")
    values["data"] = [*([given] if isinstance(given, str) else given), own]
    if not values.get("eval_data"):
        values["eval_data"] = [f"base_samples={out / 'self-data-held-out.jsonl'}"]
    config = TrainConfig.from_mapping(values)
    start_point(out, resume=config.resume)
    corpora = {"self-data": (texts, 0), "self-data-held-out": (max(texts // 20, 64), 1)}
    try:
        for name, (count, stream) in corpora.items():
            path = out / f"{name}.jsonl"
            with BaseSampler(config, stream, count, name) as sampler:
                claim_corpus(path, sampler.origin())
                sample_corpus(sampler, count, path, batch=SAMPLED, append=True)
    except KeyboardInterrupt:
        typer.echo(
            f"\nInterrupted while sampling; the texts in {out} are kept. Give the same command again "
            "and sampling carries on.",
            err=True,
        )
        raise typer.Exit(130) from None


def _measurement(
    config: "TrainConfig", prompts: int
) -> "Callable[[TrainingModel, int], dict[str, float]] | None":
    """What the trainer calls at intervals: tokens per forward of the real decoder on held-out prompts."""
    if not config.eval_every or not config.eval_data or prompts < 1:
        return None
    from tidar.cli.interval import IntervalDecoding, methods_of

    if not methods_of(config):
        return None
    return IntervalDecoding(config, prompts, PROMPT_TOKENS)


def train_tokenizer(
    data: Annotated[
        list[str], typer.Option(help="File, folder, glob or dataset name; repeatable.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for tokenizer.json.")],
    vocab_size: Annotated[int, typer.Option(min=260, help="Pieces, specials included.")] = 8192,
    text_field: Annotated[
        str, typer.Option(help="Field of jsonl rows that holds the text.")
    ] = "text",
) -> None:
    """Train a byte-level BPE tokenizer for a from-scratch run: digits apart, end-of-text and mask included.

    Example:

        tidar train-tokenizer --data corpus.jsonl --vocab-size 4096 --out runs/tokenizer
    """
    from tidar.training.sources import Source
    from tidar.training.tokenizer import train_tokenizer as run

    run([Source.parse(item) for item in data], out, vocab_size=vocab_size, text_field=text_field)
    typer.echo(f"Tokenizer: {out}")
