"""What `tidar train` measures at intervals: tokens per forward, by the decoder that users will run."""

from itertools import islice, product
from typing import TYPE_CHECKING, Any

from tidar.bench.repetition import mean_distinct
from tidar.decode.engine import Engine, FixedPlan
from tidar.decode.request import Request, tokens_per_forward
from tidar.decode.rivals import EagleRival, Target, parse_rival
from tidar.layout import Schedule, dense_schedule
from tidar.methods import Method
from tidar.methods.tidar import Tidar
from tidar.sampling import SamplingParams
from tidar.training.sources import documents
from tidar.training.start import make_encoding

if TYPE_CHECKING:
    from pathlib import Path

    from tidar.model import Transformer
    from tidar.training.config import TrainConfig
    from tidar.training.objective import TrainingModel

TEMPERATURES = (0.0, 1.0)


def methods_of(config: "TrainConfig") -> list[str]:
    """Methods that what this run makes is for, as `tidar generate --method` takes them; none for "ar".

    Block diffusion at the threshold of Fast-dLLM, masked diffusion at two tokens a pass.
    """
    if config.objective == "tidar":
        return [f"tidar:{draft_len}" for draft_len in config.draft_lens]
    if config.objective == "block-diffusion":
        full = ":full" if config.span_attention == "full" else ""
        return [f"block-diffusion:{draft_len}:0.9{full}" for draft_len in config.draft_lens]
    if config.objective == "masked-diffusion":
        return ["masked-diffusion:32:16" + (":entropy:shift" if config.label_shift else "")]
    if config.objective == "eagle":
        return [f"eagle:{config.out.expanduser().resolve() / 'model'}:{config.ttt_length}"]
    return []


def decoder(name: str, learner: "TrainingModel", batch: int) -> tuple[Schedule, Method[Any]]:
    """The schedule and the method of one of `methods_of`; TiDAR with all spans, and a head as it is in training."""
    net, head = learner.net, learner.draft_head
    if found := parse_rival(name):
        _, schedule, rival = found
        heads = {rival.path: head} if isinstance(rival, EagleRival) and head is not None else {}
        return schedule, rival.method(Target(net, heads=heads), batch)
    assert net.config.mask_token_id is not None
    return dense_schedule(int(name.removeprefix("tidar:"))), Tidar(net.config.mask_token_id)


class IntervalDecoding:
    """Decodes the beginnings of held-out documents; called by the trainer with the network and the step."""

    def __init__(self, config: "TrainConfig", prompts: int, prompt_tokens: int) -> None:
        self.config, self.count, self.prompt_tokens = config, prompts, prompt_tokens
        self._prompts: dict[str, list[tuple[int, ...]]] = {}

    def __call__(self, learner: "TrainingModel", step: int) -> dict[str, float]:
        """Tokens per forward and the distinct-4-gram ratio, for each method that the run trains for.

        The names are `decode/SET/t0/k8/tokens_per_forward`: held-out set, temperature, and K, or another
        method's name, a head's without its folder.
        """
        if not self._prompts:
            self._prompts = {
                name: self._read(learner.net, name) for name, _ in self.config.eval_data
            }
        logs = {}
        for name, prompts in self._prompts.items():
            for temperature, method in product(TEMPERATURES, methods_of(self.config)):
                ratio, distinct = self._decode(learner, prompts, temperature, method)
                short = method.replace("tidar:", "k")
                if method.startswith("eagle:"):
                    short = f"eagle:{self.config.ttt_length}"
                label = f"decode/{name}/t{temperature:g}/{short}"
                logs[f"{label}/tokens_per_forward"] = ratio
                logs[f"{label}/distinct_4"] = distinct
        return logs

    def _read(self, net: "Transformer", name: str) -> list[tuple[int, ...]]:
        """The first tokens of the first long enough documents of a held-out set."""
        config = self.config
        source = dict(config.eval_data)[name]
        encoding = make_encoding(net, self._tokenizer_folder(), config.end_token)
        found = []
        for document in islice(documents(source, config.text_field), 20 * self.count):
            ids = encoding.tokenizer.encode(document).ids if isinstance(document, str) else document
            if len(ids) >= 2 * self.prompt_tokens:
                found.append(tuple(ids[: self.prompt_tokens]))
            if len(found) == self.count:
                break
        return found

    def _tokenizer_folder(self) -> "Path":
        if self.config.tokenizer is not None:
            return self.config.tokenizer.expanduser()
        from tidar.hf_config import find_folder

        assert self.config.base is not None
        return find_folder(self.config.base)

    def _decode(
        self,
        learner: "TrainingModel",
        prompts: list[tuple[int, ...]],
        temperature: float,
        method: str,
    ) -> tuple[float, float]:
        room = min(96, learner.net.config.max_positions - self.prompt_tokens)
        batch = max(1, len(prompts))
        schedule, decoding = decoder(method, learner, batch)
        engine = Engine(learner.net, decoding, FixedPlan(schedule), max_batch=batch)
        texts: list[list[int]] = [[] for _ in prompts]
        decoded = steps = 0
        requests = [
            Request(
                prompt=prompt,
                max_new_tokens=room,
                params=SamplingParams(temperature=temperature, seed=seed),
            )
            for seed, prompt in enumerate(prompts)
        ]
        for event in engine.run(requests):
            texts[event.request_id] += event.ids
            if not event.prefill:
                decoded += len(event.ids)
                steps += 1
        distinct = mean_distinct(texts)
        return tokens_per_forward(decoded, steps) or float("nan"), distinct or float("nan")
