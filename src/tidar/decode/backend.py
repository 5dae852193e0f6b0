"""The network as a decode step sees it, in plain PyTorch: any device, and what fused kernels must equal."""

from torch import Tensor

from tidar.decode.slots import Stepper
from tidar.errors import TidarError
from tidar.model import Transformer
from tidar.paged_cache import PagedCache, PagedRows
from tidar.sampling import RowParams, choose_rows


class PlainBackend:
    """See `tidar.decode.slots.Backend`."""

    def __init__(self, model: Transformer, cache: PagedCache) -> None:
        self.model, self.cache = model, cache

    def forward(self, ids: Tensor, positions: Tensor, rows: PagedRows) -> Tensor:
        return self.model(ids, positions, self.cache.attend(rows))

    def choose(self, hidden: Tensor, params: RowParams, positions: Tensor) -> Tensor:
        return choose_rows(self.logits(hidden), params, positions)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)


def fused_stepper(stepper: Stepper, model: Transformer, cache: PagedCache) -> Stepper:
    """The same step in fused kernels. Raises TidarError where Triton is not installed."""
    try:
        from tidar.decode.fused import FusedBackend
        from tidar.decode.fused_step import FusedStepper
    except ImportError as error:
        raise TidarError(
            f"the GPU engine needs Triton ({error}); install it with: pip install 'tidar[kernels]'. The plain "
            "engine (engine 'plain') does without, more slowly."
        ) from error
    backend = FusedBackend(model, cache)
    return FusedStepper(
        stepper.slots,
        backend,
        stepper.shape,
        stepper.mask_token_id,
        stepper.limit,
        replay=stepper.replay,
        draws=stepper.draws,
        pdl=backend.pdl,
    )
