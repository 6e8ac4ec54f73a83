"""OpenCola: continuous latent diffusion language models (Cola DLM) and the baselines they are measured against.

The names below are the public interface (docs/guide/python.md); all else in the package may change. They load when they
are first used, so that `import opencola` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opencola.checkpoints.hub import Pretrained, from_pretrained, push_to_hub
    from opencola.errors import UserError
    from opencola.models.cola.model import Cola
    from opencola.models.cola.sampling import ColaSampling
    from opencola.run.notebook import generate, load, score, stream, train_recipe
    from opencola.text.conversations import Message
    from opencola.text.tokenizer import Tokenizer
    from opencola.version import __version__

__all__ = [
    "Cola",
    "ColaSampling",
    "Message",
    "Pretrained",
    "Tokenizer",
    "UserError",
    "__version__",
    "from_pretrained",
    "generate",
    "load",
    "push_to_hub",
    "score",
    "stream",
    "train_recipe",
]

_MODULES = {
    "Cola": "models.cola.model",
    "ColaSampling": "models.cola.sampling",
    "Message": "text.conversations",
    "Pretrained": "checkpoints.hub",
    "Tokenizer": "text.tokenizer",
    "UserError": "errors",
    "__version__": "version",
    "from_pretrained": "checkpoints.hub",
    "generate": "run.notebook",
    "load": "run.notebook",
    "push_to_hub": "checkpoints.hub",
    "score": "run.notebook",
    "stream": "run.notebook",
    "train_recipe": "run.notebook",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'opencola' has no attribute {name!r}")
    return getattr(import_module(f"opencola.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
