"""What all launches have in common."""

from typing import Any


def early(pdl: bool) -> dict[str, Any]:
    """Launch options of programmatic dependent launch, where it is asked for (Hopper or later).

    The kernel may then start while the one before it still runs, so it waits (`gdc_wait`) before it reads
    or writes anything that this one touches. Short kernels let the next one start at once, long ones behind
    their main loop and so behind their wait. What is read before a wait must be a weight, or have been
    written by a kernel behind which one of the second kind (or an ordinary launch) stands: when such a one
    lets the next start, all that came before it has ended.
    """
    return {"launch_pdl": True} if pdl else {}
