"""The laboratory's driver: corpus, tokenizer, training stages, measurements, table; each can be resumed.

    python -m lab.run --out OUT [--shared DIR] [--prose PATH ...] [--gpus N] [STAGE ...]
    python -m lab.run --out OUT --smoke

Run from the root of the repository. A stage whose result is there is left alone; one that was cut
short goes on from its last checkpoint. One GPU: all stages in this process, one after the other, up to the
first that fails. Several: each stage is a process of its own, as soon as those before it are done.
"""

import argparse
import gc
import json
import shutil
import site
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from lab import ROOT, corpus, measure, table
from lab.command import exit_code
from lab.jobs import Job, run_jobs, visible_gpus
from lab.plan import COMMON, FULL, SMOKE, STAGES, WEIGHTS, Scale, arch_file
from tidar.bench.record import write_record
from tidar.errors import TidarError
from tidar.training.config import TrainConfig
from tidar.training.sources import Source
from tidar.training.tokenizer import train_tokenizer
from tidar.training.trainer import train

ORDER: Final = ("corpus", "tokenizer", *STAGES, "measure", "table")


@dataclass(frozen=True, slots=True)
class Part:
    """Records of `measure`, and the names of the stages that they need.

    timed: taken when nothing but its like runs, each on a GPU of its own, of what is there by then; what runs beside
    the others does not change them.
    """

    records: tuple[str, ...]
    stages: frozenset[str]
    timed: bool = False


def measurements() -> dict[str, Part]:
    """All records in parts: one for each checkpoint, contender and kind of schedules, and for each speed."""
    parts = {
        f"bits-{stage}": Part((f"bits_{stage}",), frozenset({stage}))
        for stage in dict.fromkeys(each.stage for each in measure.CONTENDERS.values())
    }
    for name, each in measure.CONTENDERS.items():
        records = tuple(f"{name}_t{temperature:g}" for temperature in measure.temperatures_of(name))
        needed = frozenset(stage for stage in (each.stage, each.helper) if stage)
        parts[f"measure-{name}"] = Part(records, needed)
    for kind in ("free", "forced"):
        parts[f"schedules-{kind}"] = Part((f"schedules_{kind}",), frozenset({"tidar"}))
    for temperature in measure.TIMED:
        record = f"speed_t{temperature:g}"
        parts[record.replace("_", "-")] = Part((record,), frozenset(), timed=True)
    return parts


def predecessors() -> dict[str, frozenset[str]]:
    """Every stage and part of one by name, and what must be done before it, or have ended (`in_the_end`)."""
    before = {"corpus": frozenset[str](), "tokenizer": frozenset({"corpus"})}
    before |= {
        name: frozenset({stage.after or "tokenizer", "corpus"}) for name, stage in STAGES.items()
    }
    before |= {name: part.stages for name, part in measurements().items() if not part.timed}
    before |= dict.fromkeys(timed_parts(), frozenset(before))
    for name in ("measure", "table"):
        before[name] = frozenset(before)
    return before


def in_the_end() -> tuple[str, ...]:
    """Stages and parts that run when all others have ended, with what there is by then; the last two in turn."""
    return (*timed_parts(), "measure", "table")


def timed_parts() -> list[str]:
    """Parts of `measure` that nothing but their like may run beside."""
    return [name for name, part in measurements().items() if part.timed]


def stage_config(name: str, out: Path, scale: Scale) -> TrainConfig:
    """The run of a stage: OUT/NAME, from OUT/data and the stage before it. Raises TidarError for impossible values."""
    stage = STAGES[name]
    values = {**run_values(out, scale), **stage.values, **scale.changes, "out": str(out / name)}
    if stage.keeps:
        values["keep_models"] = scale.kept_steps
    if stage.after is None:
        values["arch"] = str(scaled_arch(stage.arch, out, scale))
        values["tokenizer"] = str(out / "tokenizer")
    else:
        values["base"] = str(out / stage.after / "model")
    return TrainConfig.from_mapping(values)


def run_values(out: Path, scale: Scale) -> dict[str, Any]:
    """What all training runs over OUT/data have in common; a cut one is resumed."""
    data = [
        f"{out / 'data' / domain}.jsonl={WEIGHTS[domain]:g}"
        for domain in corpus.domains(out / "data")
    ]
    return {
        **COMMON, "data": data, "cache_dir": str(out / "tokens"), "resume": True,
    }  # fmt: skip


def scaled_arch(name: str, out: Path, scale: Scale) -> Path:
    """The architecture of a stage, written to OUT with what this scale changes."""
    fields = {**json.loads(Path(arch_file(name)).read_text()), **scale.arch}
    path = out / f"{name}.json"
    path.write_text(json.dumps(fields, indent=1) + "\n")
    return path


