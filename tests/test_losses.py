"""Loss functions against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.losses import FeatureMatchingLoss, GANLoss, GeneratorOutputs, KLLoss, SegmentationGANLoss
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
    losses = gan.discriminator([fake, real])
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


SPEC = LayoutSpec(3, has_dont_care=True)
LABELS = torch.tensor([[[0, 0, 0, 1], [1, 0, 0, 3], [3, 3, 0, 0]]], dtype=torch.uint8)  # 3: don't care


def of_classes(term, logits, labels=LABELS, spec=SPEC):
    layout = SemanticLayout(spec, labels)
    scores = [Scores(logits, [])]
    empty = torch.empty(0)
    return term(GeneratorOutputs(empty, empty, scores, [], layout=layout, plan=term.plan(layout, 0, 0))).item()


def test_balanced_classes_count_alike_and_dont_care_does_not_count():
    logits = torch.randn(1, 5, 3, 4)
    each = F.cross_entropy(logits, LABELS.long() + 1, reduction="none")
    expected = (each[LABELS == 0].mean() + each[LABELS == 1].mean()) / 2
    assert of_classes(SegmentationGANLoss(), logits) == pytest.approx(expected.item(), rel=1e-6)
    assert of_classes(SegmentationGANLoss(class_balancing=False), logits) == pytest.approx(each.mean().item(), rel=1e-6)
    assert of_classes(SegmentationGANLoss(), logits, torch.full_like(LABELS, 3)) == 0
    # Where don't care has no channel it never counts: the mean is over all pixels.
    each = F.cross_entropy(logits[:, :4], LABELS.long().clamp(max=2) + 1, reduction="none").where(LABELS < 3, 0)
    term = SegmentationGANLoss(class_balancing=False)
    assert of_classes(term, logits[:, :4], spec=LayoutSpec(3)) == pytest.approx(each.mean().item(), rel=1e-6)


def test_labelmix_draws_a_bit_for_each_class_from_seed_and_position():
    term, layout = SegmentationGANLoss(), SemanticLayout(LayoutSpec(40), torch.zeros(1, 2, 2, dtype=torch.uint8))
    draws = [term.plan(layout, seed, seen).from_photo for seed, seen in ((0, 0), (0, 0), (0, 8), (1, 0))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])
    assert 10 < draws[0].sum() < 31
    mask = term.plan(SemanticLayout(SPEC, LABELS), 0, 0).mask(SemanticLayout(SPEC, LABELS))
    assert (
        mask.shape == (1, 1, 3, 4) and len({*zip(LABELS.flatten().tolist(), mask.flatten().tolist(), strict=True)}) == 3
    )
    assert SegmentationGANLoss(labelmix=0.0).plan(layout, 0, 0).mask(layout) is None


def test_accuracy_over_classes_asks_only_whether_a_pixel_is_generated():
    fake, real = torch.zeros(2, 1, 3, 2, 2)
    fake[:, 0] = 1  # all found out
    real[:, 2] = 1
    real[:, 0, 0, 0] = 2  # one of four taken for generated
    accuracy = SegmentationGANLoss().accuracy([Scores(fake, [])], [Scores(real, [])])
    assert accuracy.item() == pytest.approx((1 + 0.75) / 2)
