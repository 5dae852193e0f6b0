"""Text streams, stop strings and prompts, with tokenizers made here and with stories260k."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tidar.errors import TidarError
from tidar.tokens import StopMatcher, TextStream, Tokenizer, check_prompt

STORIES = Path(__file__).resolve().parents[2] / "shared" / "base" / "stories260k"
TEXTS = [
    "Once upon a time",
    "naïve café — 日本語 😀👩‍👩‍👧 end",
    "  two  spaces \n\n\ttab ",
    "",
    "�?",
]
MODES = ["byte-level", "byte-fallback"]


def byte_level() -> Tokenizer:
    """A tokenizer of the GPT-2 and Qwen kind: bytes, a space in front belongs to the word."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["Once upon a time there was a naïve café"] * 3, trainer)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"))


def make(mode: str) -> Tokenizer:
    if mode == "byte-level":
        return byte_level()
    if not STORIES.is_dir():
        pytest.skip("needs shared/base/stories260k")
    return Tokenizer.load(STORIES)


@pytest.fixture(scope="module", params=MODES)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return make(request.param)


def streamed(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*(stream.push(token) for token in ids), stream.flush()]


def continuation(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    return tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]


@pytest.mark.parametrize("prompt", TEXTS)
@pytest.mark.parametrize("text", TEXTS)
def test_stream_equals_decode(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    before, ids = tokenizer.encode(prompt), tokenizer.encode(text, special=False)
    pieces = streamed(tokenizer, before, ids)
    assert "".join(pieces) == continuation(tokenizer, before, ids)
    assert streamed(tokenizer, [], ids) == streamed(tokenizer, [], list(ids))
    assert "".join(streamed(tokenizer, [], ids)) == tokenizer.decode(ids)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(MODES), st.text(max_size=12), st.text(max_size=30))
def test_stream_equals_decode_for_any_text(mode: str, prompt: str, text: str) -> None:
    tokenizer = _made(mode)
    before, ids = tokenizer.encode(prompt), tokenizer.encode(text, special=False)
    assert "".join(streamed(tokenizer, before, ids)) == continuation(tokenizer, before, ids)


# Tokens of stories260k: special ones often, and no bytes, which need not be UTF-8.
ANY_TOKEN = st.sampled_from([0, 1, 2]) | st.integers(259, 511)


@settings(max_examples=200, deadline=None)
@given(st.lists(ANY_TOKEN, max_size=20), st.lists(ANY_TOKEN, max_size=20))
def test_stream_equals_decode_for_any_tokens(before: list[int], after: list[int]) -> None:
    tokenizer = _made("byte-fallback")
    assert "".join(streamed(tokenizer, before, after)) == continuation(tokenizer, before, after)


def test_stream_continues_after_special_tokens_only() -> None:
    tokenizer = make("byte-fallback")
    word = tokenizer.encode("there", special=False)
    assert streamed(tokenizer, [*word, *[2] * 20], word) == [" there", ""]
    assert streamed(tokenizer, [2] * 20, [*word, 2, *word]) == ["there", "", " there", ""]


_cache: dict[str, Tokenizer] = {}


def _made(mode: str) -> Tokenizer:
    if mode not in _cache:
        _cache[mode] = make(mode)
    return _cache[mode]


def test_stream_never_shows_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀b日", special=False)
    assert len(ids) > 6
    pieces = streamed(tokenizer, [], ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert {"😀", "日"} <= set("".join(pieces))
    cut = streamed(tokenizer, [], ids[:-1])
    assert "日" not in "".join(cut)
    assert "\ufffd" not in "".join(cut[:-1])
    assert cut[-1].startswith("\ufffd")  # only the end of the stream gives up on the character


def test_stream_continues_a_prompt_that_ends_inside_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x😀 yes", special=False)
    at = next(n for n in range(len(ids)) if tokenizer.decode(ids[:n]).endswith("\ufffd"))
    assert "".join(streamed(tokenizer, ids[:at], ids[at:])) == "😀 yes"


def test_stream_cost_does_not_grow_with_the_text(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, tokenizer.encode("time " * 50))
    for token in tokenizer.encode("there was a time " * 20, special=False):
        stream.push(token)
    assert len(stream._ids) < 12


def test_stories_leading_space() -> None:
    tokenizer = make("byte-fallback")
    prompt = tokenizer.encode("Once upon a time")
    assert prompt[0] == 1
    word = tokenizer.encode("there", special=False)
    assert tokenizer.decode(word) == "there"
    assert "".join(streamed(tokenizer, prompt, word)) == " there"
    assert "".join(streamed(tokenizer, [1], word)) == "there"


def test_stories_attributes() -> None:
    tokenizer = make("byte-fallback")
    assert tokenizer.eos_ids == {1, 2}
    assert tokenizer.special_ids == {0, 1, 2}
    assert (tokenizer.vocab_size, tokenizer.max_id) == (512, 511)
    with pytest.raises(TidarError, match="no chat template"):
        tokenizer.chat_text([{"role": "user", "content": "hi"}])


def test_encode_is_the_tokenizers_own_and_silent_about_length(tokenizer: Tokenizer) -> None:
    text = "Once upon a time " * 200
    assert tokenizer.encode(text) == tokenizer._backend(text)["input_ids"]


def test_chat_template() -> None:
    tokenizer = byte_level()
    tokenizer._backend.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}bot:{% endif %}"
    )
    assert tokenizer.chat_text([{"role": "user", "content": "hi"}]) == "user:hi\nbot:"


