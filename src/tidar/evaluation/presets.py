"""Shots and lengths of known tasks: the paper's where it names them, else the harness's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

PAPER = "the paper (Table 6)"
HARNESS = "the harness"
OWN = "tidar"
GIVEN = "the command line"


@dataclass(frozen=True, slots=True)
class Preset:
    """How a task is asked. None: the harness's own value. source: whose setting that is."""

    shots: int | None = None
    max_gen_toks: int | None = None
    source: str = HARNESS


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "humaneval": Preset(0, 512, PAPER),
        "humaneval_plus": Preset(0, 512, PAPER),
        "mbpp": Preset(3, 512, PAPER),
        "mbpp_plus": Preset(3, 512, PAPER),
        "gsm8k_cot": Preset(8, 256, PAPER),
        "minerva_math": Preset(4, 512, PAPER),
        "mmlu": Preset(5, None, PAPER),
        "arc_easy": Preset(0, None, PAPER),
        "arc_challenge": Preset(0, None, PAPER),
        "hellaswag": Preset(0, None, PAPER),
        "piqa": Preset(0, None, PAPER),
        "winogrande": Preset(5, None, PAPER),
        # The paper's GSM8K is gsm8k_cot: eight fixed examples. This is the harness's other one.
        "gsm8k": Preset(),
        # Our own task files; lengths as the paper has them for the same texts.
        "gsm8k_local": Preset(5, 256, OWN),
        "humaneval_local": Preset(0, 512, OWN),
        "stepmath_local": Preset(0, 256, OWN),
        "choices_local": Preset(0, None, OWN),
        "text_local": Preset(0, None, OWN),
    }
)
"""The paper used lm-eval 0.4.8, greedy as far as it says, HumanEval and MBPP by pass@1, GSM8K by strict match,
Minerva Math by exact match, MMLU, ARC-easy and Winogrande by acc, ARC-challenge, HellaSwag and PIQA by acc_norm."""


def preset(task: str) -> Preset:
    """The preset of a task; the harness's values for one that is not known here."""
    return PRESETS.get(task, Preset())
