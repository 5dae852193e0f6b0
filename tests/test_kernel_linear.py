"""The fused linear layer for one row against the same arithmetic in float64.

Without a GPU the kernel runs in Triton's interpreter (conftest.py): slow, so the shapes are small.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from devices import CUDA, DEVICES
from models import TOLERANCE
from torch import Tensor
from torch.nn.functional import silu

from tidar.kernels.linear import (
    LinearConfig,
    default_config,
    linear_row,
)

EPS = 1e-6

# Tiles that divide neither the 76 weight rows nor the 104 columns of the cases.
DIRECT = LinearConfig(tile_n=8, tile_k=32, num_warps=1, unroll=2)
CONFIGS = {
    "direct": DIRECT,
    "staged": replace(DIRECT, num_stages=3, unroll=1),
    "one-tile": LinearConfig(tile_n=128, tile_k=128),
}


@dataclass(frozen=True)
class Case:
    """Arguments of one call, all options present."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    residual: Tensor
    gated: bool

    def expected(self, *, bias: bool = True, norm: bool = True, residual: bool = True) -> Tensor:
        """The result in float64."""
        x = self.x.double()
        if norm:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self.norm_weight.double()
        sums = x @ self.weight.double().T
        if bias:
            sums = sums + self.bias.double()
        if self.gated:
            gate, up = sums.chunk(2, dim=-1)
            sums = silu(gate) * up
        return sums + self.residual.double() if residual else sums

    def call(
        self,
        config: LinearConfig | None,
        *,
        bias: bool = True,
        norm: bool = True,
        residual: bool = True,
        out: Tensor | None = None,
    ) -> Tensor:
        return linear_row(
            self.x,
            self.weight,
            bias=self.bias if bias else None,
            norm_weight=self.norm_weight if norm else None,
            eps=EPS,
            residual=self.residual if residual else None,
            gated=self.gated,
            config=config,
            out=out,
        )


