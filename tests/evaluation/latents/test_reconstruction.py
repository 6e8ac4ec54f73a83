import math

import numpy as np
import pytest
import torch
from torch import Tensor

from opencola.evaluation.latents.reconstruction import pack_documents, principal_plane, reconstruct

DOCUMENTS = [[3, 4, 0], [5, 6, 7, 8, 0], [9, 0]]


def test_rows_are_packed_as_in_training() -> None:
    packed = pack_documents(DOCUMENTS, 4)
    assert packed.tokens.tolist() == [
        [3, 4, 0, 5, 6, 7, 8, 0],
        [5, 6, 7, 8, 0, 9, 0, 3],
        [9, 0, 3, 4, 0, 5, 6, 7],
    ]
    assert packed.scored.sum(1).tolist() == [3, 5, 2]
    assert packed.scored[1].tolist() == [True] * 5 + [False] * 3
    with pytest.raises(ValueError, match="no documents"):
        pack_documents([], 4)


def encode(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """One latent for two tokens: the tokens themselves, as numbers, with a variance."""
    mean = tokens.float().unflatten(1, (-1, 2))
    return mean, torch.full_like(mean, 0.01)


def decode(z: Tensor) -> Tensor:
    """The nearest whole number is the token."""
    return -(z.flatten(1)[..., None] - torch.arange(10)).abs()


def test_reconstruction_of_a_known_vae() -> None:
    packed = pack_documents(DOCUMENTS, 4)
    result = reconstruct(packed, encode, decode, seed=0, batch_size=2)
    assert (result.from_mean, result.from_sample, result.count) == (10, 10, 10)  # 5 standard deviations to an error
    # patches that hold a scored token: (3 4)(0 5) (5 6)(7 8)(0 9) (9 0); the rest must not count
    signal = np.mean(np.square([3, 4, 0, 5, 5, 6, 7, 8, 0, 9, 9, 0]))
    assert result.logsnr == pytest.approx(math.log(signal / 0.01), rel=1e-5)


def test_only_scored_tokens_count_as_errors() -> None:
    packed = pack_documents(DOCUMENTS, 4)
    never_seven = lambda z: decode(z).index_fill(-1, torch.tensor([7]), -1e9)  # noqa: E731
    assert (packed.tokens == 7).sum() == 3
    assert reconstruct(packed, encode, never_seven, seed=0).from_mean == 9


def test_noise_shows_in_samples_alone_and_depends_on_the_seed() -> None:
    packed = pack_documents([[i % 10 for i in range(100)]], 4)

    def noisy(tokens: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = encode(tokens)
        return mean, variance * 100

    results = [reconstruct(packed, noisy, decode, seed) for seed in (0, 0, 1)]
    assert all(result.from_mean == 100 and 20 < result.from_sample < 80 for result in results)
    assert results[0] == results[1] != results[2]


def test_principal_plane() -> None:
    random = np.random.default_rng(0)
    plane = random.normal(size=(50, 2)) * [3, 1]
    turn, _ = np.linalg.qr(random.normal(size=(5, 5)))
    found = principal_plane("animal", plane @ turn[:2] + 7, ["dog"] * 50)
    assert found.explained == pytest.approx(1.0)
    distance = np.linalg.norm(found.points[:, None] - found.points, axis=-1)
    assert distance == pytest.approx(np.linalg.norm(plane[:, None] - plane, axis=-1))
    assert found.points[:, 0].std() > found.points[:, 1].std()
    spread = principal_plane("animal", np.eye(4), ["dog"] * 4)
    assert spread.explained == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least 3 latents, not 2"):
        principal_plane("animal", np.eye(2), ["dog"] * 2)
