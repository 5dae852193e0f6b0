"""Prompt files: what is decoded, and the answers that are right."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidar.errors import TidarError
from tidar.model import Transformer
from tidar.tokens import Tokenizer, check_prompt


@dataclass(frozen=True, slots=True)
class Prompt:
    """One text to decode, as token ids.

    real: ids of the text that really follows (`continuation`), empty where the file has none.
    """

    name: str
    ids: tuple[int, ...]
    real: tuple[int, ...] = ()
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class PromptFile:
    """Prompts, and what identifies the file they came from."""

    path: Path
    sha256: str
    prompts: tuple[Prompt, ...]


def read_prompts(
    path: Path, tokenizer: Tokenizer | None, model: Transformer, limit: int | None = None
) -> PromptFile:
    """Reads JSON lines with `prompt`, and optionally `id`, `continuation`, `answer`.

    Instead of texts a line may give token ids: `prompt_ids`, `continuation_ids`. Raises TidarError,
    with the line, for anything that cannot be used.
    """
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TidarError(f"cannot read the prompts {path}: {error}") from error
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, start=1):
        if len(prompts) == limit:
            break
        if line.strip():
            try:
                prompt = _prompt(line, number, tokenizer)
                check_prompt(
                    prompt.ids + prompt.real,
                    vocab_size=model.config.vocab_size,
                    mask_token_id=model.config.mask_token_id,
                )
            except (TidarError, ValueError) as error:
                raise TidarError(f"{path}, line {number}: {error}") from error
            prompts.append(prompt)
    if not prompts:
        raise TidarError(f"{path} has no prompts.")
    return PromptFile(path, hashlib.sha256(content).hexdigest(), tuple(prompts))


def _prompt(line: str, number: int, tokenizer: Tokenizer | None) -> Prompt:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise TidarError("not a JSON object.")
    answer = row.get("answer")
    return Prompt(
        str(row.get("id", number)), *_ids(row, tokenizer), None if answer is None else str(answer)
    )


def _ids(
    row: dict[str, Any], tokenizer: Tokenizer | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of the prompt, and of what really follows it."""
    if "prompt_ids" in row:
        return tuple(row["prompt_ids"]), tuple(row.get("continuation_ids", ()))
    if not isinstance(row.get("prompt"), str):
        raise TidarError("needs a text under 'prompt' (or token ids under 'prompt_ids').")
    if tokenizer is None:
        raise TidarError(
            "the checkpoint has no tokenizer, so prompts must be given as 'prompt_ids'."
        )
    prompt = tokenizer.encode(row["prompt"])
    following = row.get("continuation")
    if not following:
        return tuple(prompt), ()
    # The text as one where the cut is also one between tokens, else the two parts.
    whole = tokenizer.encode(row["prompt"] + following)
    if whole[: len(prompt)] == prompt:
        return tuple(prompt), tuple(whole[len(prompt) :])
    return tuple(prompt), tuple(tokenizer.encode(following, special=False))


def find_answer(text: str) -> str | None:
    """What stands behind the last `Answer:`, on its line or the next that is not empty."""
    _, found, after = text.rpartition("Answer:")
    if not found:
        return None
    return next((line.strip() for line in after.splitlines() if line.strip()), None)


def answer_matches(text: str, answer: str) -> bool:
    """Whether the text's answer is `answer`: equal as numbers where both are, else as words."""
    found = find_answer(text)
    if found is None:
        return False
    given, wanted = (
        value.strip().strip("$").rstrip(".").replace(",", "") for value in (found, answer)
    )
    try:
        return float(given) == float(wanted)
    except ValueError:
        return given.casefold() == wanted.casefold()


def exact_match(texts: Sequence[str], prompts: Sequence[Prompt]) -> float | None:
    """Share of right answers among the prompts that have one; None where none has."""
    pairs = [(t, p.answer) for t, p in zip(texts, prompts, strict=True) if p.answer is not None]
    return (
        sum(answer_matches(text, answer) for text, answer in pairs) / len(pairs) if pairs else None
    )
