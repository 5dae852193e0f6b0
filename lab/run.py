"""The laboratory's driver: corpus, tokenizer, training stages, measurements, table; each can be resumed.

    python -m lab.run --out OUT [--shared DIR] [--prose PATH ...] [STAGE ...]
    python -m lab.run --out OUT --smoke

Run from the root of the repository. A stage whose result is there is left alone; one that was cut
short goes on from its last checkpoint.
"""

import argparse
import gc
import json
import shutil
import site
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lab import ROOT, corpus, measure, table
from lab.plan import COMMON, FULL, SMOKE, STAGES, WEIGHTS, Scale, arch_file
from tidar.errors import TidarError
from tidar.training.config import TrainConfig
from tidar.training.objectives import OBJECTIVES
from tidar.training.sources import Source
from tidar.training.tokenizer import train_tokenizer
from tidar.training.trainer import train

ORDER = ("corpus", "tokenizer", *STAGES, "measure", "table")


def stage_config(name: str, out: Path, scale: Scale) -> TrainConfig:
    """The run of a stage: OUT/NAME, from OUT/data and the stage before it. Raises TidarError for impossible values."""
    stage, data = STAGES[name], out / "data"
    values: dict[str, Any] = {**COMMON, **stage.values, **scale.changes}
    values["data"] = [
        f"{data / domain}.jsonl={WEIGHTS[domain]:g}" for domain in corpus.domains(data)
    ]
    values["out"], values["cache_dir"] = str(out / name), str(out / "tokens")
    if stage.after is None:
        values["arch"], values["tokenizer"] = (
            str(scaled_arch(stage.arch, out, scale)),
            str(out / "tokenizer"),
        )
    else:
        values["base"] = str(out / stage.after / "model")
    return TrainConfig.from_mapping({**values, "resume": True})


def scaled_arch(name: str, out: Path, scale: Scale) -> Path:
    """The architecture of a stage, written to OUT with what this scale changes."""
    fields = {**json.loads(Path(arch_file(name)).read_text()), **scale.arch}
    path = out / f"{name}.json"
    path.write_text(json.dumps(fields, indent=1) + "\n")
    return path


def run_training(name: str, out: Path, scale: Scale) -> None:
    """Trains a stage unless its checkpoint is there."""
    if (out / name / "model" / "config.json").is_file():
        print(f"{name}: is there")
        return
    if str(STAGES[name].values["objective"]) not in OBJECTIVES:
        print(
            f"{name}: this version has no objective {STAGES[name].values['objective']!r}; left out"
        )
        return
    config = stage_config(name, out, scale)
    result = train(config)
    speed = f", {result.tokens_per_second:,.0f} clean tokens/s" if result.tokens_per_second else ""
    print(f"{name}: {result.steps} steps, {result.clean_tokens:,} clean tokens{speed}")
    # Graphs of one network are no use to the next, and torch keeps only so many of a function.
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_stage(name: str, out: Path, scale: Scale, texts: corpus.Texts) -> None:
    """One stage by its name."""
    data = out / "data"
    if name == "corpus":
        if not (data / "manifest.json").is_file():
            corpus.build(data, texts, scale.sizes)
    elif name == "tokenizer":
        if not (out / "tokenizer" / "tokenizer_config.json").is_file():
            shutil.rmtree(out / "tokenizer", ignore_errors=True)
            sources = [Source(f"{data / domain}.jsonl") for domain in corpus.domains(data)]
            train_tokenizer(
                sources,
                out / "tokenizer",
                vocab_size=scale.tokenizer_size,
                max_characters=40_000_000,
            )
    elif name == "measure":
        measure.measure_all(out, scale)
    elif name == "table":
        table.write(out / "records", out)
    else:
        run_training(name, out, scale)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages that were named, or all in their order; 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(ORDER)}")
    parser.add_argument("--out", type=Path, required=True, help="folder of all results")
    parser.add_argument("--shared", type=Path, help="folder of shared data, see lab/README.md")
    parser.add_argument("--prose", type=Path, nargs="*", default=[], help="text files or folders")
    parser.add_argument("--packages", type=Path, nargs="*", help="folders of installed packages")
    parser.add_argument("--smoke", action="store_true", help="all of it, tiny, on the CPU")
    options = parser.parse_args(arguments)
    out: Path = options.out.expanduser().resolve()
    out.mkdir(parents=True, exist_ok=True)
    prose = tuple(options.prose) or (tuple(ROOT.glob("*.md")) if options.smoke else ())
    packages = options.packages or [Path(folder) for folder in site.getsitepackages()]
    texts = corpus.Texts(shared=options.shared, packages=tuple(packages), prose=prose)
    try:
        for name in options.stages or ORDER:
            if name not in ORDER:
                raise TidarError(f"stage {name!r} is not known; allowed: {', '.join(ORDER)}")
            began = time.perf_counter()
            run_stage(name, out, SMOKE if options.smoke else FULL, texts)
            print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    except TidarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
