"""Methods beside TiDAR and AR, by name: what tells them apart, and what they need to run.

`speculative:PATH:K`, `eagle:PATH:K[:tree]`, `block-diffusion:K:THRESHOLD[:full]` (`best2` or `left2` for THRESHOLD),
`masked-diffusion:SPAN:STEPS[:ORDER][:shift]`. They run in the plain engine, at the schedule of their size. What a
name leaves out is as the checkpoint was trained.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, get_args

from tidar.eagle_files import load_eagle_head
from tidar.eagle_head import EagleHead
from tidar.errors import TidarError
from tidar.families import need_causal
from tidar.hf_config import TidarMeta
from tidar.layout import Schedule
from tidar.methods import Method
from tidar.methods.block_diffusion import BlockDiffusion, Quota, QuotaOrder
from tidar.methods.eagle import DraftHead, Eagle
from tidar.methods.masked_diffusion import ORDERS, MaskedDiffusion, Order
from tidar.methods.speculative import DraftModel, Speculative
from tidar.methods.tree import Tree, chain, spread
from tidar.model import ModelConfig, SpanAttention, Transformer
from tidar.tokens import Tokenizer
from tidar.weights import Checkpoint, load_checkpoint

FORMS = (
    "speculative:PATH:K, eagle:PATH:K (:tree for several guesses a position), block-diffusion:K:THRESHOLD such "
    "as block-diffusion:16:0.9 (:full where clean rows of a span see each other), masked-diffusion:SPAN:STEPS "
    "such as masked-diffusion:32:16 (:ORDER and :shift as in masked-diffusion:256:128:entropy:shift)"
)
"""How they are written, for messages."""


@dataclass(slots=True)
class Target:
    """Mutable: the model that decodes, and the draft models and heads loaded for it, each once.

    tokenizer: the model's, where it has one; a draft model's must give the same tokens.
    """

    model: Transformer
    tokenizer: Tokenizer | None = None
    drafts: dict[str, Transformer] = field(default_factory=dict)
    heads: dict[str, EagleHead] = field(default_factory=dict)

    def head(self, path: str) -> EagleHead:
        """An EAGLE-3 head for the model, on its device. Raises TidarError for any other folder."""
        if path not in self.heads:
            weight = self.model.embed.weight
            self.heads[path] = load_eagle_head(
                path, self.model.config, device=weight.device, dtype=weight.dtype
            )
        return self.heads[path]

    def draft_model(self, path: str) -> Transformer:
        """A checkpoint with the model's vocabulary, on its device. Raises TidarError for any other."""
        if path not in self.drafts:
            weight = self.model.embed.weight
            loaded = load_checkpoint(path, device=weight.device, dtype=weight.dtype)
            need_causal(loaded.config, f"A draft model ({path})")
            warn_of_causal_reading(loaded)
            if self.tokenizer is not None and Tokenizer.is_in(loaded.folder):
                check_same_tokens(self.tokenizer, Tokenizer.load(loaded.folder), path)
            elif loaded.config.vocab_size != self.model.config.vocab_size:
                raise TidarError(
                    f"The draft model {path} has {loaded.config.vocab_size} tokens and the model "
                    f"{self.model.config.vocab_size}; without both tokenizers these must be equal."
                )
            self.drafts[path] = loaded.model
        return self.drafts[path]


def warn_of_causal_reading(checkpoint: Checkpoint) -> None:
    """Warns where weights are about to be read causally that no causal loss has trained: those of block diffusion."""
    if checkpoint.meta is not None and checkpoint.meta.objective == "block-diffusion":
        warnings.warn(
            f"{checkpoint.source} was trained for block diffusion, with no causal loss: read causally, as here, it "
            f"may write poorly; its own method is {default_method(checkpoint.config, checkpoint.meta)}",
            stacklevel=4,
        )


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


@dataclass(frozen=True, slots=True)
class EagleRival:
    """`eagle:PATH:K`: the EAGLE-3 head at PATH drafts a chain of K tokens; `:tree` a tree of that depth."""

    path: str
    tree: Tree
    exact: ClassVar[bool] = True
    needs_mask: ClassVar[bool] = False

    def method(self, target: Target, max_batch: int) -> Eagle:
        return Eagle(DraftHead(target.head(self.path), target.model, max_batch), self.tree)


def _mask_of(target: Target) -> int:
    mask = target.model.config.mask_token_id
    assert mask is not None  # whoever makes an engine has checked
    return mask


@dataclass(frozen=True, slots=True)
class BlockDiffusionRival:
    """`block-diffusion:K:THRESHOLD`, then `causal` or `full`, if not as trained; see `BlockDiffusion`.

    quota: of `block-diffusion:K:best2` or `:left2`; the threshold is then not looked at.
    """

    threshold: float
    attention: SpanAttention | None = None
    quota: Quota | None = None
    exact: ClassVar[bool] = False
    needs_mask: ClassVar[bool] = True

    def method(self, target: Target, max_batch: int) -> BlockDiffusion:
        attention = self.attention or target.model.config.span_attention
        return BlockDiffusion(_mask_of(target), self.threshold, attention, self.quota)


