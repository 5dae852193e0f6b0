"""Who is compared: a checkpoint and a way to decode it, each with a name; and where the checkpoints are."""

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from tidar.bench.measure import EngineName
from tidar.bench.record import make_record
from tidar.decode.spec import MethodSpec, parse_method
from tidar.model import num_parameters
from tidar.weights import Checkpoint, load_checkpoint


@dataclass(frozen=True, slots=True)
class Contender:
    """A checkpoint and how it decodes. helper: the stage whose checkpoint `{helper}` in the method's name is.

    is_variant: of another contender, with one setting changed: its quality is measured at temperature 0 alone, and it
    is a dot without a name in the pictures.
    """

    stage: str
    method: str
    helper: str | None = None
    engine: EngineName = "plain"
    is_variant: bool = False

    @property
    def baseline(self) -> str:
        """The contender that is AR in the same engine."""
        return "ar" if self.engine == "plain" else "ar-paged"

    def spec(self, out: Path) -> MethodSpec:
        """The method, with the folder of the helper's checkpoint in it."""
        return parse_method(self.method.format(helper=out / (self.helper or "") / "model"))

    def missing(self, out: Path) -> list[str]:
        """Stages that it needs and that have no checkpoint yet."""
        return [stage for stage in (self.stage, self.helper) if stage and not is_there(out, stage)]


CONTENDERS: Final[Mapping[str, Contender]] = {
    "ar": Contender("ar", "ar"),
    "tidar": Contender("tidar", "tidar:16:dense"),
    "tidar-sparse": Contender("tidar", "tidar:16:1,2,3,5,8,16"),
    "speculative": Contender("ar", "speculative:{helper}:4", "draft"),
    "speculative-2": Contender("ar", "speculative:{helper}:2", "draft", is_variant=True),
    "speculative-8": Contender("ar", "speculative:{helper}:8", "draft", is_variant=True),
    "eagle": Contender("ar", "eagle:{helper}:4", "eagle"),
    "eagle-2": Contender("ar", "eagle:{helper}:2", "eagle", is_variant=True),
    "eagle-tree": Contender("ar", "eagle:{helper}:4:tree", "eagle", is_variant=True),
    "eagle-8": Contender("ar", "eagle:{helper}:8", "eagle", is_variant=True),
    "block-diffusion": Contender("block-diffusion", "block-diffusion:16:0.9"),
    "llada": Contender("llada", "masked-diffusion:32:16"),
    "llada-slow": Contender("llada", "masked-diffusion:32:32", is_variant=True),
    "dream": Contender("dream", "masked-diffusion:32:16"),
    "dream-slow": Contender("dream", "masked-diffusion:32:32", is_variant=True),
}
"""In the plain engine, which runs every method. Slow: a token a pass, as in the paper's tables."""

EXACT_VARIANTS: Final = frozenset(
    name for name, each in CONTENDERS.items() if each.is_variant and each.stage == "ar"
)
"""Variants whose text is AR's."""

PAGED: Final[Mapping[str, Contender]] = {
    "ar-paged": Contender("ar", "ar", engine="paged"),
    "tidar-paged": Contender("tidar", "tidar:16:dense", engine="paged"),
    "tidar-sparse-paged": Contender("tidar", "tidar:16:1,2,3,5,8,16", engine="paged"),
    "tidar-4-paged": Contender("tidar", "tidar:4:dense", engine="paged"),
    "tidar-8-paged": Contender("tidar", "tidar:8:1,2,4,8", engine="paged"),
    "tidar-plan-paged": Contender("tidar", "tidar:plan", engine="paged"),
}
"""In the paged engine, timed only: the texts are the same but for rounding."""

EVERYONE: Final[Mapping[str, Contender]] = {**CONTENDERS, **PAGED}
"""All that are timed."""

SCHEDULES: Final = (
    "tidar:4:dense", "tidar:8:dense", "tidar:16:dense", "tidar:8:1,2,4,8", "tidar:16:1,2,3,5,8,16",
    "tidar:32:1,2,4,8,16,32",
)  # fmt: skip
"""Of TiDAR's checkpoint, beside each other; spans of 32 are longer than any in its training."""


def is_there(out: Path, stage: str) -> bool:
    """Whether a stage has its checkpoint."""
    return (out / stage / "model" / "config.json").is_file()


def open_checkpoint(out: Path, stage: str) -> Checkpoint:
    """The checkpoint of a stage: bfloat16 on a GPU, else float32."""
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    return load_checkpoint(out / stage / "model", device="cuda" if cuda else "cpu", dtype=dtype)


def draft_lens(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Values of K in its training; none of most."""
    return tuple(checkpoint.meta.draft_lens) if checkpoint.meta else ()


def weights_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of the weights' files: two trainings with the same seeds need not end in the same ones."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def lab_record(
    subjects: Mapping[str, Checkpoint], settings: Mapping[str, Any], results: Mapping[str, Any]
) -> dict[str, Any]:
    """A record about the checkpoints of these stages, with the driver's command as it was given."""
    models = {
        stage: {
            "parameters": num_parameters(checkpoint.config),
            "trained_draft_lens": list(draft_lens(checkpoint)),
            "weights_sha256": weights_digest(checkpoint),
        }
        for stage, checkpoint in subjects.items()
    }
    weight = next(iter(subjects.values())).model.embed.weight
    return make_record(
        command=["python", "-m", "lab.run", *sys.argv[1:]], device=weight.device,
        subject={"models": models},
        settings={**settings, "dtype": str(weight.dtype).removeprefix("torch.")},
        results=dict(results),
    )  # fmt: skip
