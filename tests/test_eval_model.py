"""The model that `tidar eval` gives the harness says what the harness's own `hf` model says."""

import gzip
import json
from typing import Any

import pytest
import torch
from command import make_world
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from models import BUNDLED, ROOT, STORIES

import tidar as package
from tidar.decode.spec import parse_method
from tidar.errors import TidarError
from tidar.evaluation.harness import TidarLM, engine_options, text_seed

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*decodes as AR only"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

DATA = ROOT.parent / "shared" / "data"

QUESTIONS = (
    "Anna has 12 apples and buys 5 more. How many has she now?",
    "A train takes 3 hours for 240 miles. How fast is it?",
    "Tom reads 20 pages a day for 2 weeks. How many pages are that?",
)


def questions() -> list[str]:
    """GSM8K's first ones where there is a copy beside the repository, else a few like them."""
    path = DATA / "gsm8k" / "test.jsonl.gz"
    if not path.is_file():
        return list(QUESTIONS)
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["question"] for _, line in zip(range(3), lines, strict=False)]


def ask(kind: str, *arguments: object) -> Any:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


# --- against the harness's own model ---


class Unmasked(HFLM):  # type: ignore[misc]
    """`hf` without the mask token, which has no probability in any reading of ours."""

    def _model_call(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits: torch.Tensor = super()._model_call(*args, **kwargs)
        mask = self.config.tidar["mask_token_id"]
        logits[..., mask] = -torch.inf
        return logits


@pytest.fixture(scope="module", params=["bundled", "stories260k", "random"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TidarLM, Any]:  # fmt: skip
    """Our model in AR mode and the harness's, on one folder; a Llama and a Qwen3 without a mask token among them."""
    folder, theirs = BUNDLED, Unmasked
    if request.param != "bundled":
        folder, theirs = STORIES, HFLM
    if request.param == "random":
        home = tmp_path_factory.mktemp("eval")
        make_world(home)
        folder = home / "base"
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} is not there")
    ours = TidarLM(str(folder), "ar", batch_size=3, device="cpu", dtype="float32")
    return ours, theirs(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)


def test_likelihoods_are_those_of_hf(both: tuple[TidarLM, Any]) -> None:
    ours, theirs = both
    pairs = [(q + "\nAnswer:", " It is 17 or so.") for q in questions()]
    pairs += [("", "Once upon a time"), ("one two ", "three"), ("one", " two"), ("one", " four")]
    requests = [ask("loglikelihood", *pair) for pair in pairs]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for mine, right in zip(ours.loglikelihood(requests), expected, strict=True):
        assert mine[0] == pytest.approx(right[0], abs=1e-4)
        assert mine[1] == right[1]


def test_rolling_likelihoods_are_those_of_hf(both: tuple[TidarLM, Any]) -> None:
    ours, theirs = both
    long = " ".join(questions()) * 5  # several windows
    requests = [ask("loglikelihood_rolling", text) for text in (*questions(), long, "a")]
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    found = ours.loglikelihood_rolling(requests)
    for text, mine, right in zip(requests, found, expected, strict=True):
        tokens = len(ours.tok_encode(text.args[0]))
        # hf adds up float32 numbers in thousands; a token's share stays far below 1e-4.
        assert mine == pytest.approx(right, abs=max(1e-4, 1e-6 * tokens))
    assert ours.scored.requests >= len(requests)


def test_generations_are_those_of_hf(both: tuple[TidarLM, Any]) -> None:
    ours, theirs = both
    settings = {"until": ["Question:", "."], "max_gen_toks": 24, "do_sample": False}
    requests = [ask("generate_until", f"Question: {q}\nAnswer:", settings) for q in questions()]
    other = {"until": ["\n\n", "e e"], "max_gen_toks": 30}
    requests += [
        ask("generate_until", text, other) for text in ("Once upon a time", "def fib(n):\n")
    ]
    requests.append(ask("generate_until", "too long " * 900, settings))  # loses its beginning
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


def test_what_the_mask_token_takes_from_plain_readers() -> None:
    """`hf` alone gives the mask token a little probability: our likelihoods are above its by just that."""
    ours = TidarLM(None, "ar", device="cpu", dtype="float32")
    theirs = HFLM(pretrained=str(BUNDLED), device="cpu", dtype="float32", batch_size=1)
    requests = [ask("loglikelihood", "one two", " three four five")]
    mine, plain = ours.loglikelihood(requests)[0][0], theirs.loglikelihood(requests)[0][0]
    assert 0.0 <= mine - plain < 1e-3
    ids = ours.tok_encode("one two three four five")
    count = len(ids) - len(ours.tok_encode("one two"))
    with torch.inference_mode():
        mass = theirs.model(torch.tensor([ids[:-1]])).logits[0, -count:].softmax(-1)[:, 1]
    assert mine - plain == pytest.approx(-float(torch.log1p(-mass).sum()), abs=2e-5)


# --- the model of the harness ---


@pytest.fixture(scope="module")
def bundled() -> package.LanguageModel:
    return package.load(device="cpu", dtype="float32")


def test_every_method_generates_the_same(bundled: package.LanguageModel) -> None:
    requests = [ask("generate_until", q, {"max_gen_toks": 20}) for q in ("def f(x):", "Compute 3 + 4.\n")]  # fmt: skip
    for temperature in (None, 0.9):
        texts = {}
        for method in ("ar", "tidar:8:1,2,4", "tidar:4", "tidar:8:two-forward"):
            lm = TidarLM(bundled, method, temperature=temperature, seed=5)
            texts[method] = lm.generate_until(requests * 2)
            steps, tokens = lm.generated.decode_steps, lm.generated.decode_tokens
            assert lm.generated.requests == 4
            assert (method == "ar") == (steps == tokens)
            told = lm.generated.to_json()
            assert sum(told["finish"].values()) == 4
            assert sum(told["accept_histogram"].values()) == steps
        assert all(text == texts["ar"] for text in texts.values())
        again = texts["ar"][:2] == texts["ar"][2:]  # repeats of a prompt
        assert again == (temperature is None)


def test_seeds_belong_to_texts(bundled: package.LanguageModel) -> None:
    """Sampled text does not depend on the other requests, on their order, or on the batch."""
    first, second = (
        ask("generate_until", prompt, {"max_gen_toks": 12}) for prompt in ("def f(x):", "import ")
    )
    one = TidarLM(bundled, "ar", temperature=1.0).generate_until([first, second])
    other = TidarLM(bundled, "ar", temperature=1.0, batch_size=1).generate_until([second, first])
    assert one == other[::-1]
    assert TidarLM(bundled, "ar", temperature=1.0, seed=1).generate_until([first, second]) != one
    assert len({text_seed(s, c, r) for s in (0, 1) for c in "ab" for r in (0, 1)}) == 8
    assert 0 <= text_seed(0, "x", 0) < 2**63


def test_options_of_tasks(bundled: package.LanguageModel) -> None:
    lm = TidarLM(bundled, "ar")
    options = lm._options({"until": "X", "do_sample": True, "temperature": 0.5, "top_p": 0.9,
                           "num_beams": 1})  # fmt: skip
    assert (options.temperature, options.top_p, options.max_new_tokens) == (0.5, 0.9, 256)
    assert options.until == ("X", "<|endoftext|>")
    assert lm._options({"do_sample": False, "temperature": 0.7}).temperature == 0.0
    assert TidarLM(bundled, temperature=0.3)._options({"do_sample": False}).temperature == 0.3
    with pytest.raises(TidarError, match="num_beams"):
        lm._options({"num_beams": 4})
    with pytest.raises(TidarError, match=r"1024 positions.*--max-gen-toks"):
        lm._options({"max_gen_toks": 1024})
    for wrong in ("many", -1):
        with pytest.raises(TidarError, match="batch_size"):
            TidarLM(bundled, batch_size=wrong)
    assert engine_options(parse_method("tidar:two-forward")) == {
        "method": "tidar", "draft_len": 16, "span_set": "two-forward",
    }  # fmt: skip


def test_registered_by_name() -> None:
    from lm_eval.api.registry import get_model

    made = get_model("tidar").create_from_arg_string(
        f"pretrained={BUNDLED},method=ar,dtype=float32", {"batch_size": 2, "device": "cpu"}
    )
    assert isinstance(made, TidarLM)
    assert (made.spec.name, made.batch) == ("ar", 2)


def test_chat_template(bundled: package.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = TidarLM(bundled, "ar")
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "I"}]
    with pytest.raises(TidarError, match="no chat template"):
        lm.apply_chat_template(talk)
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    monkeypatch.setattr(bundled.tokenizer.backend, "chat_template", template)
    assert lm.apply_chat_template(talk[:1]) == "[user]hello[assistant]"
    assert lm.apply_chat_template(talk, add_generation_prompt=False) == "[user]hello[assistant]I"
    monkeypatch.setattr(
        bundled.tokenizer.backend, "chat_template", "{{ raise_exception('no system') }}"
    )
    with pytest.raises(TidarError, match="refuses these messages: no system"):
        lm.apply_chat_template(talk)
