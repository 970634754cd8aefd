"""Loss functions against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from imaginaire_spade.losses import FeatureMatchingLoss, GANLoss, GeneratorOutputs, KLLoss
from imaginaire_spade.models.discriminator import Scores

torch.manual_seed(0)
FAKE = [torch.randn(2, 1, 5, 5), torch.randn(2, 1, 3, 3)]
REAL = [torch.randn(2, 1, 5, 5), torch.randn(2, 1, 3, 3)]


def outputs(fake=(), real=(), mu=None, logvar=None):
    return GeneratorOutputs(torch.empty(0), torch.empty(0), list(fake), list(real), mu, logvar)


def both_scales(function):
    return (function(FAKE[0], REAL[0]) + function(FAKE[1], REAL[1])) / 2


FORMULAS = {  # mode: generator's loss, discriminator's of fake, of real
    "hinge": (
        lambda f, r: -f.mean(),
        lambda f, r: (1 + f).clamp(min=0).mean(),
        lambda f, r: (1 - r).clamp(min=0).mean(),
    ),
    "least_square": (
        lambda f, r: ((f - 1) ** 2).mean(),
        lambda f, r: (f**2).mean(),
        lambda f, r: ((r - 1) ** 2).mean(),
    ),
    "half_least_square": (
        lambda f, r: ((f - 1) ** 2).mean() / 2,
        lambda f, r: (f**2).mean() / 2,
        lambda f, r: ((r - 1) ** 2).mean() / 2,
    ),
    "non_saturated": (
        lambda f, r: -F.logsigmoid(f).mean(),
        lambda f, r: -F.logsigmoid(-f).mean(),
        lambda f, r: -F.logsigmoid(r).mean(),
    ),
    "wasserstein": (lambda f, r: -f.mean(), lambda f, r: f.mean(), lambda f, r: -r.mean()),
}


@pytest.mark.parametrize("mode", FORMULAS)
def test_adversarial_losses(mode):
    generator, of_fake, of_real = FORMULAS[mode]
    gan, fake, real = GANLoss(mode=mode), [Scores(x, []) for x in FAKE], [Scores(x, []) for x in REAL]
    torch.testing.assert_close(gan(outputs(fake, real)), both_scales(generator))
    losses = gan.discriminator(fake, real)
    torch.testing.assert_close(losses["d_fake"], both_scales(of_fake))
    torch.testing.assert_close(losses["d_real"], both_scales(of_real))


def test_feature_matching_sums_layers_averages_scales_and_leaves_the_real_side_alone():
    fake = [torch.randn(2, c, 4, 4, requires_grad=True) for c in (3, 5)]
    real = [torch.randn(2, c, 4, 4, requires_grad=True) for c in (3, 5)]
    logits = torch.zeros(2, 1, 4, 4)
    loss = FeatureMatchingLoss()(outputs([Scores(logits, fake)] * 2, [Scores(logits, real)] * 2))
    torch.testing.assert_close(loss, sum((f - r).abs().mean() for f, r in zip(fake, real, strict=True)))
    loss.backward()
    assert all(f.grad is not None for f in fake) and all(r.grad is None for r in real)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distances_are_those_of_torch_to_the_bit_and_keep_no_copies(dtype):
    fake, real = ([t.to(dtype) for t in side] for side in (FAKE, REAL))
    fake[0][0] = real[0][0]  # no difference: no gradient
    gradients, kept = [], []

    def of_torch(o):
        pairs = zip(o.fake_scores, o.real_scores, strict=True)
        return torch.stack([F.l1_loss(f.features[0].float(), r.features[0].float()) for f, r in pairs]).sum() / 2

    for term in (FeatureMatchingLoss(), of_torch):
        features = [t.clone().requires_grad_() for t in fake]
        with saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
            loss = term(outputs([Scores(f, [f]) for f in features], [Scores(r, [r]) for r in real]))
        if not gradients:
            assert set(kept) == {t.data_ptr() for t in [*features, *real]}
        (3 * loss).backward()
        gradients.append([loss.detach(), *(t.grad for t in features)])
    assert all(map(torch.equal, *gradients))


def test_kl_is_zero_for_the_standard_normal_and_agrees_with_torch():
    kl, zeros = KLLoss(), torch.zeros(3, 4)
    assert kl(outputs(mu=zeros, logvar=zeros)).item() == 0
    mu, logvar = torch.randn(3, 4), torch.randn(3, 4)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    ).sum()
    torch.testing.assert_close(kl(outputs(mu=mu, logvar=logvar)), expected / 3)
