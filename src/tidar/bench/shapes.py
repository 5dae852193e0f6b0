"""System speed: the engine on a network of a given shape with random weights, at a made-up acceptance.

Each cell of a sweep is a context length and a batch: so many prompts of random tokens, decoded by every
method in turn. What the texts say means nothing, so nothing is said about them.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tidar.bench.acceptance import LABEL, Acceptance
from tidar.bench.decode_only import most_tokens, run_decode_only
from tidar.bench.measure import Pass, Passes, Settings, run_bench
from tidar.bench.memory import MemoryMeter, weight_bytes
from tidar.bench.prompts import Prompt
from tidar.bench.record import gpu_clocks
from tidar.bench.summary import Figures, ratio, run_figures, speed_figures, spread
from tidar.decode.spec import MethodSpec
from tidar.errors import TidarError
from tidar.gpu_memory import OutOfMemory
from tidar.hf_config import config_from_hf, read_json
from tidar.model import ModelConfig, Transformer, num_parameters

PLAIN_LABEL = "random weights"
"""Of figures whose acceptance is that of the random weights: next to none."""


def shape_folders() -> list[Path]:
    """Where shapes have names: `recipes/shapes` here, and in the source tree the package runs from."""
    roots = (Path.cwd(), Path(__file__).resolve().parents[3])
    return [folder for root in roots if (folder := root / "recipes" / "shapes").is_dir()]


def find_shape(text: str) -> Path:
    """The config.json that a name, a file or a folder means. Raises TidarError where there is none."""
    path = Path(text)
    if path.is_dir() and (path / "config.json").is_file():
        return path / "config.json"
    if path.is_file():
        return path
    folders = shape_folders()
    for folder in folders:
        if (found := folder / f"{text}.json").is_file():
            return found
    known = sorted({each.stem for folder in folders for each in folder.glob("*.json")})
    names = (
        f"known names: {', '.join(known)}"
        if known
        else "names are files of recipes/shapes in the source tree, which is not here"
    )
    raise TidarError(
        f"shape {text!r} is neither a file nor a name ({names}). Give the path of a config.json, "
        "such as --shape path/to/config.json."
    )


def shape_config(text: str) -> ModelConfig:
    """The network of a shape; its last vocabulary row is the mask token, if the config names no other."""
    raw = read_json(find_shape(text))
    return config_from_hf(raw, mask_token_id=config_from_hf(raw).vocab_size - 1)


def random_prompts(config: ModelConfig, count: int, length: int, seed: int) -> list[Prompt]:
    """Prompts of random tokens, never the mask token; without one, never the last of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size - 1, (count, length), generator=generator)
    mask = config.mask_token_id
    if mask is not None:
        ids += ids >= mask
    return [Prompt(f"random-{i}", tuple(row)) for i, row in enumerate(ids.tolist())]


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of a sweep: prompt tokens of each text, and texts at a time."""

    context: int
    batch: int


def make_cells(
    contexts: Sequence[int], batches: Sequence[int], settings: Settings, config: ModelConfig
) -> list[Cell]:
    """All combinations. Raises TidarError where a text would come near the model's last position.

    There the engine decodes plainly, and no longer by the method that is to be measured.
    """
    longest = max(spec.max_draft_len(settings.draft_lens) for spec in settings.methods)
    new = 1 + most_tokens(settings) if settings.decode_only else settings.max_new_tokens
    reserve = new + 3 * longest
    for context in contexts:
        if context < 1:
            raise TidarError(f"a context of {context} tokens is too short; give 1 or more.")
        if context + reserve > config.max_positions:
            raise TidarError(
                f"a context of {context} tokens does not fit: with up to {new} new tokens and "
                f"3 K = {3 * longest} positions for drafts it needs {context + reserve} of the model's "
                f"{config.max_positions} positions. Lower --context or --max-new-tokens."
            )
    return [Cell(context, batch) for context in contexts for batch in batches]


def measure_cell(
    model: Transformer,
    cell: Cell,
    settings: Settings,
    on_pass: Callable[[str], None] = lambda label: None,
) -> Figures:
    """The figures of one cell, every method beside AR where AR was measured.

    For decoding alone a prompt has one token more than the context: that one must be run for its logits.
    """
    length = cell.context + settings.decode_only
    prompts = random_prompts(model.config, cell.batch, length, settings.seed)
    meter = MemoryMeter(model)
    settings = replace(settings, batch=cell.batch)
    if settings.decode_only:
        passes = run_decode_only(model, prompts, settings, on_pass, meter=meter)
    else:
        passes = run_bench(model, prompts, settings, frozenset(), on_pass, meter=meter)
    clocks = gpu_clocks(model.embed.weight.device)
    methods = cell_figures(passes, settings, meter)
    return {"context": cell.context, "batch": cell.batch, "gpu_clocks": clocks, "methods": methods}


def sweep(
    model: Transformer,
    cells: Sequence[Cell],
    settings: Settings,
    on_pass: Callable[[str], None] = lambda label: None,
) -> Iterator[Figures]:
    """The figures of each cell in turn. One that finds too little memory says so, and the others go on.

    Raises TidarError where there is only that one.
    """
    for cell in cells:
        gc.collect()  # engines of the cell before, and their graphs
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        doing = f"measuring a context of {cell.context:,} tokens at batch {cell.batch}"
        device, lower = model.embed.weight.device, "Lower --batch, --context or K (--methods)."
        try:
            with OutOfMemory(doing, device, lower):
                figures = measure_cell(model, cell, settings, on_pass)
        except TidarError as error:
            if len(cells) == 1:
                raise
            told = {"context": cell.context, "batch": cell.batch}
            figures = {**told, "error": str(error), "methods": {}}
        yield figures


def cell_figures(passes: Passes, settings: Settings, meter: MemoryMeter) -> dict[str, Figures]:
    """Speeds, steps and memory by method, labelled; `x_ar` is run by run, where AR was measured."""
    base = next((passes[spec.name] for spec in settings.methods if spec.is_ar), None)
    methods: dict[str, Figures] = {}
    for spec in settings.methods:
        runs = passes[spec.name]
        expected = None
        if settings.replay is not None:
            expected = expected_rate(spec, settings.replay, runs)
        figures = {
            "label": PLAIN_LABEL if settings.replay is None else LABEL,
            **speed_figures(runs),
            "expected_tokens_per_forward": expected,
            "expectation": None if expected is None else EXPECTATIONS[spec.schedule is None],
            "memory": meter.figures(spec.name),
        }
        if base is not None:
            figures["x_ar"] = {
                "end_to_end": None
                if settings.decode_only
                else _over(runs, base, "tokens_per_second"),
                "decode": _over(runs, base, "decode_tokens_per_second"),
                "decode_at_expected": _at_expected(runs, base, expected),
            }
        methods[spec.name] = figures
    return methods


EXPECTATIONS = (
    "of the schedule in the long run, by the step rule",
    "of the drafts that its steps verified, by their shift and length",
)
"""What the expected T/NFE of a fixed schedule and of a plan is."""


def expected_rate(
    spec: MethodSpec, acceptance: Acceptance, runs: Sequence[Sequence[Pass]]
) -> float | None:
    """T/NFE of a method without the luck of what was drawn; None where it made no step.

    A plan has no schedule of its own, so its steps are taken as they were, and only what each accepted
    is averaged over the draws.
    """
    if spec.schedule is not None:
        return acceptance.expected(spec.schedule)
    drafts: Counter[tuple[int, int]] = Counter()
    for text in (text for run in runs for each in run for text in each.texts):
        drafts += text.drafts
    tokens = sum(count * acceptance.of_step(*draft) for draft, count in drafts.items())
    return ratio(tokens, drafts.total())


def _over(
    mine: Sequence[Sequence[Pass]], base: Sequence[Sequence[Pass]], key: str
) -> Figures | None:
    """Spread over runs of a speed, as a multiple of the base's in the same run."""
    pairs = [
        (run_figures(one)[key], run_figures(other)[key])
        for one, other in zip(mine, base, strict=True)
    ]
    return spread([fast / slow for fast, slow in pairs if fast and slow])


def _at_expected(
    mine: Sequence[Sequence[Pass]], base: Sequence[Sequence[Pass]], expected: float | None
) -> Figures | None:
    """Spread over runs of expected T/NFE x AR step time / step time, where both run as many sequences."""
    pairs = [
        (run_figures(one)["mean_step"], run_figures(other)["mean_step"])
        for one, other in zip(mine, base, strict=True)
    ]
    alike = [(one, other) for one, other in pairs if one and other]
    if expected is None:
        return None
    return spread(
        [
            expected * other["milliseconds"] / one["milliseconds"]
            for one, other in alike
            if one["sequences"] == other["sequences"]
        ]
    )


def describe_shape(text: str, model: Transformer) -> dict[str, Any]:
    """The `model` entry of a record."""
    path = find_shape(text)
    return {
        "source": path.parent.name if path.name == "config.json" else path.stem,
        "config": read_json(path),
        "parameters": num_parameters(model.config),
        "weight_bytes": weight_bytes(model),
        "random_weights": True,
        "trained_draft_lens": [],
    }
