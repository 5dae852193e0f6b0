"""`tidar bench`: decoding methods side by side on your prompts."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidar.cli.options import (
    ACCEPTANCE,
    DeviceArg,
    DtypeArg,
    ModelArg,
    Place,
    RandomWeightsArg,
    ShapeArg,
    refuse,
    whole_numbers,
)

if TYPE_CHECKING:
    import torch

    from tidar.bench.measure import Settings
    from tidar.bench.prompts import PromptFile
    from tidar.model import Transformer
    from tidar.tokens import Tokenizer


PromptsArg = Annotated[
    Path | None, typer.Option(help="JSON lines: prompt, and optionally id, continuation, answer.")
]
ContextArg = Annotated[
    str | None,
    typer.Option(help="--shape: prompt tokens, several by commas for a sweep. [default: 1024]"),
]
ReplayArg = Annotated[
    str | None,
    typer.Option(
        "--replay-acceptance",
        help=f"--shape: {ACCEPTANCE}",
    ),
]
ReplaysArg = Annotated[
    int | None,
    typer.Option(
        help="--replay-acceptance: texts of each prompt in a run, under seeds of their own. [default: until "
        "T/NFE should be within 2% of the expected one]"
    ),
]
DecodeOnlyArg = Annotated[
    bool,
    typer.Option(
        "--decode-only",
        help="--shape: prompts are run once for all methods and runs; only turns in which all sequences "
        "decode are timed.",
    ),
]
FigureArg = Annotated[
    Path | None,
    typer.Option(
        help="--shape: draw speed over AR against batch into this PNG (needs tidar[plot])."
    ),
]
EngineArg = Annotated[
    str, typer.Option(help="plain, paged, or auto: paged on CUDA and for --replay-acceptance.")
]
MethodsArg = Annotated[
    str,
    typer.Option(
        help="ar, tidar:K:SPANSET (tidar:16:1,2,4), tidar:two-forward, tidar:plan, speculative:PATH:K, "
        "eagle:PATH:K[:tree]; another model's text: block-diffusion:K:THRESHOLD[:full], "
        "masked-diffusion:SPAN:STEPS[:ORDER][:shift]. By commas."
    ),
]
MaxNewTokensArg = Annotated[int, typer.Option(help="Tokens per prompt at most.")]
TemperatureArg = Annotated[float, typer.Option(help="0 is greedy.")]
SeedArg = Annotated[int, typer.Option(help="Of the sampling noise.")]
RunsArg = Annotated[int, typer.Option(help="Timed runs of each prompt and method.")]
LimitArg = Annotated[int | None, typer.Option(help="Only the first prompts of the file.")]
BatchArg = Annotated[
    str,
    typer.Option(
        help="Sequences at a time; per-prompt speeds only at 1. --shape: several by commas."
    ),
]
IgnoreEosArg = Annotated[bool, typer.Option("--ignore-eos", help="Decode past end-of-text.")]
TeacherForcedArg = Annotated[
    bool, typer.Option("--teacher-forced", help="Measure on each prompt's real continuation.")
]
AsJsonArg = Annotated[bool, typer.Option("--json", help="Print the record as JSON.")]
OutArg = Annotated[Path | None, typer.Option(help="Write the record to this file.")]


def bench(
    model: ModelArg = None,
    prompts: PromptsArg = None,
    methods: MethodsArg = "ar,tidar:plan",
    max_new_tokens: MaxNewTokensArg = 256,
    temperature: TemperatureArg = 0.0,
    seed: SeedArg = 0,
    runs: RunsArg = 5,
    limit: LimitArg = None,
    batch: BatchArg = "1",
    ignore_eos: IgnoreEosArg = False,
    teacher_forced: TeacherForcedArg = False,
    shape: ShapeArg = None,
    context: ContextArg = None,
    replay_acceptance: ReplayArg = None,
    replays: ReplaysArg = None,
    decode_only: DecodeOnlyArg = False,
    figure: FigureArg = None,
    random_weights: RandomWeightsArg = False,
    engine: EngineArg = "auto",
    dtype: DtypeArg = "float32",
    device: DeviceArg = "cpu",
    as_json: AsJsonArg = False,
    out: OutArg = None,
) -> None:
    """Measure decoding methods side by side.

    Methods take turns on every prompt, after an untimed warm-up. Reported: tokens per forward (T/NFE), speed
    and its spread, how repetitive the text is, whether it is AR's own. With --shape: the speed of the system
    alone. TIDAR_COMMIT in the environment names the commit in the record, whatever git says.

    Examples:

        tidar bench --prompts prompts.jsonl --methods ar,tidar:16:1,2,4,8,tidar:plan

        tidar bench DIR --prompts p.jsonl --methods tidar:16:dense --teacher-forced --runs 1

        tidar bench DIR --prompts p.jsonl --methods ar,speculative:SMALL:4,block-diffusion:16:0.9

        tidar bench --shape qwen3-8b --replay-acceptance 5 --decode-only --batch 1,4 --device cuda --dtype auto
    """
    from tidar.bench.measure import Settings
    from tidar.cli.bench_shape import Asked, bench_shape
    from tidar.decode.spec import parse_methods

    batches, place = whole_numbers("--batch", batch), Place(device, dtype, engine)
    settings = Settings(
        methods=parse_methods(methods), max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        runs=runs, batch=batches[0], ignore_eos=ignore_eos, teacher_forced=teacher_forced,
    )  # fmt: skip
    shaped = {"context": context, "replay_acceptance": replay_acceptance, "replays": replays,
              "decode_only": decode_only, "figure": figure, "batch": len(batches) > 1 and batch}  # fmt: skip
    if shape is None:
        refuse("without --shape", **shaped)
        record = bench_prompts(model, prompts, limit, random_weights, settings, place)
    else:
        refuse("with --shape", MODEL=model, prompts=prompts, limit=limit, teacher_forced=teacher_forced)  # fmt: skip
        asked = Asked(shape, context, batches, replay_acceptance, replays, decode_only, bool(figure))  # fmt: skip
        record = bench_shape(asked, settings, place, out)
    report(record, as_json, out, figure)


def bench_prompts(
    model: str | None,
    prompts: Path | None,
    limit: int | None,
    random_weights: bool,
    settings: "Settings",
    place: Place,
) -> dict[str, Any]:
    """The record of a measurement over a prompt file."""
    import sys

    from tidar.bench.measure import pick_engine
    from tidar.bench.prompts import read_prompts
    from tidar.bench.record import make_record
    from tidar.errors import TidarError

    if prompts is None:
        raise TidarError("What shall be decoded? Give --prompts FILE, or --shape for speed alone.")
    network, tokenizer, subject = load_subject(model, place, random_weights)
    device = network.embed.weight.device
    settings = replace(
        settings,
        draft_lens=tuple(subject["model"]["trained_draft_lens"]),
        engine=pick_engine(
            place.engine, device, plain_only=any(spec.rival for spec in settings.methods)
        ),
    )
    file = read_prompts(prompts, tokenizer, network, limit)
    results = _measure(network, tokenizer, file, settings)
    subject["prompts"] = {
        "file": str(file.path), "sha256": file.sha256, "count": len(file.prompts),
        "distinct_4_of_real_text": _real_distinct(file, settings),
    }  # fmt: skip
    return make_record(
        command=["tidar", *sys.argv[1:]],
        device=device,
        subject=subject,
        settings=settings_json(settings, network.embed.weight.dtype),
        results={"methods": results},
    )


def report(
    record: dict[str, Any], as_json: bool, out: Path | None, figure: Path | None = None
) -> None:
    """Shows the record, and writes and draws it where asked to; exit code 130 for one that was cut short."""
    import json

    from rich.console import Console

    from tidar.bench.record import write_record
    from tidar.cli.bench_tables import show_record

    if out is not None:
        write_record(out, record)
    if as_json:
        typer.echo(json.dumps(record, indent=1))
    elif "cells" in record:
        from tidar.cli.bench_shape import show_sweep

        show_sweep(record, Console())
    else:
        show_record(record, Console())
    if figure is not None:
        from tidar.bench.sweep_plot import save_sweep

        save_sweep(record, figure)
    for written in (out, figure):
        if written is not None:
            typer.echo(f"Wrote {written}", err=True)
    if record.get("interrupted"):
        typer.echo("interrupted: the cells that were finished are kept", err=True)
        raise typer.Exit(130)


def load_subject(
    source: str | None, place: Place, random_weights: bool
) -> "tuple[Transformer, Tokenizer | None, dict[str, Any]]":
    """The model, its tokenizer if it has one, and facts about them for the record."""
    from tidar.api import bundled_folder
    from tidar.bench.shapes import shape_config
    from tidar.model import num_parameters
    from tidar.tokens import Tokenizer
    from tidar.weights import init_model, load_checkpoint

    told = source or "the bundled checkpoint"
    source, (device, dtype) = source or str(bundled_folder()), place.settle()
    if random_weights:
        folder, meta = Path(source), None
        network = init_model(shape_config(source), seed=0, device=device, dtype=dtype).eval()
    else:
        checkpoint = load_checkpoint(source, device=device, dtype=dtype)
        network, folder, meta = checkpoint.model, checkpoint.folder, checkpoint.meta
    facts = {
        "source": told,
        "parameters": num_parameters(network.config),
        "random_weights": random_weights,
        "trained_draft_lens": list(meta.draft_lens) if meta else [],
    }
    tokenizer = Tokenizer.load(folder) if Tokenizer.is_in(folder) else None
    return network, tokenizer, {"model": facts}


def _measure(
    network: "Transformer",
    tokenizer: "Tokenizer | None",
    file: "PromptFile",
    settings: "Settings",
) -> dict[str, Any]:
    """All passes under a progress bar on stderr, and their figures."""
    from rich.console import Console
    from rich.progress import Progress

    from tidar.bench.measure import count_passes, run_bench
    from tidar.bench.memory import MemoryMeter
    from tidar.bench.summary import summarise
    from tidar.decode.rivals import Target

    eos_ids = tokenizer.eos_ids if tokenizer else frozenset()
    meter = MemoryMeter(network)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=count_passes(settings, len(file.prompts)))
        passes = run_bench(
            network,
            file.prompts,
            settings,
            eos_ids,
            lambda label: progress.update(task, advance=1, description=label),
            meter=meter,
            target=Target(network, tokenizer),
        )
    return summarise(network, passes, file.prompts, settings, tokenizer, meter)


def _real_distinct(file: "PromptFile", settings: "Settings") -> float | None:
    from tidar.bench.repetition import mean_distinct

    return mean_distinct([p.real[: settings.max_new_tokens] for p in file.prompts if p.real])


def settings_json(settings: "Settings", dtype: "torch.dtype") -> dict[str, Any]:
    """How it was measured, for the record."""
    from tidar.bench.measure import WARM_UP_TOKENS

    which = "every prompt" if settings.engine == "paged" else "the first prompts"
    return {
        "methods": [spec.name for spec in settings.methods],
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "seed": settings.seed,
        "runs": settings.runs,
        "batch": settings.batch,
        "ignore_eos": settings.ignore_eos,
        "teacher_forced": settings.teacher_forced,
        "engine": settings.engine,
        "dtype": str(dtype).removeprefix("torch."),
        "warm_up": f"one untimed pass per method over {which}, {WARM_UP_TOKENS} tokens",
        "order": "methods take turns within each run of each prompt",
    }
