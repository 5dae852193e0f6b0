"""Methods beside TiDAR and AR, by name: what tells them apart, and what they need to run.

`speculative:PATH:K`. They run in the plain engine, at the schedule of their size.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from tidar.errors import TidarError
from tidar.layout import Schedule
from tidar.methods import Method
from tidar.methods.speculative import DraftModel, Speculative
from tidar.model import Transformer
from tidar.tokens import Tokenizer
from tidar.weights import load_checkpoint

FORMS = "speculative:PATH:K"
"""How they are written, for messages."""


@dataclass(slots=True)
class Target:
    """Mutable: the model that decodes, and the draft models loaded for it, each once.

    tokenizer: the model's, where it has one; a draft model's must give the same tokens.
    """

    model: Transformer
    tokenizer: Tokenizer | None = None
    drafts: dict[str, Transformer] = field(default_factory=dict)

    def draft_model(self, path: str) -> Transformer:
        """A checkpoint with the model's vocabulary, on its device. Raises TidarError for any other."""
        if path not in self.drafts:
            weight = self.model.embed.weight
            loaded = load_checkpoint(path, device=weight.device, dtype=weight.dtype)
            known = any(
                (loaded.folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model")
            )
            if known and self.tokenizer is not None:
                check_same_tokens(self.tokenizer, Tokenizer.load(loaded.folder), path)
            elif loaded.config.vocab_size != self.model.config.vocab_size:
                raise TidarError(
                    f"The draft model {path} has {loaded.config.vocab_size} tokens and the model "
                    f"{self.model.config.vocab_size}; without both tokenizers these must be equal."
                )
            self.drafts[path] = loaded.model
        return self.drafts[path]


def check_same_tokens(target: Tokenizer, draft: Tokenizer, path: str) -> None:
    """Raises TidarError unless ids that both tokenizers know mean the same."""
    names = {number: token for token, number in target.vocab.items()}
    for token, number in draft.vocab.items():
        if names.get(number, token) != token:
            raise TidarError(
                f"The draft model {path} has another tokenizer: its token {number} is {token!r}, the "
                f"model's is {names[number]!r}. Speculative decoding needs the same tokens in both."
            )


class Rival(Protocol):
    """exact: its text is AR's (greedy and shared noise), or has its distribution (rejection sampling).

    needs_mask: it reads mask rows. Both hold for all requests.
    """

    @property
    def exact(self) -> bool: ...

    @property
    def needs_mask(self) -> bool: ...

    def method(self, target: Target, max_batch: int) -> Method[Any]:
        """The method, for up to `max_batch` sequences at a time. Raises TidarError where it cannot run."""
        ...


@dataclass(frozen=True, slots=True)
class SpeculativeRival:
    """`speculative:PATH:K`: the checkpoint at PATH drafts K tokens, one after the other."""

    path: str
    exact: ClassVar[bool] = True
    needs_mask: ClassVar[bool] = False

    def method(self, target: Target, max_batch: int) -> Speculative:
        config = target.model.config
        return Speculative(
            DraftModel(target.draft_model(self.path), max_batch),
            vocab_size=config.vocab_size,
            mask_token_id=config.mask_token_id,
        )


def parse_rival(text: str) -> tuple[str, Schedule, Rival] | None:
    """Name, schedule and method of one of these; None for what is none of them. Raises TidarError if it is wrong."""
    name, *rest = text.strip().split(":")
    if name == "speculative":
        return _parse_speculative(text, rest)
    return None


def is_exact(method: str | None) -> bool:
    """Whether a method of this name writes AR's text; a name that is not known counts as TiDAR's."""
    found = parse_rival(method) if method else None
    return found is None or found[2].exact


def _number(text: str, of: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise TidarError(f"method {of!r}: {text!r} is not a whole number of at least {least}.")
    return int(text)


def _parse_speculative(text: str, rest: list[str]) -> tuple[str, Schedule, Rival]:
    path = ":".join(rest[:-1])
    if not path:
        raise TidarError(
            f"method {text!r} is not understood: give speculative:PATH:K, the draft model's folder or hub "
            "id and how many tokens it drafts, such as speculative:path/to/small:4."
        )
    count = _number(rest[-1], text)
    # One row more than it drafts: the certain token's.
    return f"speculative:{path}:{count}", Schedule(count + 1, ()), SpeculativeRival(path)
