"""What `tidar train --objective` can learn: one file each, and its name here."""

from collections.abc import Mapping
from typing import Final, Literal

from tidar.training.objective import Objective
from tidar.training.objectives.ar import ArObjective
from tidar.training.objectives.block_diffusion import BlockDiffusionObjective
from tidar.training.objectives.eagle import EagleObjective
from tidar.training.objectives.masked_diffusion import MaskedDiffusionObjective
from tidar.training.objectives.tidar import TidarObjective

ObjectiveName = Literal["tidar", "ar", "eagle", "block-diffusion", "masked-diffusion"]

OBJECTIVES: Final[Mapping[ObjectiveName, type[Objective]]] = {
    "tidar": TidarObjective,
    "ar": ArObjective,
    "eagle": EagleObjective,
    "block-diffusion": BlockDiffusionObjective,
    "masked-diffusion": MaskedDiffusionObjective,
}
