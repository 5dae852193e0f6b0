"""The sampler behind `tidar train --self-data`: texts drawn from the base model at temperature 1."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from tqdm.auto import tqdm

from tidar.api import pick_device, pick_dtype
from tidar.decode.sample import sample_streams
from tidar.errors import TidarError
from tidar.mask_token import prepare_mask_token
from tidar.tokens import Tokenizer
from tidar.weights import load_checkpoint


class BaseSampler:
    """A `Sampler` of `tidar.training.self_data`, with a progress bar; loads the base on first use.

    values: the training options, of which base, seed, seq_len and use_cpu matter. stream: keeps corpora
    of one run apart. Raises TidarError for a base that has no token to begin a text with.
    """

    def __init__(self, values: Mapping[str, Any], stream: int, count: int, name: str) -> None:
        self.values, self.stream = values, stream
        self.bar = tqdm(total=count, desc=f"sampling {name}", unit=" texts", disable=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()

    def _load(self) -> None:
        device = pick_device("cpu" if self.values.get("use_cpu") else "auto")
        base = str(self.values["base"])
        loaded = load_checkpoint(base, device=device, dtype=pick_dtype("auto", device))
        tokens = Tokenizer.load(loaded.folder)
        # What a text begins with: the start token, or, where there is none, the end of the one before.
        self.start = tuple(tokens.encode("")) or tuple(sorted(tokens.eos_ids))[:1]
        if not self.start:
            raise TidarError(
                f"{base} has neither a start token nor an end-of-text token, so there is nothing to "
                "begin a text with; give --data instead of --self-data."
            )
        # The row that becomes the mask token must not be drawn: training refuses texts that hold it.
        prepare_mask_token(loaded.model, loaded.raw_config, tokens)
        self.model = loaded.model
        wanted = int(self.values.get("seq_len") or 1024)
        self.length = min(wanted, loaded.config.max_positions)

    def __call__(self, first: int, number: int) -> list[list[int]]:
        """Texts `first` to `first + number - 1`, as token ids."""
        if not hasattr(self, "model"):
            self._load()
        self.bar.update(first - self.bar.n)
        seed = int(self.values.get("seed", 42)) * 2_000_003 + self.stream * 1_000_003 + first
        texts = sample_streams(self.model, self.start, count=number, length=self.length, seed=seed)
        self.bar.update(number)
        return texts
