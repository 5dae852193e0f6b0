"""Train the bundled tokenizer: byte-level BPE of 2560 pieces for Python and arithmetic.

Every digit is a piece of its own, and a newline goes with the indentation that follows it. The
vocabulary is small so that the 12M parameters go into layers. Output is the tokenizer part of a
Hugging Face folder, which `transformers.AutoTokenizer` opens.
"""

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from records import Row, read_rows
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 2560
END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"
PATTERN = "|".join(
    (
        r"\p{N}",  # one digit
        r" ?[^\s\p{L}\p{N}]?[\p{L}_]+",  # a word, with the space or sign that leads to it
        r" ?[^\s\p{L}\p{N}]+",  # punctuation
        r"\n+[ \t]*",  # a line's end with the next line's indentation
        r"[ \t]+(?=\S)|\s+",
    )
)
PYTHON_SAMPLE, ARITHMETIC_SAMPLE, STEPMATH_SAMPLE = 24_000_000, 2_800_000, 1_400_000  # characters


def train(texts: Sequence[str], pattern: str = PATTERN) -> Tokenizer:
    """A byte-level BPE tokenizer over `texts`; the two special tokens have ids 0 and 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, MASK],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json`, compactly, and `tokenizer_config.json` to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(state + "\n")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "mask_token": MASK,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def documents(rows: Iterable[Row]) -> list[str]:
    """The documents of `rows`: `prompt`, where there is one, and `text`."""
    return [row.get("prompt", "") + row["text"] for row in rows]


def sample(texts: Sequence[str], size: int, rng: random.Random) -> list[str]:
    """Whole texts in random order, about `size` characters of them or all there are."""
    order = rng.sample(range(len(texts)), len(texts))
    taken: list[str] = []
    total = 0
    for index in order:
        if total >= size:
            break
        taken.append(texts[index])
        total += len(texts[index])
    return taken


def characters_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Characters per token over all `texts` together."""
    encodings = tokenizer.encode_batch(list(texts))
    return sum(map(len, texts)) / sum(len(encoding.ids) for encoding in encodings)


def training_texts(data: Path, packages_share: float) -> list[str]:
    """The sample of the folder that `prepare.py` wrote: 85% Python, the rest worked arithmetic."""
    rng = random.Random(0)
    from_packages = int(PYTHON_SAMPLE * packages_share)
    sizes = {
        "python_packages": from_packages,
        "python_shared": PYTHON_SAMPLE - from_packages,
        "arithmetic": ARITHMETIC_SAMPLE,
        "stepmath": STEPMATH_SAMPLE,
    }
    texts = []
    for name, size in sizes.items():
        path = data / f"{name}.jsonl"
        if size and path.exists():
            texts += sample(documents(read_rows(path)), size, rng)
    return texts


def main() -> None:
    """Train on a folder that `prepare.py` wrote, save, and print characters per token."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tokenizer")
    parser.add_argument("--packages-share", type=float, default=0.25, help="of the Python text")
    options = parser.parse_args()
    tokenizer = train(training_texts(options.data, options.packages_share))
    save(tokenizer, options.out)
    for path in sorted(options.data.glob("*_held_out.jsonl")):
        rate = characters_per_token(tokenizer, documents(read_rows(path)))
        print(f"{path.stem}: {rate:.3f} characters per token")


if __name__ == "__main__":
    main()