def make_case(
    device: str,
    *,
    m: int = 1,
    n: int = 76,
    k: int = 104,
    gated: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=generator) * scale + offset
        return values.to(dtype).to(device)

    return Case(
        x=draw(m, k, scale=3.0),
        weight=draw(n, k, scale=k**-0.5),
        bias=draw(n),
        norm_weight=draw(k, scale=0.3, offset=1.0),
        residual=draw(m, n // 2 if gated else n),
        gated=gated,
    )


def check(actual: Tensor, right: Tensor) -> None:
    """float32 within the tolerance of the laws; bfloat16 within the one rounding of its result."""
    assert actual.shape == right.shape
    budget = torch.full_like(right, TOLERANCE * float(right.abs().max()))
    if actual.dtype == torch.bfloat16:
        # Half a unit, or a unit where the interpreter cuts off instead of rounding.
        budget += right.abs() * 2.0 ** (-8 if actual.is_cuda else -7)
    error = (actual.double() - right).abs()
    assert bool((error <= budget).all()), float((error / budget).max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_plain_arithmetic(device: str, name: str, gated: bool) -> None:
    """Norm, bias, activation and residual together, in place."""
    case = make_case(device, gated=gated)
    stream = case.residual.clone()
    result = replace(case, residual=stream).call(CONFIGS[name], out=stream)
    assert result is stream
    check(stream, case.expected())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("present", ["bias", "norm", "residual", "none"])
def test_each_part_alone(device: str, present: str) -> None:
    case = make_case(device)
    bias, norm, residual = (present == part for part in ("bias", "norm", "residual"))
    actual = case.call(DIRECT, bias=bias, norm=norm, residual=residual)
    check(actual, case.expected(bias=bias, norm=norm, residual=residual))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["direct", "staged"])
def test_even_shapes(device: str, name: str) -> None:
    """Tiles that divide everything take the paths without masks."""
    case = make_case(device, n=64, k=96)
    check(case.call(CONFIGS[name]), case.expected())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_bfloat16_within_its_rounding(device: str, gated: bool) -> None:
    case = make_case(device, gated=gated, dtype=torch.bfloat16)
    check(case.call(DIRECT), case.expected())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_default_configuration(device: str, gated: bool) -> None:
    """Also where K is far below the tiles of the table."""
    for k in (104, 5):
        case = make_case(device, k=k, gated=gated)
        check(case.call(None), case.expected())


@pytest.mark.parametrize("device", DEVICES)
def test_strides_and_output_type(device: str) -> None:
    """x, residual and output may be slices; the output has its own type."""
    narrow = make_case(device, dtype=torch.bfloat16)
    case = replace(
        narrow,
        x=torch.cat([narrow.x, narrow.x], dim=1)[:, : narrow.x.shape[1]],
        residual=torch.cat([narrow.residual] * 2, dim=1)[:, : narrow.residual.shape[1]],
    )
    room = torch.zeros(1, 100, device=device)
    out = case.call(DIRECT, out=room[:, 10:86])
    check(out, case.expected())
    assert not room[:, :10].any()
    assert not room[:, 86:].any()


@pytest.mark.parametrize("device", DEVICES)
def test_shape_errors(device: str) -> None:
    case = make_case(device)
    for wrong in (
        replace(case, x=case.x[:, :-1]),
        replace(case, x=case.x.bfloat16()),
        replace(case, x=case.x[:0], residual=case.residual[:0]),
        make_case(device, m=2),
        replace(case, weight=case.weight[:, ::2]),
        replace(case, bias=case.bias[:-1]),
        replace(case, residual=case.residual[:, :-1]),
    ):
        with pytest.raises(AssertionError):
            wrong.call(DIRECT)
    with pytest.raises(AssertionError):
        make_case(device, gated=True).call(replace(DIRECT, tile_n=1))


@pytest.mark.parametrize(
    ("n", "k", "gated", "tiles"),
    [
        (17920, 1536, True, (4, 1024, 4, 1, 2)),
        (151936, 1536, False, (4, 1024, 4, 1, 2)),
        (24576, 4096, True, (8, 1024, 4, 4, 1)),
        (151936, 4096, False, (8, 1024, 4, 4, 1)),
        (1536, 8960, False, (2, 1024, 4, 1, 4)),
        (6144, 4096, False, (4, 512, 2, 1, 2)),
        (4096, 12288, False, (1, 256, 1, 1, 8)),
        (2048, 1536, False, (1, 256, 1, 1, 6)),
        # The bundled checkpoint.
        (1984, 384, True, (4, 512, 2, 1, 1)),
        (384, 992, False, (1, 256, 1, 1, 4)),
        (2560, 384, False, (1, 256, 1, 1, 2)),
    ],
)
def test_defaults_are_those_measured(
    n: int, k: int, gated: bool, tiles: tuple[int, int, int, int, int]
) -> None:
    config = default_config(n, k, gated)
    assert tiles == (
        config.tile_n, config.tile_k, config.num_warps, config.num_stages, config.unroll
    )  # fmt: skip
    assert default_config(n, k, gated, pdl=True) == replace(config, pdl=True)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("pdl", [False, True], ids=["plain", "pdl"])
@pytest.mark.parametrize(
    ("n", "k", "gated"),
    [
        (2048, 1536, False),
        (17920, 1536, True),
        (1536, 8960, False),
        (6144, 4096, False),
        (24576, 4096, True),
        (1984, 384, True),
        (384, 992, False),
    ],
)
def test_model_shapes_in_a_graph_on_cuda(n: int, k: int, gated: bool, pdl: bool) -> None:
    """The default configuration, captured once and replayed with other inputs."""
    case = make_case("cuda", n=n, k=k, gated=gated, dtype=torch.bfloat16)
    config = replace(default_config(n, k, gated), pdl=pdl)
    out = torch.empty_like(case.residual)
    case.call(config, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.call(config, out=out)
        case.call(config, out=out)
    for seed in (1, 2):
        other = make_case("cuda", n=8, k=k, gated=gated, dtype=torch.bfloat16, seed=seed)
        case.x.copy_(other.x)
        out.fill_(float("nan"))
        graph.replay()
        check(out, case.expected())
