"""`tidar bench`: decoding methods side by side on your prompts."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tidar.bench.measure import Settings
    from tidar.bench.prompts import PromptFile
    from tidar.model import Transformer
    from tidar.tokens import Tokenizer


ModelArg = Annotated[
    str | None, typer.Argument(help="Folder or hub id; default: the bundled checkpoint.")
]
PromptsArg = Annotated[
    Path, typer.Option(help="JSON lines: prompt, and optionally id, continuation, answer.")
]
MethodsArg = Annotated[
    str, typer.Option(help="ar, tidar:K:SPANSET (tidar:16:1,2,4), tidar:plan; by commas.")
]
MaxNewTokensArg = Annotated[int, typer.Option(help="Tokens per prompt at most.")]
TemperatureArg = Annotated[float, typer.Option(help="0 is greedy.")]
SeedArg = Annotated[int, typer.Option(help="Of the sampling noise.")]
RunsArg = Annotated[int, typer.Option(help="Timed runs of each prompt and method.")]
LimitArg = Annotated[int | None, typer.Option(help="Only the first prompts of the file.")]
BatchArg = Annotated[int, typer.Option(help="Sequences at a time; per-prompt speeds only at 1.")]
IgnoreEosArg = Annotated[bool, typer.Option("--ignore-eos", help="Decode past end-of-text.")]
TeacherForcedArg = Annotated[
    bool, typer.Option("--teacher-forced", help="Measure on each prompt's real continuation.")
]
RandomWeightsArg = Annotated[
    bool,
    typer.Option("--random-weights", help="Use the folder's config only; for step times."),
]
DtypeArg = Annotated[str, typer.Option(help="float32, bfloat16, float16.")]
DeviceArg = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
AsJsonArg = Annotated[bool, typer.Option("--json", help="Print the record as JSON.")]
OutArg = Annotated[Path | None, typer.Option(help="Write the record to this file.")]


def bench(
    model: ModelArg = None,
    prompts: PromptsArg = ...,  # type: ignore[assignment]
    methods: MethodsArg = "ar,tidar:plan",
    max_new_tokens: MaxNewTokensArg = 256,
    temperature: TemperatureArg = 0.0,
    seed: SeedArg = 0,
    runs: RunsArg = 5,
    limit: LimitArg = None,
    batch: BatchArg = 1,
    ignore_eos: IgnoreEosArg = False,
    teacher_forced: TeacherForcedArg = False,
    random_weights: RandomWeightsArg = False,
    dtype: DtypeArg = "float32",
    device: DeviceArg = "cpu",
    as_json: AsJsonArg = False,
    out: OutArg = None,
) -> None:
    """Measure decoding methods side by side.

    Methods take turns on every prompt, after an untimed warm-up. Reported: tokens per forward
    (T/NFE), speed and its spread, how repetitive the text is, and whether it is AR's own text.

    Examples:

        tidar bench --prompts prompts.jsonl --methods ar,tidar:16:1,2,4,8,tidar:plan

        tidar bench DIR --prompts p.jsonl --methods tidar:16:dense --teacher-forced --runs 1

        tidar bench DIR --prompts p.jsonl --device cuda --dtype bfloat16 --batch 100 --runs 1
    """
    from tidar.bench.measure import Settings
    from tidar.decode.spec import parse_methods

    settings = Settings(
        methods=parse_methods(methods),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        runs=runs,
        batch=batch,
        ignore_eos=ignore_eos,
        teacher_forced=teacher_forced,
    )
    network, tokenizer, subject = load_subject(model, device, dtype, random_weights)
    settings = replace(settings, draft_lens=tuple(subject["model"]["trained_draft_lens"]))
    record = measure(network, tokenizer, prompts, limit, settings, subject, dtype)
    report(record, as_json, out)


def measure(
    network: "Transformer",
    tokenizer: "Tokenizer | None",
    prompts: Path,
    limit: int | None,
    settings: "Settings",
    subject: dict[str, Any],
    dtype: str,
) -> dict[str, Any]:
    """The record of a measurement over a prompt file."""
    import sys

    from tidar.bench.prompts import read_prompts
    from tidar.bench.record import make_record

    file = read_prompts(prompts, tokenizer, network, limit)
    results = _measure(network, tokenizer, file, settings)
    subject["prompts"] = {
        "file": str(file.path), "sha256": file.sha256, "count": len(file.prompts),
        "distinct_4_of_real_text": _real_distinct(file, settings),
    }  # fmt: skip
    return make_record(
        command=["tidar", *sys.argv[1:]],
        device=network.embed.weight.device,
        subject=subject,
        settings=_settings_json(settings, dtype),
        results=results,
    )


def report(record: dict[str, Any], as_json: bool, out: Path | None) -> None:
    """Shows the record, and writes it where asked to."""
    import json

    from rich.console import Console

    from tidar.bench.record import write_record

    if out is not None:
        write_record(out, record)
    if as_json:
        typer.echo(json.dumps(record, indent=1))
    else:
        show_record(record, Console())
    if out is not None:
        typer.echo(f"Wrote {out}", err=True)


def load_subject(
    source: str | None, device: str, dtype: str, random_weights: bool
) -> "tuple[Transformer, Tokenizer | None, dict[str, Any]]":
    """The model, its tokenizer if it has one, and facts about them for the record."""
    from tidar.api import bundled_folder, pick_device
    from tidar.errors import TidarError
    from tidar.model import num_parameters
    from tidar.tokens import Tokenizer
    from tidar.weights import DTYPES, load_checkpoint

    if dtype not in DTYPES:
        raise TidarError(f"dtype {dtype!r} is not supported; allowed: {', '.join(DTYPES)}")
    told = source or "the bundled checkpoint"
    source, where = source or str(bundled_folder()), pick_device(device)
    if random_weights:
        folder, meta = Path(source), None
        network = _random_model(folder).to(where, DTYPES[dtype])
    else:
        checkpoint = load_checkpoint(source, device=where, dtype=DTYPES[dtype])
        network, folder, meta = checkpoint.model, checkpoint.folder, checkpoint.meta
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    facts = {
        "source": told,
        "parameters": num_parameters(network.config),
        "random_weights": random_weights,
        "trained_draft_lens": list(meta.draft_lens) if meta else [],
    }
    return network, Tokenizer.load(folder) if has_tokenizer else None, {"model": facts}


def _random_model(folder: Path) -> "Transformer":
    """The shape of a checkpoint with random weights; the last vocabulary row is the mask token."""
    from tidar.hf_config import config_from_hf, read_json
    from tidar.weights import init_model

    raw = read_json(folder / "config.json")
    network = init_model(config_from_hf(raw, mask_token_id=int(raw["vocab_size"]) - 1), seed=0)
    return network.eval()


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
    from tidar.bench.summary import summarise

    eos_ids = tokenizer.eos_ids if tokenizer else frozenset()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=count_passes(settings, len(file.prompts)))
        passes = run_bench(
            network,
            file.prompts,
            settings,
            eos_ids,
            lambda label: progress.update(task, advance=1, description=label),
        )
    return summarise(network, passes, file.prompts, settings, tokenizer)


def _real_distinct(file: "PromptFile", settings: "Settings") -> float | None:
    from tidar.bench.repetition import mean_distinct

    return mean_distinct([p.real[: settings.max_new_tokens] for p in file.prompts if p.real])


def _settings_json(settings: "Settings", dtype: str) -> dict[str, Any]:
    from tidar.bench.measure import WARM_UP_TOKENS

    return {
        "methods": [spec.name for spec in settings.methods],
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "seed": settings.seed,
        "runs": settings.runs,
        "batch": settings.batch,
        "ignore_eos": settings.ignore_eos,
        "teacher_forced": settings.teacher_forced,
        "dtype": dtype,
        "warm_up": f"one untimed pass per method, {WARM_UP_TOKENS} tokens",
        "order": "methods take turns within each run of each prompt",
    }


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _range(values: dict[str, float] | None, digits: int | None = None, unit: str = "") -> str:
    """Median, and least to most in brackets."""
    if values is None:
        return "-"
    if digits is None:
        digits = 0 if values["median"] >= 100 else 2
    low, middle, high = (f"{values[key]:.{digits}f}" for key in ("min", "median", "max"))
    if low == high:
        return f"{middle}{unit}"
    return f"{middle}{unit} ({low}-{high})"


def _same(figures: dict[str, Any]) -> str:
    same = figures.get("same_as_ar")
    if same is None:
        return "-"
    counts = f" ({same['differ']} differ, {same['excused']} excused)" if same["differ"] else ""
    return ("yes" if same["same"] else "NO") + counts


def show_record(record: dict[str, Any], console: Any) -> None:
    """The record as a table and the lines that go with it."""
    from rich.table import Table

    model, settings, where = record["model"], record["settings"], record["environment"]
    label = "[bold red]random weights[/] · " if model["random_weights"] else ""
    forced = ", teacher forced" if settings["teacher_forced"] else ""
    console.print(
        f"{label}{model['source']} · {model['parameters']:,} parameters · {settings['dtype']} · "
        f"{where['gpu'] or where['cpu']}, {where['torch_threads']} threads\n"
        f"{record['prompts']['count']} prompts, up to {settings['max_new_tokens']} tokens{forced}, "
        f"temperature {settings['temperature']:g}, batch {settings['batch']}, "
        f"{settings['runs']} runs taking turns; warm-up: {settings['warm_up']}"
    )
    table = Table("", *record["methods"])
    columns = [method_column(figures) for figures in record["methods"].values()]
    for label in columns[0]:
        cells = [column[label] for column in columns]
        if any(cell != "-" for cell in cells):
            table.add_row(label, *cells)
    console.print(table)
    console.print(
        "T/NFE: tokens of decode steps per step, prefill in neither. Ranges: median (least-most), "
        'of tok/s over runs, of x AR over prompts; "all": prefill and host included.',
        style="dim",
    )
    real = record["prompts"]["distinct_4_of_real_text"]
    if real is not None:
        console.print(f"distinct-4 of the prompts' real continuations: {real:.2f}")
    for line in _spread_lines(record["methods"]):
        console.print(line)


def method_column(figures: dict[str, Any]) -> dict[str, str]:
    """What the table shows of one method; ranges are median (least-most) over runs or prompts."""
    gain = figures.get("speed_up") or {}
    exact = figures["exact_match"]
    return {
        "tokens / steps": f"{figures['tokens']} / {figures['decode_steps']}",
        "T/NFE": _number(figures["tokens_per_forward"]),
        "chars/forward": _number(figures["characters_per_forward"]),
        "rows/step": _number(figures["rows_per_step"], 1),
        "accepts/step": _histogram(figures["accept_histogram"]),
        "decode tok/s": _range(figures["decode_tokens_per_second"]),
        "all tok/s": _range(figures["tokens_per_second"]),
        "x AR decode": _range(gain.get("decode")),
        "x AR all": _range(gain.get("end_to_end")),
        "same as AR": _same(figures),
        "distinct-4": _number(figures["distinct_4"]),
        "end of text": f"{figures['end_of_text_rate']:.0%}",
        "exact match": "-" if exact is None else f"{exact:.1%}",
    }


def _histogram(accepts: dict[str, int], limit: int = 5) -> str:
    """Shares of accept counts, the most frequent first."""
    total = sum(accepts.values())
    ranked = sorted(accepts.items(), key=lambda item: -item[1])
    shown = sorted(ranked[:limit], key=lambda item: int(item[0]))
    return " ".join(f"{n}:{count / total:.0%}" for n, count in shown) + " …" * (len(ranked) > limit)


def _spread_lines(methods: dict[str, Any]) -> list[str]:
    """AR against itself, and for each method whether any prompt got slower."""
    lines = []
    for name, figures in methods.items():
        gain = figures.get("speed_up") or {}
        if gain.get("end_to_end_self"):
            own = gain["end_to_end_self"]
            lines.append(
                f"{name} against itself, end to end: {_range(own['ratio'], 3, 'x')}, "
                f"spread {own['spread']:.3f}"
            )
        line = gain.get("acceptance")
        if line and line["met"] is None:
            lines.append(f"{name}: no prompt below 0.95x AR: not judged, {line['reason']}")
        elif line:
            verdict = "yes" if line["met"] else "NO"
            lines.append(
                f"{name}: no prompt below 0.95x AR, its spread of {line['ar_spread']:.3f} "
                f"taken off ({line['bar']:.3f}x): {verdict}, the slowest is {line['slowest']:.2f}x"
            )
    return lines
