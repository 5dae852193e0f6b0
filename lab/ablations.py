"""The laboratory's ablations: short conversions that differ in one thing, and what comes of each.

    python -m lab.ablations --out OUT all|NAME ... [--gpus N]
    python -m lab.ablations --out OUT --smoke all

Run from the root of the repository. OUT is that of `lab.run`, whose stages base and tidar must be done. A
variant or a record that is there is left alone; a training that was cut short goes on from its last checkpoint.
Written: OUT/ablations/VARIANT/model, OUT/ablations/records/NAME.json, OUT/ablations/ablations.md and its pictures.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lab import ablation_tables, run
from lab.ablation_measure import ablation_record
from lab.ablation_plan import VARIANT, VARIANTS, Ablation, ablations
from lab.command import exit_code
from lab.jobs import Job, run_jobs, visible_gpus
from lab.plan import FULL, SMOKE, Scale
from tidar.bench.record import write_record
from tidar.errors import TidarError
from tidar.training.config import TrainConfig

TRAIN = "train-"
"""In front of a variant's name: training it alone, which is what a process of several does."""


def variant_config(name: str, out: Path, scale: Scale) -> TrainConfig:
    """The training run of a variant: OUT/ablations/NAME, from OUT/base. Raises TidarError for impossible values."""
    values = {**run.run_values(out, scale), **VARIANT, **VARIANTS[name], **scale.changes}
    return TrainConfig.from_mapping(
        {**values, "base": str(out / "base" / "model"), "out": str(out / "ablations" / name)}
    )


def measure(name: str, ablation: Ablation, out: Path, scale: Scale) -> None:
    """Writes the record of an ablation, unless it is there."""
    path = out / "ablations" / "records" / f"{name}.json"
    if path.is_file():
        print(f"{name}: is there")
        return
    write_record(path, ablation_record(name, ablation, out, scale))
    print(f"wrote {path}", flush=True)


def run_part(name: str, out: Path, scale: Scale) -> None:
    """Trains a variant (`train-VARIANT`), or measures an ablation whose variants are there."""
    if name.startswith(TRAIN):
        variant = name.removeprefix(TRAIN)
        run.run_training(variant, variant_config(variant, out, scale))
    else:
        measure(name, ablations(scale)[name], out, scale)


def parts_of(names: Sequence[str], known: dict[str, Ablation]) -> dict[str, frozenset[str]]:
    """What must be run for these ablations, each variant once, and what each part waits for; in a good order.

    What is timed waits for everything else, so that nothing else runs on the machine meanwhile.
    """
    wanted = [name for name in known if name in names]
    variants = [v for v in VARIANTS if any(v in known[name].variants for name in wanted)]
    parts = {TRAIN + variant: frozenset[str]() for variant in variants}
    untimed = [name for name in wanted if not known[name].batches]
    parts |= {name: frozenset(TRAIN + v for v in known[name].variants) for name in untimed}
    others = frozenset(parts)
    return parts | {name: others for name in wanted if name not in untimed}


def part_jobs(parts: dict[str, frozenset[str]], out: Path, *, smoke: bool) -> list[Job]:
    """Each part as a process of its own; what is measured and not timed is light."""
    known = ablations(SMOKE if smoke else FULL)
    options = ("--part", f"--out={out}", *(["--smoke"] if smoke else []))

    def job(name: str, before: frozenset[str]) -> Job:
        command = (sys.executable, "-m", "lab.ablations", *options, name)
        if name in known and known[name].batches:
            return Job(name, command, behind=before)
        return Job(name, command, before, light=name in known)

    return [job(name, before) for name, before in parts.items()]


def check_run(out: Path, *, smoke: bool) -> None:
    """Raises TidarError unless OUT is that of a laboratory's run; a tiny one is made where that is missing."""
    stages = ("base", "tidar")
    missing = [s for s in stages if not (out / s / "model" / "config.json").is_file()]
    if not missing:
        return
    if not smoke:
        raise TidarError(
            f"{out} has no checkpoint of {' and '.join(missing)}, which ablations start from: run "
            f"python -m lab.run --out {out} {' '.join(('corpus', 'tokenizer', *stages))} first."
        )
    if run.main(["--smoke", f"--out={out}", "corpus", "tokenizer", *stages]):
        raise TidarError(f"{out}: the tiny run that ablations start from failed; see above.")


def make_parser(known: dict[str, Ablation]) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"all, or of {', '.join(known)}")
    parser.add_argument("--out", type=Path, required=True, help="OUT of lab.run")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs for parts side by side")
    parser.add_argument("--smoke", action="store_true", help="all of it, tiny, on the CPU")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure and tabulate the ablations that were named.

    Returns 1 where a part on several GPUs failed, 2 for what the user can mend, 130 after Ctrl-C.
    """
    known = ablations(FULL)
    options = make_parser(known).parse_args(arguments)
    scale = SMOKE if options.smoke else FULL
    out: Path = options.out.expanduser().resolve()

    def work() -> int:
        if options.part:
            for name in options.names:
                run_part(name, out, scale)
            return 0
        names = list(known) if "all" in options.names else options.names
        for name in names:
            if name not in known:
                raise TidarError(
                    f"ablation {name!r} is not known; allowed: all, {', '.join(known)}."
                )
        check_run(out, smoke=options.smoke)
        return _run(parts_of(names, known), out, scale, options)

    return exit_code(work)


def _run(
    parts: dict[str, frozenset[str]], out: Path, scale: Scale, options: argparse.Namespace
) -> int:
    """All parts, here or in processes; then the tables of all records that are there. The exit code."""
    failed: dict[str, str] = {}
    if options.gpus == 1:
        for name in parts:
            run_part(name, out, scale)
    else:
        jobs = part_jobs(parts, out, smoke=options.smoke)
        failed = run_jobs(jobs, visible_gpus(options.gpus), out / "ablations")
    records = out / "ablations" / "records"
    if any(records.glob("*.json")):
        ablation_tables.write(records, out / "ablations")
    return run.report_failures(failed)


if __name__ == "__main__":
    sys.exit(main())
