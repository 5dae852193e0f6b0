"""TiDAR as a model of lm-evaluation-harness: `lm_eval.simple_evaluate(model=TidarLM(...))`, or by the name `tidar`.

Likelihoods are the causal model's (`likelihood.py`), which all methods decode but the two diffusions; those have a
bound of their own (`bound.py`). Texts come from the engine, by any method. Tokenising, truncation and the cutting of
texts at stop strings follow the harness's own `hf` model.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tidar.api import EngineName, LanguageModel, load
from tidar.decode.request import tokens_per_forward
from tidar.decode.spec import MethodSpec, parse_method
from tidar.errors import TidarError
from tidar.evaluation.bound import SAMPLES, score_bound
from tidar.evaluation.likelihood import Pair, Score, Work, score
from tidar.evaluation.readings import reading_of
from tidar.sampling import SamplingParams

DEFAULT_NEW_TOKENS = 256
"""Of a task that says nothing, as the harness's `hf` model has it."""

UNDERSTOOD = ("do_sample", "temperature", "top_p", "top_k")
"""Generation options of tasks that the engine has; `until` and `max_gen_toks` are read before."""

IDLE = {"num_beams": 1, "repetition_penalty": 1.0, "n": 1, "max_length": None}
"""Options that change nothing at these values."""


class Progress(Protocol):
    """Who is told how far a run of requests is."""

    def begin(self, what: str, total: int) -> None:
        """`total` requests of a kind follow."""
        ...

    def advance(self, count: int) -> None:
        """So many more are answered."""
        ...


class Silent:
    """Nobody is told."""

    def begin(self, what: str, total: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Text:
    """A generated text: what it was asked for, its tokens, and the text that is scored."""

    context: str
    ids: tuple[int, ...]
    text: str


@dataclass(slots=True)
class Generated:
    """Mutable: what generation took. seconds: wall clock over all of it, prompts included."""

    requests: int = 0
    truncated: int = 0
    tokens: int = 0
    decode_tokens: int = 0
    decode_steps: int = 0
    seconds: float = 0.0
    finish: Counter[str] = field(default_factory=Counter)
    accepts: Counter[int] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "prompts_truncated": self.truncated,
            "tokens": self.tokens,
            "decode_tokens": self.decode_tokens,
            "decode_steps": self.decode_steps,
            "tokens_per_forward": tokens_per_forward(self.decode_tokens, self.decode_steps),
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds if self.seconds else None,
            "finish": dict(self.finish),
            "accept_histogram": {str(n): count for n, count in sorted(self.accepts.items())},
        }


@dataclass(slots=True)
class Scored:
    """Mutable: what likelihoods took. mc_samples: of each text's bound; None where they are exact."""

    mc_samples: int | None = None
    requests: int = 0
    seconds: float = 0.0
    work: Work = field(default_factory=Work)

    def to_json(self) -> dict[str, Any]:
        kind = {"is_bound": self.mc_samples is not None, "mc_samples": self.mc_samples}
        return {**kind, "requests": self.requests, "seconds": self.seconds, **asdict(self.work)}


@dataclass(frozen=True, slots=True)
class _Options:
    """How a group of texts is generated."""

    max_new_tokens: int
    until: tuple[str, ...]
    temperature: float
    top_p: float
    top_k: int


def engine_options(spec: MethodSpec) -> dict[str, Any]:
    """A method's name as options of `LanguageModel.stream_batch`."""
    if spec.rival is not None:
        return {"method": spec.name}
    if spec.is_ar:
        return {"method": "ar"}
    if spec.schedule is None:
        return {"method": "tidar", "span_set": "plan"}
    _, draft_len, span_set = spec.name.split(":")
    return {"method": "tidar", "draft_len": int(draft_len), "span_set": span_set}


def default_spec(model: LanguageModel) -> str:
    """The method that a checkpoint is evaluated by where none is named."""
    return "tidar:plan" if model.default_method == "tidar" else model.default_method


def check_method(model: LanguageModel, spec: MethodSpec, engine: EngineName) -> None:
    """Raises TidarError for a method that this checkpoint or this engine cannot run."""
    if model.rival(spec.name if spec.rival else "ar", engine) is None:
        model.plan_spec(**engine_options(spec))
    else:
        spec.engine(model.network, target=model.target)


