"""A tokenizer for runs from scratch: byte-level BPE, as a folder that `transformers` opens."""

import json
from collections.abc import Sequence
from pathlib import Path

from tidar.errors import TidarError
from tidar.training.sources import Source, documents

END = "<|endoftext|>"


def _sample(sources: Sequence[Source], text_field: str, max_characters: int) -> list[str]:
    """The start of each source, in equal shares."""
    found: list[str] = []
    for source in sources:
        left = max_characters // len(sources)
        for document in documents(source, text_field):
            if isinstance(document, str):
                found.append(document[:left])
                left -= len(document)
            if left <= 0:
                break
    return found


def train_tokenizer(
    sources: Sequence[Source],
    folder: Path,
    *,
    vocab_size: int,
    text_field: str = "text",
    single_digits: bool = True,
    max_characters: int = 200_000_000,
) -> Path:
    """Train a byte-level BPE tokenizer on the start of each source, and save it to `folder`.

    vocab_size counts all tokens, end-of-text included. Give the model a few rows more (a multiple
    of 64): the first spare one becomes the mask token, and the matrix keeps a shape GPUs like.
    single_digits: every digit is a token of its own, which helps arithmetic.

    Raises TidarError for unreadable sources, a vocabulary under 257, or a folder that exists.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise TidarError(f"vocab_size is {vocab_size}; byte-level BPE needs at least 257.")
    if folder.exists() and any(folder.iterdir()):
        raise TidarError(f"{folder} is not empty; give a new folder for the tokenizer.")
    tokenizer = Tokenizer(models.BPE())
    digits = r"\p{N}" if single_digits else r"\p{N}+"
    # Words with a space before them, digits, runs of punctuation, line breaks, other blanks.
    pattern = rf" ?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()

    sample = _sample(sources, text_field, max_characters)
    if not sample:
        raise TidarError("no usable text to train a tokenizer on.")
    tokenizer.train_from_iterator(
        sample,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer.save(str(folder / "tokenizer.json"))
    except Exception as error:  # the tokenizers library raises bare Exception
        (folder / "tokenizer.json").unlink(missing_ok=True)
        raise TidarError(f"{folder}/tokenizer.json: cannot be written ({error}).") from error
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    return folder
