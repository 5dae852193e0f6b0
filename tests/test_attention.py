"""Which of torch's attention kernels serve a cached decoder."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tidar import attention as module
from tidar.attention import attention, dense_attend


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_never_by_cudnn(monkeypatch: pytest.MonkeyPatch, fails: bool, enabled: bool) -> None:
    """On CUDA, here by tensors without memory; what the process had set stands again afterwards."""
    set_during = []

    def kernel(q: Tensor, *_: Any, **options: Any) -> Tensor:
        set_during.append(torch.backends.cuda.cudnn_sdp_enabled())
        assert options["enable_gqa"]
        if fails:
            raise RuntimeError("out of memory")
        return q

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", kernel)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    try:
        with FakeTensorMode():
            q, k = (torch.empty(1, heads, 3, 8, device="cuda:0") for heads in (4, 2))
            for attend in (
                lambda q, k: attention(q, k, k, None),
                lambda q, k: dense_attend()(0, q, k, k),
            ):
                if fails:
                    with pytest.raises(RuntimeError, match="out of memory"):
                        attend(q, k)
                else:
                    attend(q, k)
                assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert set_during == [False, False]


def test_groups_of_heads_share_keys() -> None:
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    mask = torch.rand(2, 1, 3, 5) < 0.6
    mask[..., 0] = True
    wide = k.repeat_interleave(2, dim=1)
    scores = (q @ wide.transpose(-1, -2) / 8**0.5).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(attention(q, k, k, mask), scores.softmax(-1) @ wide)
