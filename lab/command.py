"""How the laboratory's commands end."""

import sys
from collections.abc import Callable

from tidar.errors import TidarError


def exit_code(work: Callable[[], int | None]) -> int:
    """Runs `work`: its exit code (None is 0); 2 for what the user can mend, 130 after Ctrl-C, told on stderr."""
    try:
        return work() or 0
    except TidarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
