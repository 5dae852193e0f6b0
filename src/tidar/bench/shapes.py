"""System speed: the engine on a network of a given shape with random weights, at a made-up acceptance.

Each cell of a sweep is a context length and a batch: so many prompts of random tokens, decoded by every
method in turn. What the texts say means nothing, so nothing is said about them.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tidar.bench.acceptance import LABEL
from tidar.bench.measure import Pass, Passes, Settings, run_bench
from tidar.bench.memory import MemoryMeter, weight_bytes
from tidar.bench.prompts import Prompt
from tidar.bench.record import gpu_clocks
from tidar.bench.summary import Figures, run_figures, speed_figures, spread
from tidar.errors import TidarError
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
    """The network of a shape; its last vocabulary row is the mask token."""
    raw = read_json(find_shape(text))
    return config_from_hf(raw, mask_token_id=config_from_hf(raw).vocab_size - 1)


def random_prompts(config: ModelConfig, count: int, length: int, seed: int) -> list[Prompt]:
    """Prompts of random tokens, never the last one of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size - 1, (count, length), generator=generator)
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
    reserve = settings.max_new_tokens + 3 * longest
    for context in contexts:
        if context < 1:
            raise TidarError(f"a context of {context} tokens is too short; give 1 or more.")
        if context + reserve > config.max_positions:
            raise TidarError(
                f"a context of {context} tokens does not fit: with {settings.max_new_tokens} new tokens and "
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
    """The figures of one cell, every method beside AR where AR was measured."""
    prompts = random_prompts(model.config, cell.batch, cell.context, settings.seed)
    meter = MemoryMeter(model)
    settings = replace(settings, batch=cell.batch)
    passes = run_bench(model, prompts, settings, frozenset(), on_pass, meter=meter)
    clocks = gpu_clocks(model.embed.weight.device)
    methods = cell_figures(passes, settings, meter)
    return {"context": cell.context, "batch": cell.batch, "gpu_clocks": clocks, "methods": methods}


def sweep(
    model: Transformer,
    cells: Sequence[Cell],
    settings: Settings,
    on_pass: Callable[[str], None] = lambda label: None,
) -> list[Figures]:
    """The figures of all cells. One that finds too little memory says so, and the others go on.

    Raises TidarError where there is only that one.
    """
    found = []
    for cell in cells:
        gc.collect()  # engines of the cell before, and their graphs
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        try:
            found.append(measure_cell(model, cell, settings, on_pass))
        except (TidarError, torch.OutOfMemoryError) as error:
            if len(cells) == 1:
                raise TidarError(str(error)) from error
            told = {"context": cell.context, "batch": cell.batch}
            found.append({**told, "error": str(error), "methods": {}})
    return found


def cell_figures(passes: Passes, settings: Settings, meter: MemoryMeter) -> dict[str, Figures]:
    """Speeds, steps and memory by method, labelled; `x_ar` is run by run, where AR was measured."""
    base = next((passes[spec.name] for spec in settings.methods if spec.is_ar), None)
    methods: dict[str, Figures] = {}
    for spec in settings.methods:
        figures = {
            "label": PLAIN_LABEL if settings.replay is None else LABEL,
            **speed_figures(passes[spec.name]),
            "expected_tokens_per_forward": None,
            "memory": meter.figures(spec.name),
        }
        if settings.replay is not None and spec.schedule is not None:
            figures["expected_tokens_per_forward"] = settings.replay.expected(spec.schedule)
        if base is not None:
            figures["x_ar"] = {
                "end_to_end": _over(passes[spec.name], base, "tokens_per_second"),
                "decode": _over(passes[spec.name], base, "decode_tokens_per_second"),
            }
        methods[spec.name] = figures
    return methods


def _over(
    mine: Sequence[Sequence[Pass]], base: Sequence[Sequence[Pass]], key: str
) -> dict[str, Any] | None:
    """Spread over runs of a speed, as a multiple of the base's in the same run."""
    pairs = [
        (run_figures(one)[key], run_figures(other)[key])
        for one, other in zip(mine, base, strict=True)
    ]
    return spread([fast / slow for fast, slow in pairs if fast and slow])


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