@dataclass(frozen=True, slots=True)
class MaskedDiffusionRival:
    """`masked-diffusion:SPAN:STEPS`, then an order, then `shift`; see `MaskedDiffusion`.

    order: None is the one that the checkpoint's kind is decoded with: by entropy where labels are shifted, as in
    Dream's README, else LLaDA's. shift: so in any case, or where the checkpoint was trained so.
    """

    steps: int
    order: Order | None = None
    shift: bool = False
    exact: ClassVar[bool] = False
    needs_mask: ClassVar[bool] = True

    def method(self, target: Target, max_batch: int) -> MaskedDiffusion:
        shift = self.shifts(target.model.config)
        order = self.order or ("entropy" if target.model.config.label_shift else ORDERS[0])
        return MaskedDiffusion(_mask_of(target), self.steps, order, shift)

    def shifts(self, config: ModelConfig) -> bool:
        """Whether the row before a position predicts it."""
        return self.shift or config.label_shift


def parse_rival(text: str) -> tuple[str, Schedule, Rival] | None:
    """Name, schedule and method of one of these; None for what is none of them. Raises TidarError if it is wrong."""
    name, *rest = text.strip().split(":")
    parsers = {
        "speculative": _parse_speculative,
        "eagle": _parse_eagle,
        "block-diffusion": _parse_block_diffusion,
        "masked-diffusion": _parse_masked_diffusion,
    }
    return parsers[name](text, rest) if name in parsers else None


def default_method(config: ModelConfig, meta: TidarMeta | None) -> str:
    """What decodes a checkpoint where no method is named: what it was trained for.

    With bidirectional attention one pass a token: spans of 32 from left to right as in LLaDA's generate.py; the
    whole text at once as in Dream's README. Block diffusion at the longest trained K and Fast-dLLM's threshold.
    """
    if config.attention == "bidirectional":
        return "masked-diffusion:512:512" if config.label_shift else "masked-diffusion:32:32"
    if meta is not None and meta.objective == "block-diffusion":
        return f"block-diffusion:{max(meta.draft_lens)}:0.9"
    return "ar" if meta is None else "tidar"


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


MAX_TREE_DEPTH = 12
"""Of the default tree, which then has 376 draft tokens."""


def _parse_eagle(text: str, rest: list[str]) -> tuple[str, Schedule, Rival]:
    branches = rest[1:] != [] and rest[-1] == "tree"
    *parts, count = rest[: len(rest) - branches] or [""]
    path = ":".join(parts)
    if not path:
        raise TidarError(
            f"method {text!r} is not understood: give eagle:PATH:K, the head's folder or hub id and how many "
            "tokens it drafts, such as eagle:path/to/head:4, and :tree for a tree of that depth."
        )
    depth = _number(count, text)
    if branches and depth > MAX_TREE_DEPTH:
        raise TidarError(
            f"method {text!r}: a tree may be up to {MAX_TREE_DEPTH} deep, not {depth}."
        )
    tree = spread(depth) if branches else chain(depth)
    name = f"eagle:{path}:{depth}" + (":tree" if branches else "")
    return name, Schedule(depth + 1, ()), EagleRival(path, tree)


def _parse_block_diffusion(text: str, rest: list[str]) -> tuple[str, Schedule, Rival]:
    said: dict[str, SpanAttention | None] = {"": None, ":full": "full", ":causal": "causal"}
    end = "".join(f":{part}" for part in rest[2:])
    if len(rest) < 2 or end not in said:
        raise TidarError(
            f"method {text!r} is not understood: give block-diffusion:K:THRESHOLD, such as "
            "block-diffusion:16:0.9, then :full (clean rows see their whole span) or :causal if not the checkpoint's. "
            "For THRESHOLD best2 or left2: that many rows a pass, the most confident or the leftmost."
        )
    size = _number(rest[0], text)
    for order in get_args(QuotaOrder):
        if rest[1].startswith(order):
            quota = Quota(_number(rest[1].removeprefix(order), text), order)
            name = f"block-diffusion:{size}:{order}{quota.count}{end}"
            return name, Schedule(size, (1,)), BlockDiffusionRival(1.0, said[end], quota)
    try:
        threshold = float(rest[1])
    except ValueError:
        threshold = -1.0
    if not 0.0 <= threshold <= 1.0:
        raise TidarError(f"method {text!r}: {rest[1]!r} is not a confidence from 0 to 1.")
    name = f"block-diffusion:{size}:{threshold:g}{end}"
    return name, Schedule(size, (1,)), BlockDiffusionRival(threshold, said[end])


def _parse_masked_diffusion(text: str, rest: list[str]) -> tuple[str, Schedule, Rival]:
    shift = rest[2:] != [] and rest[-1] == "shift"
    said = rest[2 : len(rest) - shift]
    order = next((each for each in ORDERS if [each] == said), None)
    if len(rest) < 2 or (said and order is None):
        raise TidarError(
            f"method {text!r} is not understood: give masked-diffusion:SPAN:STEPS, such as "
            f"masked-diffusion:32:16, then an order ({', '.join(ORDERS)}) if not the checkpoint's, then shift if "
            "the row before a position predicts it."
        )
    size, steps = _number(rest[0], text), _number(rest[1], text)
    if steps > size:
        raise TidarError(f"method {text!r}: {steps} passes over a span of {size} are too many.")
    name = f"masked-diffusion:{size}:{steps}" + "".join(f":{part}" for part in rest[2:])
    return name, Schedule(size, (1,)), MaskedDiffusionRival(steps, order, shift)
