"""Alarms: what they measure, when they sound, when they keep quiet."""

import pytest
import torch

from imaginaire_spade.losses import GANLoss
from imaginaire_spade.models.discriminator import Scores
from imaginaire_spade.training.health import PATIENCE, Alarms
from imaginaire_spade.training.step import saturation

THRESHOLD_MODES = ("hinge", "non_saturated", "least_square", "half_least_square")


def health(accuracy: float = 0.8, fake: float = 0.02, real: float = 0.02) -> dict[str, float]:
    return {"health/d_accuracy": accuracy, "health/fake_saturation": fake, "health/real_saturation": real}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (health(accuracy=0.995), "the discriminator has won: it classifies 99.5% of the patches"),
        (health(fake=0.9), "the outputs saturate: 90% of the generated values"),
        (health(fake=0.95, real=0.8), "(real images: 80%)"),
    ],
)
def test_a_sign_that_lasts_is_told_once_per_episode(bad, message):
    alarms = Alarms()
    for _ in range(2):
        told = [alarms.check(bad) for _ in range(3 * PATIENCE)]
        assert [bool(warnings) for warnings in told] == [tick == PATIENCE - 1 for tick in range(3 * PATIENCE)]
        (warning,) = told[PATIENCE - 1]
        assert message in warning and "What to do:" in warning
        assert alarms.check(health()) == []  # the episode ends


@pytest.mark.parametrize(
    "good",
    [
        health(),
        health(accuracy=0.5),
        health(accuracy=0.95),
        health(fake=0.4),  # an over-exposed batch
        health(fake=0.85, real=0.8),  # photographs on a white ground
        health(fake=1.0, real=1.0),
    ],
)
def test_what_real_images_look_like_is_no_sign(good):
    alarms = Alarms()
    assert not any(alarms.check(good) for _ in range(4 * PATIENCE))


def test_an_interrupted_sign_is_none():
    alarms = Alarms()
    ticks = ([health(accuracy=1.0, fake=1.0)] * (PATIENCE - 1) + [health()]) * 4
    assert not any(alarms.check(tick) for tick in ticks)


def random_scores(shift: float, scale: float = 1.0) -> list[Scores]:
    generator = torch.Generator().manual_seed(round(shift * 100))
    return [Scores(scale * torch.randn(2, 1, s, s, generator=generator) + shift, []) for s in (9, 5)]


@pytest.mark.parametrize(
    ("options", "chance", "won"),
    [
        ({"mode": "hinge"}, 0.0, 3.0),
        ({"mode": "non_saturated"}, 0.0, 3.0),
        ({"mode": "least_square"}, 0.5, 3.0),
        ({"mode": "half_least_square"}, 0.5, 3.0),
        ({"mode": "wasserstein"}, 7.0, 3.0),
        ({"mode": "hinge", "relative": True}, -4.0, 3.0),
    ],
)
def test_accuracy_is_one_half_by_chance_and_one_when_the_discriminator_has_won(options, chance, won):
    gan = GANLoss(**options)
    assert 0.35 < gan.accuracy(random_scores(chance), random_scores(chance + 0.01)) < 0.65
    fake, real = random_scores(chance - won, 0.5), random_scores(chance + won, 0.5)
    assert gan.accuracy(fake, real) == 1
    assert gan.accuracy(real, fake) == 0
    beside = gan.accuracy(random_scores(chance + 10), random_scores(chance + 10 + 2 * won, 0.5))
    assert beside == pytest.approx(0.5 if options in ({"mode": m} for m in THRESHOLD_MODES) else 1, abs=0.03)


def test_saturation_counts_black_and_white_values():
    images = torch.full((2, 3, 4, 4), 0.98)
    images[0] = 1.0
    images[1, 0] = -0.999
    assert saturation(images) == pytest.approx(0.5 + 1 / 6)
    assert not saturation(images.requires_grad_()).requires_grad
