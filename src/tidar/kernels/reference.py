"""Plain PyTorch twin of the paged attention kernel: the CPU path, and what the kernel is tested against."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tidar.layout import Rows, dense


def paged_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    prefix_lens: Tensor,
    tail: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of W tail rows per sequence over its paged prefix and over each other.

    Args:
        q: `[B, W, num_heads, head_dim]`, any strides; rotary embedding already applied.
        k, v: `[B, W, num_kv_heads, head_dim]`, keys and values of the same rows.
        key_pages, value_pages: `[num_pages, num_kv_heads, page_size, head_dim]`.
        page_table: int `[B, max_pages]`, the pages of each sequence in order; entries behind the
            prefix are ignored, whatever they hold.
        prefix_lens: int `[B]`, committed tokens; slots behind them are ignored, NaN included.
        tail: int32 `[3, W]` or `[B, 3, W]`: position (minus the prefix length), span and anchor of each
            tail row, as in `tidar.layout.Rows`. Every row sees the whole prefix.
        out: `[B, W, num_heads * head_dim]`, made where it is None.

    Returns:
        `out`. Reads `prefix_lens` on the host, so on a GPU it waits for the device.
    """
    batch, rows, num_heads, head_dim = q.shape
    lengths = prefix_lens.tolist()
    assert len(lengths) == batch == page_table.shape[0], (q.shape, prefix_lens.shape)
    assert tail.shape[-2:] == (3, rows), (tail.shape, q.shape)
    keys = torch.cat([_gather(key_pages, page_table, lengths), k.transpose(1, 2)], dim=2)
    values = torch.cat([_gather(value_pages, page_table, lengths), v.transpose(1, 2)], dim=2)
    result = scaled_dot_product_attention(
        q.transpose(1, 2),
        keys,
        values,
        attn_mask=_mask(prefix_lens, lengths, _matrix(tail)),
        enable_gqa=num_heads != k.shape[2],
    ).transpose(1, 2)
    if out is None:
        return result.reshape(batch, rows, num_heads * head_dim)
    out.view(batch, rows, num_heads, head_dim).copy_(result)
    return out


def _gather(pages: Tensor, page_table: Tensor, lengths: list[int]) -> Tensor:
    """The prefixes of all sequences, `[B, num_kv_heads, max(lengths), head_dim]`, zeros behind each."""
    _, num_kv_heads, page_size, head_dim = pages.shape
    longest = max(lengths)
    used = -(-longest // page_size)
    # Entries behind a sequence's own pages may be anything: they read page 0, zeroed below.
    own = torch.tensor([-(-length // page_size) for length in lengths], device=pages.device)
    table = page_table[:, :used].long()
    table = table.masked_fill(
        torch.arange(used, device=pages.device) >= own.unsqueeze(1), 0
    ).unsqueeze(1)
    heads = torch.arange(num_kv_heads, device=pages.device).view(1, -1, 1)
    gathered = pages[table, heads].reshape(len(lengths), num_kv_heads, used * page_size, head_dim)
    # A masked score still multiplies its value by 0, and 0 * NaN is NaN.
    shortest = min(lengths)
    ends = torch.tensor(lengths, device=pages.device).view(-1, 1, 1, 1)
    places = torch.arange(shortest, longest, device=pages.device).view(1, 1, -1, 1)
    gathered[:, :, shortest:longest].masked_fill_(places >= ends, 0.0)
    return gathered[:, :, :longest]


def _matrix(tail: Tensor) -> Tensor:
    """Which tail row (column) each tail row sees, bool `[..., W, W]`."""
    position, span, anchor = tail.unbind(-2)
    rows = Rows(position, torch.zeros_like(position), span, anchor)
    return dense(rows, rows)


def _mask(prefix_lens: Tensor, lengths: list[int], tail: Tensor) -> Tensor | None:
    """What each row sees of the gathered prefix and of the tail, `[B or 1, 1, W, N + W]`."""
    rows, longest = tail.shape[-1], max(lengths)
    even = min(lengths) == longest
    if even and rows == 1:
        return None
    matrix = tail if tail.dim() == 3 else tail.unsqueeze(0)
    count = 1 if even and tail.dim() == 2 else len(lengths)
    places = torch.arange(longest, device=tail.device)
    prefix = (places < prefix_lens.unsqueeze(1)).unsqueeze(1)[:count].expand(count, rows, longest)
    return torch.cat([prefix, matrix.expand(count, rows, rows)], dim=2).unsqueeze(1)
