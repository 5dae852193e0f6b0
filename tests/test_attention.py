"""Which of torch's attention kernels serve a cached decoder."""

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def test_threads_leave_the_setting_as_it_was() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    seen = set()

    def work() -> None:
        for _ in range(2000):
            with module._without_cudnn:
                seen.add(torch.backends.cuda.cudnn_sdp_enabled())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            for done in [threads.submit(work) for _ in range(4)]:
                done.result()
    finally:
        sys.setswitchinterval(interval)
    assert seen == {False}
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize("masked", [False, True])
def test_groups_of_heads_share_keys(masked: bool) -> None:
    check_groups(torch.device("cpu"), torch.float32, masked)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("masked", [False, True])
def test_no_scores_in_memory(masked: bool) -> None:
    """Neither cuDNN nor plain products serve a step, of any number of keys."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        check_groups(torch.device("cuda"), torch.bfloat16, masked)


def check_groups(device: torch.device, dtype: torch.dtype, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for keys in (5, 41, 64):
        sizes = ((2, 4, 3, 8), (2, 2, keys, 8), (2, 2, keys, 8))
        q, k, v = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
        mask = (torch.rand(2, 1, 3, keys, generator=generator) < 0.6).to(device)
        mask[..., 0] = True
        mask = mask if masked else torch.ones_like(mask)
        wide = [each.float().repeat_interleave(2, dim=1) for each in (k, v)]
        scores = (q.float() @ wide[0].transpose(-1, -2) / 8**0.5).masked_fill(~mask, -torch.inf)
        right = scores.softmax(-1) @ wide[1]
        got = attention(q, k, v, mask if masked else None).float()
        close = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got, right, rtol=close, atol=close)