def run_training(name: str, config: TrainConfig) -> None:
    """Trains unless the checkpoint is there."""
    if (config.out / "model" / "config.json").is_file():
        print(f"{name}: is there")
        return
    result = train(config)
    speed = f", {result.tokens_per_second:,.0f} clean tokens/s" if result.tokens_per_second else ""
    print(f"{name}: {result.steps} steps, {result.clean_tokens:,} clean tokens{speed}")
    # Graphs of one network are no use to the next, and torch keeps only so many of a function.
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_tokenizer(out: Path, scale: Scale) -> None:
    """Trains OUT/tokenizer on OUT/data unless it is there."""
    if (out / "tokenizer" / "tokenizer_config.json").is_file():
        return
    shutil.rmtree(out / "tokenizer", ignore_errors=True)
    sources = [Source(f"{out / 'data' / d}.jsonl") for d in corpus.domains(out / "data")]
    train_tokenizer(
        sources, out / "tokenizer", vocab_size=scale.tokenizer_size, max_characters=40_000_000
    )


def run_stage(name: str, out: Path, scale: Scale, texts: corpus.Texts) -> None:
    """One stage, or a part of one, by its name."""
    if name == "corpus":
        if not (out / "data" / "manifest.json").is_file():
            corpus.build(out / "data", texts, scale.sizes)
    elif name == "tokenizer":
        make_tokenizer(out, scale)
    elif name == "measure":
        measure.measure_all(out, scale)
    elif name == "table":
        table.write(out / "records", out)
    elif name in STAGES:
        run_training(name, stage_config(name, out, scale))
    else:
        measure_part(name, out, scale)


def measure_part(name: str, out: Path, scale: Scale) -> None:
    """The records of a part that are not there yet. One without its checkpoints is named and left out."""
    jobs = measure.jobs(out, scale)
    if measurements()[name].timed:
        measure.tell_missing(out)
    for record in measurements()[name].records:
        path = out / "records" / f"{record}.json"
        if record not in jobs:
            print(f"{record}: a checkpoint is missing; left out")
        elif not path.is_file():
            write_record(path, jobs[record]())
            print(f"wrote {path.name}", flush=True)


def run_in_turn(names: Sequence[str], out: Path, scale: Scale, texts: corpus.Texts) -> None:
    """The stages in this process, in the order given."""
    for name in names:
        began = time.perf_counter()
        run_stage(name, out, scale, texts)
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)


def stage_jobs(names: Sequence[str], options: Sequence[str]) -> list[Job]:
    """The stages as processes of their own, given the options of this one; of `measure` its parts as well."""
    before, parts = predecessors(), measurements()
    wanted = {*names, *(parts if "measure" in names else ())}

    def job(name: str) -> Job:
        command = (sys.executable, "-m", "lab.run", *options, name)
        if name in in_the_end():
            return Job(name, command, behind=before[name])
        return Job(name, command, before[name], light=name in parts)

    return [job(name) for name in sorted(wanted, key=list(before).index)]


def report_failures(failed: Mapping[str, str]) -> int:
    """Names what failed on stderr; the exit code."""
    for name, why in failed.items():
        print(f"{name} failed: {why}", file=sys.stderr)
    return 1 if failed else 0


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(ORDER)}")
    parser.add_argument("--out", type=Path, required=True, help="folder of all results")
    parser.add_argument("--shared", type=Path, help="folder of shared data, see lab/README.md")
    parser.add_argument("--prose", type=Path, nargs="*", default=[], help="text files or folders")
    parser.add_argument("--packages", type=Path, nargs="*", help="folders of installed packages")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs for stages side by side")
    parser.add_argument("--smoke", action="store_true", help="all of it, tiny, on the CPU")
    return parser


def child_options(options: argparse.Namespace, out: Path) -> list[str]:
    """The options again, for a stage in a process of its own in the root of the repository.

    Paths in the repository are told from its root: what is recorded should make sense elsewhere.
    """

    def place(path: Path) -> str:
        path = path.resolve()
        return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)

    told = [f"--out={place(out)}", *(["--smoke"] if options.smoke else [])]
    if options.shared is not None:
        told.append(f"--shared={place(options.shared)}")
    for name in ("prose", "packages"):
        if paths := getattr(options, name):
            told += [f"--{name}", *map(place, paths)]
    return [*told, "--gpus=1"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages that were named, or all of them.

    Returns 1 where a stage of several GPUs failed, 2 for what the user can mend, 130 after Ctrl-C.
    """
    options = make_parser().parse_args(arguments)
    out: Path = options.out.expanduser().resolve()
    out.mkdir(parents=True, exist_ok=True)
    prose = tuple(options.prose) or (tuple(ROOT.glob("*.md")) if options.smoke else ())
    packages = options.packages or [Path(folder) for folder in site.getsitepackages()]
    texts = corpus.Texts(shared=options.shared, packages=tuple(packages), prose=prose)
    names = options.stages or ORDER

    def work() -> int:
        for name in names:
            if name not in predecessors():
                raise TidarError(f"stage {name!r} is not known; allowed: {', '.join(ORDER)}")
        if options.gpus == 1:
            run_in_turn(names, out, SMOKE if options.smoke else FULL, texts)
            return 0
        jobs = stage_jobs(names, child_options(options, out))
        return report_failures(run_jobs(jobs, visible_gpus(options.gpus), out))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
