"""The families of checkpoints: how each writes its config.json, and what it calls its tensors.

A family is a value, found by `model_type`. Adding one is a file here with a `read` and a `write`, a line in
`FAMILIES`, and new `TensorNames` where its tensors have other names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tidar.errors import TidarError
from tidar.families import dream, llada, llama
from tidar.families.fields import Json, RawConfig
from tidar.families.names import LLADA, TRANSFORMERS, TensorNames
from tidar.model import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the checkpoints of one model_type are stored.

    architecture: the class that config.json names. names: of the tensors. rows_key, tied_key: the entries that say
    how many rows the embedding has, and whether the output matrix is the embedding. own_mask: config.json itself
    names the mask token, and the attention is the family's; such a checkpoint has no "tidar" entry.
    """

    architecture: str
    read: Callable[[RawConfig, int | None], ModelConfig]
    """config.json and a mask token id -> the network; a family with a mask token of its own keeps that."""
    write: Callable[[ModelConfig], Json]
    """The network -> config.json, without a dtype. Raises TidarError for what the family cannot express."""
    names: TensorNames = TRANSFORMERS
    rows_key: str = "vocab_size"
    tied_key: str = "tie_word_embeddings"
    own_mask: bool = False


FAMILIES: Final[Mapping[str, Family]] = {
    **{
        model_type: Family(architecture=architecture, read=llama.read, write=llama.write)
        for model_type, architecture in llama.ARCHITECTURES.items()
    },
    "llada": Family(
        architecture=llada.ARCHITECTURE,
        read=llada.read,
        write=llada.write,
        names=LLADA,
        rows_key="embedding_size",
        tied_key="weight_tying",
        own_mask=True,
    ),
    "Dream": Family(
        architecture=dream.ARCHITECTURE, read=dream.read, write=dream.write, own_mask=True
    ),
}


def find_family(raw: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises TidarError for any other model_type."""
    model_type = raw.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    remote = " (its remote code, auto_map, is never run)" if raw.get("auto_map") else ""
    raise TidarError(
        f"model_type {model_type!r} is not supported{remote}; allowed: {', '.join(FAMILIES)}"
    )


def need_causal(config: ModelConfig, who: str) -> None:
    """Raises TidarError where no row was ever trained to predict without seeing what follows; `who` wants that."""
    if config.attention == "bidirectional":
        raise TidarError(
            f"{who} reads causally, and this checkpoint ({config.model_type}) was trained with every row seeing every "
            "other. Its method is masked-diffusion:SPAN:STEPS, such as masked-diffusion:32:32."
        )
