"""The counter-based noise of `tidar.sampling` inside kernels."""

# Triton has no types that mypy could read, so its decorator hides those of the kernels.
# mypy: disable-error-code="untyped-decorator"

import triton
import triton.language as tl

# The constants of tidar.sampling, signed as int64 holds them.
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64)
_MIX_2 = tl.constexpr(0x94D049BB133111EB - 2**64)


@triton.jit
def mix(state: tl.tensor) -> tl.tensor:
    """`tidar.sampling.mix`: the shifts of int64 are arithmetic, the masks make them logical."""
    state = (state ^ ((state >> 30) & 0x3FFFFFFFF)) * _MIX_1
    state = (state ^ ((state >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return state ^ ((state >> 31) & 0x1FFFFFFFF)


@triton.jit
def gumbel(seed: tl.tensor, position: tl.tensor, token: tl.tensor) -> tl.tensor:
    """`tidar.sampling.gumbel_noise` of one seed and position for tokens `[N]`, float32 `[N]`."""
    row = mix(mix(seed * _GOLDEN + 1) + position * _MIX_1)
    bits = mix(row + (token.to(tl.int64) + 1) * _GOLDEN)
    uniform = ((bits >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float32) * 1.1102230246251565e-16
    uniform = tl.minimum(tl.maximum(uniform, 1.1102230246251565e-16), 1 - 5.960464477539063e-08)
    # log1p(-u) from log: what 1 - u lost by rounding scales out again (Kahan).
    rest = 1.0 - uniform
    lost = rest == 1.0
    taken = tl.where(lost, 1.0, 1.0 - rest)
    exponential = tl.where(lost, uniform, -tl.log(rest) * tl.div_rn(uniform, taken))
    return -tl.log(exponential)
