"""The laboratory: every method trained on the same text from the same weights, and measured side by side."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Text filters, worked arithmetic and row files are those of the bundled checkpoint's recipe.
sys.path.append(str(ROOT / "recipes" / "bundled"))
