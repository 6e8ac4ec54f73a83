"""What a server admits of a request."""

from dataclasses import dataclass

from opencola.ranges import Count, Positive, check

KEY = "OPENCOLA_API_KEY"
"""The variable of the environment that holds what clients must know."""


@dataclass(frozen=True)
class Admission:
    """How much a request may bring, ask for and take."""

    max_body: Count = 2 * 2**20
    """Bytes of a request's body, at most."""
    max_work: Count = 4096
    """Passes of the network that a block may cost, at most: steps times candidates, or a LLaDA's tokens of a block. No
    less than the model's own settings ask for."""
    timeout: Positive = 600.0
    """Seconds for a request, from its arrival to the end of its answer."""

    def __post_init__(self) -> None:
        check(self)
