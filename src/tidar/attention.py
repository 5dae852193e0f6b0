"""Scaled dot product attention, and two ordinary `Attend` callables: dense (any device, the oracle),
FlexAttention (CUDA training).

Both are closures over one mask that holds for all layers. Neither falls back to something slower or
less masked: what they cannot do, they refuse.
"""

from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar.errors import TidarError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# `tidar.model.Attend` spelled out: model and attention are siblings, neither imports the other.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool = False
) -> Tensor:
    """torch's scaled dot product attention, grouped where k has fewer heads than q; on a GPU never by cuDNN.

    cuDNN makes a plan for each new shape, and in cached decoding every step has a shape of its own (LOG.md,
    "The plain engine on a GPU"). Under a mask keys and values are repeated there, since what is left for unequal
    heads would write all scores to memory. Inside `torch.compile` torch chooses as it likes.
    """
    group = q.shape[1] // k.shape[1]
    if not q.is_cuda or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=group > 1
        )
    if mask is not None and group > 1:
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    with _without_cudnn:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=group > 1
        )


class _WithoutCudnn:
    """Context manager, for several threads at once: the process's own setting stands again behind the last.

    It costs a microsecond, where `torch.nn.attention.sdpa_kernel` costs many.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.backends.cuda.enable_cudnn_sdp(self._before)


_without_cudnn = _WithoutCudnn()


def dense_attend(mask: Tensor | None = None, *, is_causal: bool = False) -> Attend:
    """Scaled dot product attention under a boolean matrix.

    Args:
        mask: `[N, M]`, `[B, N, M]` or `[B, H, N, M]` bool, True = visible, M keys for N queries
            (here M = N rows of the forward). None shows everything, or the lower triangle if
            `is_causal`.
        is_causal: plain causal attention by row order; not together with a mask.

    Returns:
        An `Attend` for all layers. A row that sees nothing has no defined result: the visibility
        rule lets every row see itself, so this is not checked on each call.

    Raises:
        TidarError: a mask that is not boolean or has no such shape, or a mask together with
            `is_causal`.
    """
    if mask is not None:
        if is_causal:
            raise TidarError("dense_attend takes a mask or is_causal, not both")
        if mask.dtype != torch.bool:
            raise TidarError(
                f"dense_attend needs a boolean mask (True = visible), got {mask.dtype}"
            )
        if mask.dim() not in (2, 3, 4):
            raise TidarError(f"dense_attend needs a mask of 2 to 4 dimensions, got {mask.dim()}")
        if mask.dim() == 3:
            mask = mask[:, None]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor:
        return attention(q, k, v, mask, is_causal=is_causal)

    return attend


@cache
def _compiled_flex() -> Callable[..., Any]:
    """`flex_attention`, compiled once per process: once per mask would cost minutes."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex_attend(mask: "BlockMask") -> Attend:
    """FlexAttention under a sparse mask (`torch.nn.attention.flex_attention.create_block_mask`).

    Args:
        mask: made for the query and key lengths of the forward, with batch 1 or B.

    Returns:
        An `Attend` for all layers, for CUDA tensors. Uncompiled FlexAttention materialises the
        whole score matrix, so a CPU tensor is refused (TidarError) rather than served slowly:
        `dense_attend` is for that.
    """

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor:
        if q.device.type != "cuda":
            raise TidarError(
                f"flex_attend runs on CUDA only, got tensors on {q.device.type}; "
                "use dense_attend there"
            )
        if (
            torch.compiler.is_compiling()
        ):  # the caller compiles the whole network: stay inside its graph
            from torch.nn.attention.flex_attention import flex_attention

            function: Callable[..., Any] = flex_attention
        else:
            function = _compiled_flex()
        return cast(
            "Tensor", function(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        )

    return attend