def _at_least_one(name: str, value: int | str) -> int:
    """Options come as text from the harness's own command line."""
    try:
        number = int(value)
    except ValueError:
        raise TidarError(f"{name} is {value!r}; it must be a whole number.") from None
    if number < 1:
        raise TidarError(f"{name} is {number}; it must be at least 1.")
    return number


def text_seed(seed: int, context: str, repeat: int) -> int:
    """The seed of one text: its own for each prompt and repeat, the same for every method, order and batch."""
    digest = hashlib.blake2b(f"{seed} {repeat} {context}".encode(), digest_size=7).digest()
    return int.from_bytes(digest)


@register_model("tidar")
class TidarLM(TemplateLM):  # type: ignore[misc]  # lm-eval is not typed
    """Mutable: `generated`, `scored` and `texts` grow until `start` empties them.

    pretrained: a model that is loaded, or its folder or hub id; None is the bundled checkpoint. method: as in
    `tidar bench`; by default the best that the checkpoint can. batch_size: texts at a time. temperature, seed: instead
    of the task's own temperature; of all that is drawn. mc_samples: of each text, for a diffusion method's
    likelihoods. progress: told of requests. Raises TidarError for what cannot be loaded or asked for.
    """

    def __init__(
        self,
        pretrained: LanguageModel | str | None = None,
        method: str | None = None,
        *,
        batch_size: int | str | None = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        engine: EngineName = "auto",
        temperature: float | None = None,
        seed: int = 0,
        mc_samples: int | str = SAMPLES,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(pretrained, LanguageModel):
            pretrained = load(pretrained, device=device or "auto", dtype=dtype)
        self.model = pretrained
        self.network, self._tokens = pretrained.network, pretrained.tokenizer
        self.tokenizer = pretrained.tokenizer.backend
        self.spec = parse_method(method or default_spec(pretrained))
        self._how = engine_options(self.spec)
        check_method(pretrained, self.spec, engine)  # says at once what this checkpoint cannot do
        self.reading = reading_of(self.spec, self.network.config)
        self.batch = _at_least_one("batch_size", batch_size or 8)
        self.mc_samples = _at_least_one("mc_samples", mc_samples)
        SamplingParams(seed=seed, temperature=temperature or 0.0)  # refuses impossible ones
        self.engine, self.temperature, self.seed = engine, temperature, seed
        self.progress = progress or Silent()
        self._device = self.network.embed.weight.device
        self.start()

    def start(self) -> None:
        """Begins new counts."""
        self.generated = Generated()
        self.scored = Scored(self.mc_samples if self.reading else None)
        self.texts: list[Text] = []

    # --- what the harness asks of a model with a tokenizer ---

    @property
    def max_length(self) -> int:
        return self.network.config.max_positions

    @property
    def eot_token_id(self) -> int:
        own: int | None = self.tokenizer.eos_token_id
        token = own if own is not None else min(self._tokens.eos_ids, default=None)
        if token is None:
            raise TidarError(
                "this tokenizer has no end-of-text token, which lm-eval needs for empty contexts"
            )
        return token

    @property
    def prefix_token_id(self) -> int:
        start: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Ids of a text; a text that begins with the start token gets no second one."""
        prefix = self.tokenizer.decode([self.prefix_token_id])
        special = (
            not string.startswith(prefix) if add_special_tokens is None else add_special_tokens
        )
        return self._tokens.encode(string, special=special)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self._tokens.chat_text(chat_history, answer=add_generation_prompt)

    # --- likelihood ---

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]],
        **_: object,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return [(each.logprob, each.greedy) for each in self._score(pairs, greedy=True)]

    @property
    def likelihood(self) -> str:
        """Whose likelihoods these are: equal for methods that would give the same ones."""
        return f"{self.reading.name}, bound" if self.reading else "likelihood"

    def _score(self, pairs: Sequence[Pair], *, greedy: bool) -> list[Score]:
        """Log-probabilities of continuations; greedy: whether they are what decoding would write matters."""
        self.progress.begin(self.likelihood, len(pairs))
        began = time.perf_counter()
        common: dict[str, Any] = {
            "batch": self.batch, "work": self.scored.work, "on_done": self.progress.advance,
        }  # fmt: skip
        if self.reading is None:
            scores = score(self.network, pairs, **common)
        else:
            scores = score_bound(
                self.network, self.reading, pairs,
                samples=self.mc_samples, seed=self.seed, greedy=greedy, **common,
            )  # fmt: skip
        self.scored.seconds += time.perf_counter() - began
        self.scored.requests += len(pairs)
        return scores

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        windows = [
            (index, *make_disjoint_window(window))
            for index, request in enumerate(requests)
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                # A causal pass never reads the last token; a row of a diffusion's holds every one.
                max_seq_len=self.max_length - (self.reading is not None),
                context_len=1,
            )
        ]
        sums = [0.0] * len(requests)
        found = self._score([(context, tokens) for _, context, tokens in windows], greedy=False)
        for (index, *_), each in zip(windows, found, strict=True):
            sums[index] += each.logprob
        self.scored.requests += len(requests) - len(windows)
        return sums

    # --- generation ---

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        self.progress.begin(self.spec.name, len(requests))
        asked: dict[_Options, list[int]] = {}
        for index, request in enumerate(requests):
            asked.setdefault(self._options(request.args[1]), []).append(index)
        seen: Counter[str] = Counter()
        seeds = []
        for request in requests:
            context = request.args[0]
            seeds.append(text_seed(self.seed, context, seen[context]))
            seen[context] += 1
        answers: dict[int, Text] = {}
        for options, members in asked.items():
            contexts = [requests[i].args[0] for i in members]
            texts = self._generate(contexts, options, [seeds[i] for i in members])
            answers |= dict(zip(members, texts, strict=True))
        self.texts += [answers[i] for i in range(len(requests))]
        return [answers[i].text for i in range(len(requests))]

    def _options(self, asked: dict[str, Any]) -> _Options:
        """What a task asks for, with the settings that stand above it. Raises TidarError for what is not known."""
        values = normalize_gen_kwargs(asked, DEFAULT_NEW_TOKENS)
        eos = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        until = tuple(filter(None, handle_stop_sequences(values.pop("until", None), eos=eos)))
        room, new = self.max_length, values.pop("max_gen_toks")
        if not 1 <= new < room:
            raise TidarError(
                f"the task asks for up to {new} new tokens, and the model has {room} positions for prompt and answer; "
                "ask for fewer (--max-gen-toks)."
            )
        unknown = {
            name: value
            for name, value in values.items()
            if name not in UNDERSTOOD and (name not in IDLE or value != IDLE[name])
        }
        if unknown:
            raise TidarError(f"generation options that tidar does not have: {unknown}")
        temperature = values.get("temperature", 0.0) if values.get("do_sample") else 0.0
        if self.temperature is not None:
            temperature = self.temperature
        return _Options(
            new, until, temperature, values.get("top_p", 1.0), int(values.get("top_k", 0))
        )

    def _generate(
        self, contexts: Sequence[str], options: _Options, seeds: Sequence[int]
    ) -> list[Text]:
        """Texts for contexts, in order; longest prompts first, as those take longest."""
        limit = self.max_length - options.max_new_tokens
        prompts = [self.tok_encode(context) for context in contexts]
        self.generated.truncated += sum(len(ids) > limit for ids in prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        ids: list[list[int]] = [[] for _ in prompts]
        began = time.perf_counter()
        for place, event in self.model.stream_batch(
            [prompts[i][-limit:] for i in order],
            seeds=[seeds[i] for i in order],
            engine=self.engine,
            max_batch=self.batch,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            stop=options.until,
            **self._how,
        ):
            ids[order[place]] += event.ids
            if not event.prefill:
                self.generated.decode_steps += 1
                self.generated.decode_tokens += len(event.ids)
                self.generated.accepts[event.accepted] += 1
            if event.finish is not None:
                self.generated.finish[event.finish] += 1
                self.progress.advance(1)
        self.generated.seconds += time.perf_counter() - began
        self.generated.requests += len(contexts)
        self.generated.tokens += sum(map(len, ids))
        return [
            Text(context, tuple(each), self._cut(each, options))
            for context, each in zip(contexts, ids, strict=True)
        ]

    def _cut(self, ids: Sequence[int], options: _Options) -> str:
        """The text of new tokens up to the first stop string, decoded alone as the harness does it."""
        text: str = postprocess_generated_text(
            self._tokens.decode(ids), list(options.until), think_end_token=None
        )
        return text
