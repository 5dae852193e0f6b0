"""The sampler behind `tidar train --self-data`: texts drawn from the base model at temperature 1."""

from types import TracebackType
from typing import Any, Self

from tqdm.auto import tqdm

from tidar.api import pick_device, pick_dtype
from tidar.decode.sample import sample_streams
from tidar.errors import TidarError
from tidar.families import need_causal
from tidar.hf_config import find_folder, read_config, read_json
from tidar.mask_token import prepare_mask_token
from tidar.tokens import Tokenizer
from tidar.training.config import TrainConfig, parse_argument
from tidar.training.self_data import folder_hash
from tidar.weights import load_checkpoint

TEMPERATURE = 1.0
"""The base's own distribution, so that training on the texts does not move the model away from it."""


class BaseSampler:
    """A `Sampler` of `tidar.training.self_data`, with a progress bar; loads the base on first use.

    config: the run, of which base, seed, seq_len and use_cpu matter. stream: keeps corpora of one run
    apart. Raises TidarError for a base that has no token to begin a text with.
    """

    def __init__(self, config: TrainConfig, stream: int, count: int, name: str) -> None:
        assert config.base is not None
        self.base, self.stream, self.count = config.base, stream, count
        self.seed = int(self._argument(config, "seed", 42))
        self.use_cpu = bool(self._argument(config, "use_cpu", False))
        self.folder = find_folder(self.base)
        self.tokens = Tokenizer.load(self.folder)
        # What a text begins with: the start token, or, where there is none, the end of the one before.
        self.start = tuple(self.tokens.encode("")) or tuple(sorted(self.tokens.eos_ids))[:1]
        if not self.start:
            raise TidarError(
                f"{self.base} has neither a start token nor an end-of-text token, so there is nothing "
                "to begin a text with; give --data instead of --self-data."
            )
        network, _ = read_config(read_json(self.folder / "config.json"), {})
        need_causal(network, "Sampling from the base (--self-data)")
        self.length = min(config.seq_len, network.max_positions)
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

    @staticmethod
    def _argument(config: TrainConfig, name: str, default: Any) -> Any:
        """A `TrainingArguments` field as training will read it."""
        return parse_argument(name, config.arguments.get(name, default))

    def origin(self) -> dict[str, Any]:
        """What decides the texts, for `claim_corpus`; the weights are not loaded for it."""
        return {
            "base": folder_hash(self.folder),
            "seed": self.seed,
            "stream": self.stream,
            "seq_len": self.length,
            "start ids": list(self.start),
            "temperature": TEMPERATURE,
            "count": self.count,
        }

    def _load(self) -> None:
        device = pick_device("cpu" if self.use_cpu else "auto")
        loaded = load_checkpoint(self.base, device=device, dtype=pick_dtype("auto", device))
        # The row that becomes the mask token must not be drawn: training refuses texts that hold it.
        prepare_mask_token(loaded.model, loaded.raw_config, self.tokens)
        self.model = loaded.model

    def __call__(self, first: int, number: int) -> list[list[int]]:
        """Texts `first` to `first + number - 1`, as token ids."""
        if not hasattr(self, "model"):
            self._load()
        self.bar.update(first - self.bar.n)
        texts = sample_streams(
            self.model,
            self.start,
            count=number,
            length=self.length,
            seed=self.seed * 2_000_003 + self.stream * 1_000_003 + first,
            temperature=TEMPERATURE,
        )
        self.bar.update(number)
        return texts
