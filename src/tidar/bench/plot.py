"""Pictures of records, by matplotlib where it is installed."""

from pathlib import Path
from typing import TYPE_CHECKING

from tidar.errors import TidarError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """An empty one, inches wide and high. Raises TidarError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TidarError(
            "Drawing a PNG needs matplotlib, which is not installed: pip install 'tidar[plot]'."
        ) from error
    return Figure(figsize=(width, height), dpi=160, layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    """Raises TidarError where it cannot be written."""
    try:
        figure.savefig(path, facecolor="white")
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no image format
        raise TidarError(f"cannot write the picture {path}: {error}") from error
