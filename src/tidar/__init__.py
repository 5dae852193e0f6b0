"""TiDAR: think in diffusion, talk in autoregression (arXiv 2511.08923).

    import tidar
    model = tidar.load()
    print(model.generate("def fib(n):").text)

Importing is light: torch and the rest load when a name below is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from tidar.errors import TidarError

if TYPE_CHECKING:
    from tidar.api import LanguageModel, Output, StreamEvent, load
    from tidar.layout import Schedule
    from tidar.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LanguageModel",
    "Output",
    "SamplingParams",
    "Schedule",
    "StreamEvent",
    "TidarError",
    "__version__",
    "load",
]

_HOMES = {
    "LanguageModel": "tidar.api",
    "Output": "tidar.api",
    "SamplingParams": "tidar.sampling",
    "Schedule": "tidar.layout",
    "StreamEvent": "tidar.api",
    "load": "tidar.api",
}


def __getattr__(name: str) -> object:
    """Loads a public name from its module on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tidar' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