def test_eos_comes_from_generation_config_then_config(tmp_path: Path) -> None:
    byte_level()._backend.save_pretrained(tmp_path)
    own = Tokenizer.load(tmp_path).eos_ids
    assert own == {0}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert Tokenizer.load(tmp_path).eos_ids == {0, 5}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 7]}))
    assert Tokenizer.load(tmp_path).eos_ids == {0, 6, 7}
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(TidarError, match=r"generation_config.json: not readable as a JSON object"):
        Tokenizer.load(tmp_path)


def test_load_refuses(tmp_path: Path) -> None:
    with pytest.raises(TidarError, match=r"has no tokenizer \(looked for tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TidarError, match="cannot be opened"):
        Tokenizer.load(tmp_path)


def matched(stops: list[str], pieces: list[str]) -> tuple[str, int | None]:
    """Text shown, and the index of the piece that completed a stop string."""
    matcher, shown = StopMatcher(stops), ""
    for index, piece in enumerate(pieces):
        text, hit = matcher.push(piece)
        shown += text
        assert not any(stop in shown for stop in stops)
        if hit:
            return shown, index
    return shown + matcher.flush(), None


def test_stop_string_across_pieces() -> None:
    assert matched(["\n\nQ:"], ["a", "\n", "\nQ", ": b", "c"]) == ("a", 3)
    assert matched(["\n\nQ:"], ["a", "\n", "\nR", ": b"]) == ("a\n\nR: b", None)
    assert matched(["aab"], list("aaab")) == ("a", 3)
    assert matched(["STOP", "TOP"], ["xSTO", "P"]) == ("x", 1)
    assert matched([], ["a", "b"]) == ("ab", None)


def test_stop_matcher_holds_back_and_releases() -> None:
    matcher = StopMatcher(["END", "EX"])
    assert matcher.push("the E") == ("the ", False)
    assert matcher.push("N") == ("", False)
    assert matcher.push("!") == ("EN!", False)
    assert matcher.push("E") == ("", False)
    assert matcher.push("Xtra") == ("", True)
    assert matcher.matched == "EX"
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("abc", max_size=3), max_size=10),
)
def test_stop_matcher_equals_a_search_at_once(stops: list[str], pieces: list[str]) -> None:
    shown, index = matched(stops, pieces)
    text = "".join(pieces)
    if index is None:
        assert shown == text
        assert not any(stop in text for stop in stops)
    else:
        so_far = "".join(pieces[: index + 1])
        assert shown == so_far[: min(so_far.find(stop) for stop in stops if stop in so_far)]
        assert not any(stop in "".join(pieces[:index]) for stop in stops)


@pytest.mark.parametrize("stops", [[""], ["a", ""], "abc", [1]])
def test_stop_matcher_refuses(stops: list[str]) -> None:
    with pytest.raises(TidarError, match="list of non-empty strings"):
        StopMatcher(stops)


def test_check_prompt() -> None:
    check_prompt([0, 5, 9], vocab_size=10, mask_token_id=3)
    with pytest.raises(TidarError, match="the prompt is empty"):
        check_prompt([], vocab_size=10)
    with pytest.raises(TidarError, match=r"token 1 is the mask token \(3\)"):
        check_prompt([0, 3], vocab_size=10, mask_token_id=3)
    for bad in (-1, 10, True, 1.0):
        with pytest.raises(
            TidarError, match=r"prompt token 1 is .*; allowed: whole numbers 0 to 9"
        ):
            check_prompt([0, bad], vocab_size=10)  # type: ignore[list-item]
