"""A tree of drafts: several guesses for a position, each with guesses behind it, verified in one pass.

Node 0 is the certain token, every other node a draft token behind its parent's. A row of a step sees the
prefix and its own ancestors, so it computes what it would compute in a text of its own: the causal
distribution behind that path (SpecInfer, arXiv 2305.09781, section 4). The topology is fixed; a draft of
fewer tokens takes the nodes up to its depth.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.errors import TidarError
from tidar.sampling import Draw, reject_siblings

Path = tuple[int, ...]
"""A node by ranks: (0, 2) is the third best guess behind the best one."""


class Tree:
    """The topology. Nodes are ordered by depth, then by rank, so that a shallower tree is a slice.

    paths: one for each node, but for the root's, which is empty. depths, parents: of each node (the root
    counts as its own parent). children: of each node, best rank first. visible: bool `[N, N]`, whether a
    node's row (first index) sees another's. Raises TidarError for paths that make no tree.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        given = sorted(set(paths) - {()}, key=lambda path: (len(path), path))
        self.paths: tuple[Path, ...] = ((), *given)
        if len(self.paths) == 1:
            raise TidarError("a tree of drafts needs at least one path, such as (0,).")
        index = {path: node for node, path in enumerate(self.paths)}
        for path in given:
            before = path[:-1] if path[-1] == 0 else (*path[:-1], path[-1] - 1)
            if before not in index:
                raise TidarError(
                    f"a tree of drafts has the path {path} and not {before}: every node needs its parent and "
                    "its better siblings."
                )
        self.depths = tuple(map(len, self.paths))
        self.depth = self.depths[-1]
        self.parents = (0, *(index[path[:-1]] for path in given))
        kin: list[list[int]] = [[] for _ in self.paths]
        self.visible = torch.eye(len(self.paths), dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], start=1):
            kin[parent].append(node)
            self.visible[node] |= self.visible[parent]
        self.children = tuple(map(tuple, kin))

    def size(self, depth: int) -> int:
        """Nodes of the tree cut at a depth, the root included."""
        return sum(each <= depth for each in self.depths)

    def internal(self, depth: int) -> list[int]:
        """Nodes from depth 1 to `depth` that have children."""
        return [n for n, own in enumerate(self.depths) if 1 <= own <= depth and self.children[n]]


def chain(depth: int) -> Tree:
    """One guess for each position: what plain speculative decoding verifies."""
    return Tree((0,) * length for length in range(1, depth + 1))


def spread(depth: int) -> Tree:
    """The best chain, and side branches that thin out: our default, 20 draft tokens at depth 6.

    A node of rank r counts as 1 + 2 r steps, and every path of up to `depth` steps is in. So it holds the
    likeliest nodes where a guess of the next rank is as likely as a chain that is two tokens longer.
    """

    def below(left: int) -> list[Path]:
        found: list[Path] = []
        for rank in range((left + 1) // 2):
            rest = below(left - 1 - 2 * rank)
            found += [(rank,), *((rank, *path) for path in rest)]
        return found

    return Tree(below(depth))


@dataclass(frozen=True, slots=True)
class Siblings:
    """The guesses behind one node, best first, where fewer may be possible than the topology has.

    probs: float64 `[vocab_size]`, what they were drawn from, one by one without replacement; None where
    they were not drawn.
    """

    nodes: tuple[int, ...]
    tokens: tuple[int, ...]
    probs: Tensor | None = None


def follow(siblings: Mapping[int, Siblings], chosen: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """The path that the choices take, nodes from the root, and the choice behind it.

    siblings: by parent. chosen: for each node, the causal model's choice behind it.
    """
    path = [0]
    while (group := siblings.get(path[-1])) and chosen[path[-1]] in group.tokens:
        path.append(group.nodes[group.tokens.index(chosen[path[-1]])])
    return tuple(path), chosen[path[-1]]


def follow_rejecting(
    siblings: Mapping[int, Siblings], target_probs: Tensor, draw: Draw
) -> tuple[tuple[int, ...], int]:
    """`follow` by rejection sampling: siblings are tested in turn, then the path goes on behind the one that passed.

    target_probs: float64 `[nodes, vocab_size]`, the causal distribution behind each node.
    """
    path = [0]
    while group := siblings.get(path[-1]):
        passed, token = reject_siblings(group.tokens, group.probs, target_probs[path[-1]], draw)
        if passed is None:
            return tuple(path), token
        path.append(group.nodes[passed])
    return tuple(path), draw(target_probs[path[-1]])
