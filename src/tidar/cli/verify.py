"""`tidar verify`: the laws of exact decoding, checked on your own checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tidar.verify.subject import Finding, Subject
    from tidar.weights import Checkpoint


ModelArg = Annotated[
    str | None, typer.Argument(help="Folder or hub id; default: the bundled checkpoint.")
]
PromptsArg = Annotated[
    Path | None,
    typer.Option(help="Texts to check on: one a line, or JSON lines with `prompt`."),
]
QuickArg = Annotated[bool, typer.Option("--quick", help="Fewer schedules, seeds, tokens.")]
DtypeArg = Annotated[str, typer.Option(help="float32 is the one with exact laws.")]
DeviceArg = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
AsJsonArg = Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")]


def verify(
    model: ModelArg = None,
    prompts: PromptsArg = None,
    quick: QuickArg = False,
    dtype: DtypeArg = "float32",
    device: DeviceArg = "cpu",
    as_json: AsJsonArg = False,
) -> None:
    """Check on your own checkpoint that decoding is exact.

    Compares the decoder in use with plain causal passes: tokens, logits, the cache, batches, and
    the folder in transformers. Exit code 1 when any law fails.

    Examples:

        tidar verify DIR

        tidar verify DIR --prompts my-prompts.jsonl --json

        tidar verify --quick
    """
    import json

    from rich.console import Console
    from rich.progress import Progress

    from tidar.api import bundled_folder, pick_device
    from tidar.errors import TidarError
    from tidar.families import need_causal
    from tidar.verify.laws import LAWS, run_laws
    from tidar.verify.subject import make_subject
    from tidar.weights import DTYPES, load_checkpoint

    if dtype not in DTYPES:
        raise TidarError(f"dtype {dtype!r} is not supported; allowed: {', '.join(DTYPES)}")
    checkpoint = load_checkpoint(
        model or bundled_folder(), device=pick_device(device), dtype=DTYPES[dtype]
    )
    need_causal(checkpoint.config, "`tidar verify`")
    subject = make_subject(
        checkpoint.model,
        read_texts(prompts, checkpoint),
        draft_lens=checkpoint.meta.draft_lens if checkpoint.meta else (),
        quick=quick,
        folder=checkpoint.folder,
    )
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=len(LAWS) + 1)
        findings = run_laws(
            subject, lambda claim: progress.update(task, advance=1, description=claim)
        )
    if as_json:
        typer.echo(json.dumps(findings_json(checkpoint, subject, findings), indent=2))
    else:
        show_findings(checkpoint, subject, findings, dtype, Console())
    if any(finding.verdict == "fail" for finding in findings):
        raise typer.Exit(1)


def findings_json(
    checkpoint: "Checkpoint", subject: "Subject", findings: "list[Finding]"
) -> dict[str, Any]:
    """The page as JSON values."""
    from dataclasses import asdict

    return {
        "source": checkpoint.source,
        "passed": all(finding.verdict != "fail" for finding in findings),
        "tolerance": subject.tolerance,
        "near_tie": subject.near_tie,
        "laws": [asdict(finding) for finding in findings],
    }


def read_texts(path: Path | None, checkpoint: "Checkpoint") -> list[list[int]]:
    """Token ids of the prompts to check on; random ids for a folder without a tokenizer."""
    import json

    import torch

    from tidar.errors import TidarError
    from tidar.tokens import Tokenizer, check_prompt
    from tidar.verify.subject import PROMPTS

    config = checkpoint.config
    if path is None and not Tokenizer.is_in(checkpoint.folder):
        known = [i for i in range(config.vocab_size) if i != config.mask_token_id]
        pick = torch.randint(len(known), (3, 12), generator=torch.Generator().manual_seed(0))
        return [[known[i] for i in row] for row in pick.tolist()]
    texts: list[str] = list(PROMPTS)
    if path is not None:
        try:
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            rows = [json.loads(line) if line.startswith("{") else line for line in lines]
            texts = [row if isinstance(row, str) else str(row["prompt"]) for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TidarError(f"cannot read prompts from {path}: {error!r}") from error
        if not texts:
            raise TidarError(f"{path} has no prompts.")
    tokenizer = Tokenizer.load(checkpoint.folder)
    ids = [tokenizer.encode(text) for text in texts]
    for each in ids:
        check_prompt(each, vocab_size=config.vocab_size, mask_token_id=config.mask_token_id)
    return ids


def show_findings(
    checkpoint: "Checkpoint",
    subject: "Subject",
    findings: "list[Finding]",
    dtype: str,
    console: Any,
) -> None:
    """The findings as a page that anyone can read."""
    from rich.table import Table

    meta = checkpoint.meta
    console.print(f"[bold]{checkpoint.source}[/] · {dtype} on {subject.model.embed.weight.device}")
    if meta is None:
        console.print(
            'No "tidar" entry in config.json: this checkpoint decodes as AR only. The laws about '
            "drafting do not apply; `tidar train` converts it."
        )
    else:
        lens = ", ".join(map(str, sorted({s.draft_len for s in subject.schedules})))
        console.print(f"Checked with draft lengths {lens} on {len(subject.prompts)} prompts.")
    table = Table("law", "claim, and what was checked", "worst float", "near-ties", "verdict")
    styles = {"pass": "green", "fail": "bold red", "skip": "yellow"}
    for finding in findings:
        detail = "\n".join(filter(None, (finding.checked, finding.reason)))
        table.add_row(
            finding.law,
            f"{finding.claim}\n[dim]{detail}[/]",
            "-" if finding.worst is None else f"{finding.worst:.1e}",
            str(finding.excused) if finding.tokens else "-",
            f"[{styles[finding.verdict]}]{finding.verdict.upper()}[/]",
        )
    console.print(table)
    console.print(
        f"Floats are equal within {subject.tolerance:.0e} of the largest value. A near-tie is a "
        f"token whose choice differs where the model's best two lie within {subject.near_tie:.0e}: "
        "rounding decides there, and it is counted, not hidden.",
        style="dim",
    )
    bad = [finding for finding in findings if finding.verdict == "fail"]
    if bad:
        names = ", ".join(dict.fromkeys(finding.law for finding in bad))
        console.print(f"[bold red]FAILED[/]: law {names}. Decoding this checkpoint is not exact.")
    else:
        skipped = sum(finding.verdict == "skip" for finding in findings)
        rest = f" ({skipped} skipped, see the reasons)" if skipped else ""
        console.print(f"[green]All laws hold[/]{rest}.")
