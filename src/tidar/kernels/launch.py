"""What all launches have in common."""

from typing import Any


def early(pdl: bool) -> dict[str, Any]:
    """Launch options of programmatic dependent launch, where it is asked for (Hopper or later).

    The kernel may then start while the one before it still runs, so it must wait (`gdc_wait`) before it
    reads or writes anything that an earlier one touches.
    """
    return {"launch_pdl": True} if pdl else {}
