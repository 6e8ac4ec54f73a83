"""The settings of generation of an AR model."""

from dataclasses import dataclass

from opencola.models.sampling import Sampling


@dataclass(frozen=True)
class ARSampling(Sampling):
    """Settings of generation: those that every family has."""

    owner = "an AR model"
