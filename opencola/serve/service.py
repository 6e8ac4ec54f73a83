"""What a server is made of: an engine, whose model it is, and what it admits."""

from dataclasses import dataclass, field

from opencola.models.sampling import Sampling
from opencola.serve.engine import Engine
from opencola.serve.grammar import Grammars
from opencola.serve.metrics import Metrics
from opencola.version import __version__


@dataclass
class Service:
    """An engine, and how it is offered."""

    engine: Engine
    name: str
    """What requests call the model."""
    sampling: Sampling
    """The model's own settings, of its family's class."""
    fingerprint: str = f"opencola-{__version__}"
    """Of weights and code: with the same one, a seed gives the same text."""
    api_key: str | None = None
    """What clients must know; None: nothing."""
    max_body: int = 2 * 2**20
    """Bytes of a request's body, at most."""
    max_work: int = 4096
    """What a block may cost, at most (`Sampling.work`); no less than the model's own settings ask for."""
    timeout: float = 600.0
    """Seconds for a request, from its arrival to the end of its answer."""
    metrics: Metrics = field(init=False)
    grammars: Grammars = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine)
        self.grammars = Grammars(self.engine.tokenizer)
