"""Text <-> token ids: a thin wrapper over the checkpoint's own tokenizer, and text as it streams.

A token is not a piece of text: one character may take several tokens, a leading space may belong to
the token before it, a stop string may end inside a token. `TextStream` and `StopMatcher` deal with
that, so that streamed text put together equals the text decoded at once.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from tidar.errors import TidarError

_INCOMPLETE: Final = "\ufffd"  # what decoders write for bytes that are not (yet) a character
_CONTEXT: Final = 8  # prompt tokens that a stream decodes along with the first new one
_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

_STAND_INS: Final = {
    "PreTrainedTokenizerFast": "PreTrainedTokenizerFast",
    # Dream's own class is remote code. It is Qwen2's: NFC, the same pattern and byte-level merges
    # (tokenization_dream.py of Dream-org/Dream-v0-Base-7B), and has no tokenizer.json.
    "DreamTokenizer": "Qwen2TokenizerFast",
}


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    Attributes:
        eos_ids: tokens that end a text: generation_config.json's (config.json's where that has
            none) and the tokenizer's own.
        vocab_size: number of tokens that the tokenizer knows; a model may have more rows.
        max_id: the largest token id that the tokenizer can give.
        special_ids: start, end, padding and unknown token, as far as they exist.
        mask_id: the tokenizer's own mask token; None for most families.
    """

    def __init__(self, backend: Any, eos_ids: Iterable[int] = ()) -> None:
        """Wrap a fast tokenizer of `transformers`."""
        self._backend = backend
        self.vocab: dict[str, int] = backend.get_vocab()
        self.vocab_size = len(backend)
        self.max_id = max(self.vocab.values())
        self.mask_id: int | None = backend.mask_token_id
        own_eos = [] if backend.eos_token_id is None else [backend.eos_token_id]
        self.eos_ids = frozenset([*eos_ids, *own_eos])
        special = (backend.bos_token_id, backend.eos_token_id, backend.pad_token_id,
                   backend.unk_token_id)  # fmt: skip
        self.special_ids = frozenset(i for i in special if i is not None) | self.eos_ids

    @property
    def backend(self) -> Any:
        """The tokenizer of `transformers` itself, for programs that want one."""
        return self._backend

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether the folder has the files of a tokenizer."""
        return any((folder / name).is_file() for name in _FILES)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Open the tokenizer in `folder`; code that comes with a checkpoint is never run.

        Raises:
            TidarError: no tokenizer there, or one that `transformers` cannot open.
        """
        if not cls.is_in(folder):
            raise TidarError(f"{folder} has no tokenizer (looked for {', '.join(_FILES)})")
        import transformers

        name = _stand_in(folder)
        try:
            if name is not None:
                backend = getattr(transformers, name).from_pretrained(str(folder))
            else:
                backend = transformers.AutoTokenizer.from_pretrained(
                    str(folder), trust_remote_code=False
                )
        except Exception as error:  # the tokenizers library raises bare Exception for a bad file
            reason = str(error).strip().split("\n")[0]
            raise TidarError(f"the tokenizer in {folder} cannot be opened: {reason}") from error
        return cls(backend, _eos_ids(folder))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`, with the start token where the tokenizer's own policy adds one.

        Args:
            text: any text; the empty text may give no ids.
            special: False leaves out the tokens that the policy adds (for text that continues).
        """
        encoded = self._backend(text, add_special_tokens=special, verbose=False)
        return list(encoded["input_ids"])

    def chat_text(self, messages: Sequence[Mapping[str, str]], *, answer: bool = True) -> str:
        """A conversation as text by the checkpoint's chat template.

        Args:
            messages: each with `role` and `content`.
            answer: ends with what begins an answer; else the last message is left open, to be continued.

        Raises:
            TidarError: the tokenizer has no chat template, or one that cannot render these messages.
        """
        if not self._backend.chat_template:
            raise TidarError("this tokenizer has no chat template; give a plain prompt instead")
        from jinja2.exceptions import TemplateError

        try:
            return str(
                self._backend.apply_chat_template(
                    list(messages),
                    tokenize=False,
                    add_generation_prompt=answer,
                    continue_final_message=not answer,
                )
            )
        except TemplateError as error:
            raise TidarError(f"the chat template refuses these messages: {error}") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens, spaces left exactly as the tokens have them."""
        # Cleaning up spaces is on in some checkpoints; it would rewrite text already streamed.
        text: str = self._backend.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def stream(self, prompt_ids: Sequence[int] = ()) -> "TextStream":
        """A stream for the text that continues `prompt_ids`."""
        return TextStream(self, prompt_ids)


def _entry(path: Path, key: str) -> Any:
    """An entry of a JSON file; None where either is missing. Raises TidarError for a file that holds no object."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError) as error:
        raise TidarError(f"{path}: not readable as a JSON object ({error})") from error


def _stand_in(folder: Path) -> str | None:
    """The class of `transformers` that opens the tokenizer of a family which `transformers` does not have."""
    if _entry(folder / "config.json", "model_type") not in ("llada", "Dream"):
        return None
    return _STAND_INS.get(_entry(folder / "tokenizer_config.json", "tokenizer_class"))


def _eos_ids(folder: Path) -> list[int]:
    """End tokens that the folder's configs name; generation_config.json wins, as upstream."""
    for name in ("generation_config.json", "config.json"):
        value = _entry(folder / name, "eos_token_id")
        if value is not None:
            return list(value) if isinstance(value, list) else [value]
    return []


class TextStream:
    """Text of a growing sequence of tokens, never half a character.

    The pieces put together are `decode(prompt + ids)` without its first `len(decode(prompt))`
    characters, so a first word keeps the space before it. (Where the bytes are not valid UTF-8, a
    whole decode may mark more of them as broken than a stream that has already shown some.)
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT:])
        self._shown = tokenizer.decode(self._ids)
        if not self._shown.strip(_INCOMPLETE) and len(prompt_ids) > _CONTEXT:
            self._ids = list(prompt_ids)
            self._shown = tokenizer.decode(self._ids)
        self._new = len(self._ids)  # ids from here on came after the last piece

    def push(self, token_id: int) -> str:
        """Add a token; the text that is certain now and was not before, possibly none."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(_INCOMPLETE):
            return ""
        piece = self._after_shown(text)
        recent = self._ids[self._new :]
        shown = self._tokenizer.decode(recent)
        if shown:
            # Drop older tokens, so that a step costs the same however long the text is. Not where
            # the new ones show nothing (special tokens): decoders treat the start of a text apart.
            self._ids, self._shown = recent, shown
        else:
            self._shown = text
        self._new = len(self._ids)
        return piece

    def flush(self) -> str:
        """The text still held back, an unfinished character as U+FFFD. Ends the stream."""
        text = self._tokenizer.decode(self._ids)
        piece, self._shown = self._after_shown(text), text
        return piece

    def _after_shown(self, text: str) -> str:
        """The part of `text` that is new."""
        shown = self._shown
        if not text.startswith(shown):
            # The prompt ended inside a character; complete now, it belongs to the new text.
            shown = shown.rstrip(_INCOMPLETE)
        return text[len(shown) :]


class StopMatcher:
    """Finds stop strings in text that arrives in pieces, and never lets part of one through."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Watch for `stops`. Raises TidarError for an empty stop string."""
        if isinstance(stops, str) or any(not isinstance(stop, str) or not stop for stop in stops):
            raise TidarError(f"stop strings must be a list of non-empty strings, got {stops!r}")
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> tuple[str, bool]:
        """Add text.

        Returns:
            The text that is safe to show, and whether a stop string is complete. Then everything
            from the earliest stop string on is cut and `matched` names it.
        """
        if self.matched is not None:
            return "", True
        text = self._held + piece
        found = [(text.find(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if found:
            at, _, self.matched = min(found)  # the earliest; of several there, the longest
            self._held = ""
            return text[:at], True
        keep = self._partial(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The text held back because it could have become a stop string. Ends the matching."""
        text, self._held = self._held, ""
        return text

    def _partial(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for size in range(min(longest - 1, len(text)), 0, -1):
            end = text[-size:]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0


def check_prompt(ids: Sequence[int], *, vocab_size: int, mask_token_id: int | None = None) -> None:
    """Refuse a prompt that the model cannot read.

    Raises:
        TidarError: no tokens, an id outside the model's vocabulary, or the mask token.
    """
    if len(ids) == 0:
        raise TidarError("the prompt is empty; give some text, at least one token")
    for index, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise TidarError(
                f"prompt token {index} is {token!r}; allowed: whole numbers 0 to {vocab_size - 1}"
            )
        if token == mask_token_id:
            raise TidarError(
                f"prompt token {index} is the mask token ({token}), which stands for a token to be "
                "drafted and has no meaning in a prompt; take it out"
            )


class TextOf:
    """Mutable: the text of one request as its tokens come, cut at a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._stream = tokenizer.stream(prompt)
        self._stops = StopMatcher(stop)
        self._ready = ""

    def push(self, token: int) -> bool:
        """Takes a token; True when it completes a stop string."""
        text, stopped = self._stops.push(self._stream.push(token))
        self._ready += text
        return stopped

    def take(self, *, last: bool) -> str:
        """Text that is certain now and was not taken before; all of it once the text has ended."""
        if last and self._stops.matched is None:
            text, stopped = self._stops.push(self._stream.flush())
            self._ready += text if stopped else text + self._stops.flush()
        text, self._ready = self._ready, ""
        return text
