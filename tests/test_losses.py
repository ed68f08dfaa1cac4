"""common/losses.py: hand-computed numbers, slow loop oracles, gradients, the reference vectors with their gradients."""

import itertools
import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.autograd import gradcheck
from vectors import load

from common import losses
from common.losses import (cross_entropy, cxcywh_to_xyxy, dice_loss, focal_cost, generalized_box_iou,
                           geo_scal, lovasz_softmax, mask_cross_entropy, sem_scal, sigmoid_focal_loss)

DENSE = (cross_entropy, lovasz_softmax, geo_scal, sem_scal)
T = torch.from_numpy


pytestmark = pytest.mark.usefixtures("one_thread")


def scene(seed: int = 0, classes: int = 4, ignored: bool = True, shape=(2, 4, 3, 2)):
    """Random logits (B, K, X, Y, Z) float64 that ask for a gradient, target (B, X, Y, Z)."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape[0], classes, *shape[1:], generator=g, dtype=torch.float64, requires_grad=True)
    target = torch.randint(classes, shape, generator=g)
    if ignored:
        target[torch.rand(shape, generator=g) < 0.2] = 255
    return logits, target


def certain(target: torch.Tensor, classes: int) -> torch.Tensor:
    """Logits (B, K, ...) float64 that are right everywhere, with certainty."""
    return 60.0 * torch.nn.functional.one_hot(target.clamp_max(classes - 1), classes).movedim(-1, 1).double()


# --- what all dense losses share --------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss", DENSE)
def test_dense_losses_have_exact_gradients(loss):
    logits, target = scene(classes=3, shape=(2, 3, 2, 1))
    for options in ({}, {"per_sample": not loss.__defaults__[-1]}):
        assert gradcheck(lambda x: loss(x, target, **options), logits)


@pytest.mark.parametrize("loss", DENSE)
def test_dense_losses_vanish_on_a_perfect_prediction_and_on_nothing(loss):
    _, target = scene(1)
    assert 0 <= loss(certain(target, 4), target).item() < 1e-9
    assert loss(-certain(target, 4), target).item() > 0.5
    logits, target = scene(1)
    value = loss(logits, torch.full_like(target, 255))
    assert value.item() == 0
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.shape == logits.shape and (gradient == 0).all()


@pytest.mark.parametrize("loss", DENSE)
def test_an_ignored_voxel_changes_nothing_and_gets_no_gradient(loss):
    logits, target = scene(2)
    dropped = (target == 255)[:, None].expand_as(logits)
    other = torch.where(dropped, 100 * torch.rand_like(logits), logits).detach()
    torch.testing.assert_close(loss(other, target), loss(logits, target))
    (gradient,) = torch.autograd.grad(loss(logits, target), logits)
    assert (gradient[dropped] == 0).all() and (gradient[~dropped] != 0).any()
    small = torch.where(target == 255, 255, target).to(torch.uint8)                  # labels as files hold them
    assert loss(logits, small) == loss(logits, target)
    other_id = torch.where(target == 255, -1, target)
    assert loss(logits, other_id, ignore=-1) == loss(logits, target)


@pytest.mark.parametrize("loss", DENSE)
def test_per_sample_makes_two_processes_equal_one(loss):
    """Mean over samples: the mean of two processes' losses is the loss of the doubled batch, empty samples included."""
    logits, target = scene(3, shape=(4, 4, 3, 2))
    target[3] = 255
    one = loss(logits, target, per_sample=True)
    two = (loss(logits[:2], target[:2], per_sample=True) + loss(logits[2:], target[2:], per_sample=True)) / 2
    torch.testing.assert_close(one, two, atol=1e-14, rtol=0)
    assert loss(logits[:2], target[:2], per_sample=False) != loss(logits[:2], target[:2], per_sample=True)
    assert loss(logits[:1], target[:1], per_sample=False) == loss(logits[:1], target[:1], per_sample=True)


@pytest.mark.parametrize("loss", DENSE)
def test_half_precision_logits_are_computed_in_float32(loss):
    logits, target = scene(4)
    low = logits.detach().bfloat16().requires_grad_()
    value = loss(low, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), loss(low.detach().double(), target), atol=1e-5, rtol=1e-5)
    value.backward()
    assert low.grad.dtype == torch.bfloat16 and torch.isfinite(low.grad).all()


@pytest.mark.parametrize("loss", DENSE)
def test_certain_and_wrong_float32_logits_give_finite_gradients(loss):
    target = torch.randint(0, 3, (1, 4, 4, 4), generator=torch.Generator().manual_seed(5))
    logits = (-3 * certain(target, 3)).float().requires_grad_()                      # the truth's probability is 0
    value = loss(logits, target)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("loss", [lovasz_softmax, geo_scal, sem_scal])
@pytest.mark.parametrize("per_sample", [True, False])
def test_losses_of_one_shared_softmax_are_those_of_the_logits(loss, per_sample):
    logits, target = scene(6)
    value, shared = (loss(x, target, per_sample=per_sample, softmax=softmax)
                     for x, softmax in ((logits, True), (logits.softmax(1), False)))
    assert value == shared
    torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (value, shared)), atol=0, rtol=0)


# --- cross-entropy ----------------------------------------------------------------------------------------------------

def test_cross_entropy_by_hand():
    p = torch.tensor([[[0.5, 0.25], [0.5, 0.75]], [[0.9, 0.5], [0.1, 0.5]]], dtype=torch.float64)      # (B, K, V)
    target, weight = torch.tensor([[0, 1], [1, 255]]), torch.tensor([1.0, 3.0])
    first = (1 * math.log(2) + 3 * math.log(4 / 3)) / 4
    second = math.log(10)                                # one voxel: the weight cancels
    assert cross_entropy(p.log(), target, weight).item() == pytest.approx((first + second) / 2)
    pooled = (1 * math.log(2) + 3 * math.log(4 / 3) + 3 * math.log(10)) / 7
    assert cross_entropy(p.log(), target, weight, per_sample=False).item() == pytest.approx(pooled)


def test_cross_entropy_of_classes_without_weight_is_nothing():
    logits, _ = scene(6)
    target = torch.ones(2, 4, 3, 2, dtype=torch.long)
    value = cross_entropy(logits, target, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert value.item() == 0 and (torch.autograd.grad(value, logits)[0] == 0).all()


# --- Lovasz -----------------------------------------------------------------------------------------------------------

def jaccard_loss(wrong: torch.Tensor, foreground: torch.Tensor) -> float:
    """1 - |A n B| / |A u B| where `wrong` of the voxels are mispredicted; 0 for an empty union."""
    predicted = foreground ^ wrong
    union = int((predicted | foreground).sum())
    return 1 - int((predicted & foreground).sum()) / union if union else 0.0


def slow_lovasz(logits, target, classes):
    """The definition, voxel by voxel: sum_i e_i (J(the i worst) - J(the i - 1 worst)), class by class."""
    p, parts = logits.detach().softmax(1).movedim(1, 0).flatten(1), []
    keep = target.flatten() != 255
    p, target = p[:, keep], target.flatten()[keep]
    for c in range(len(p)):
        foreground = target == c
        if classes == "present" and not foreground.any():
            continue
        errors = (foreground.double() - p[c]).abs()
        wrong, value, before = torch.zeros_like(foreground), 0.0, 0.0
        for i in errors.argsort(descending=True):
            wrong[i] = True
            after = jaccard_loss(wrong, foreground)
            value, before = value + float(errors[i]) * (after - before), after
        parts.append(value)
    return sum(parts) / len(parts)


@pytest.mark.parametrize("classes", ["present", "all"])
def test_lovasz_equals_the_definition(classes):
    for seed in range(5):
        logits, target = scene(seed, classes=6)
        target[target == 3] = 1                           # class 3 is absent: "all" and "present" differ
        expected = slow_lovasz(logits, target, classes)
        assert lovasz_softmax(logits, target, classes=classes).item() == pytest.approx(expected, abs=1e-12)


def test_lovasz_of_hard_predictions_is_the_jaccard_loss():
    """The extension agrees with the set function at the corners of the cube (Berman et al., Sec. 2)."""
    for bits in itertools.product((0, 1), repeat=4):
        predicted, target = torch.tensor([bits]), torch.tensor([[0, 1, 1, 0]])
        wrong = predicted[0] != target[0]
        expected = sum(jaccard_loss(wrong, target[0] == c) for c in (0, 1)) / 2
        assert lovasz_softmax(certain(predicted, 2), target).item() == pytest.approx(expected, abs=1e-9)


def test_lovasz_weights_survive_float32_on_a_large_grid():
    """Differences of Jaccard losses, 1e-5 for 65,536 voxels, cancel in float32; the closed form does not."""
    g = torch.Generator().manual_seed(7)
    logits = torch.randn(1, 3, 64, 64, 16, generator=g, requires_grad=True)
    target = (torch.rand(1, 64, 64, 16, generator=g) < 0.02).long()
    value = lovasz_softmax(logits, target)
    (gradient,) = torch.autograd.grad(value, logits)
    double = logits.detach().double().requires_grad_()
    exact = lovasz_softmax(double, target)
    (expected,) = torch.autograd.grad(exact, double)
    assert value.item() == pytest.approx(exact.item(), abs=1e-6)
    assert (gradient.double() - expected).norm() / expected.norm() < 1e-3


def test_lovasz_refuses_other_class_rules():
    with pytest.raises(ValueError, match="present or all"):
        lovasz_softmax(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.long), classes="some")


@pytest.mark.gpu
@pytest.mark.parametrize("loss", DENSE)
def test_dense_losses_on_a_gpu(loss):
    logits, target = scene(11, classes=6, shape=(2, 20, 20, 8))
    (expected,) = torch.autograd.grad(loss(logits, target), logits)
    there = logits.detach().cuda().requires_grad_()
    value = loss(there, target.cuda())
    torch.testing.assert_close(value.cpu(), loss(logits, target).detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(value, there)[0].cpu(), expected, atol=1e-12, rtol=0)


# --- scene-class affinity ---------------------------------------------------------------------------------------------

def test_geo_scal_by_hand():
    # p(empty) of four voxels; the first two are occupied; the third empty; the fourth ignored
    empty = torch.tensor([[0.2, 0.5, 0.9, 0.3]], dtype=torch.float64)
    logits = torch.stack([empty, 1 - empty], 1).log()
    target = torch.tensor([[1, 1, 0, 255]])
    precision, recall, specificity = (0.8 + 0.5) / (0.8 + 0.5 + 0.1), (0.8 + 0.5) / 2, 0.9
    expected = -math.log(precision) - math.log(recall) - math.log(specificity)
    assert geo_scal(logits, target).item() == pytest.approx(expected)
    # Occ3D's way: the same scene with "free" as the last class
    flipped = torch.where(target == 255, 255, 1 - target)
    assert geo_scal(logits.flip(1), flipped, empty=1).item() == pytest.approx(expected)
    # without an empty voxel the specificity is dropped, without an occupied one only it remains
    full = torch.tensor([[1, 1, 255, 255]])
    assert geo_scal(logits, full).item() == pytest.approx(-math.log(1.0) - math.log(1.3 / 2))
    assert geo_scal(logits, torch.tensor([[0, 255, 0, 255]])).item() == pytest.approx(-math.log((0.2 + 0.9) / 2))


def test_sem_scal_equals_a_loop_over_classes():
    logits, target = scene(8, classes=5)
    target[target == 2] = 0
    p, valid = logits.detach().softmax(1), target != 255
    terms = []
    for c in range(5):
        own, probability = (target == c)[valid].double(), p[:, c][valid]
        if not own.any():
            continue
        shares = ((own * probability).sum() / probability.sum(), (own * probability).sum() / own.sum(),
                  ((1 - own) * (1 - probability)).sum() / (1 - own).sum())
        terms.append(-sum(math.log(share) for share in shares))
    assert len(terms) == 4 and sem_scal(logits, target).item() == pytest.approx(sum(terms) / 4, abs=1e-12)
    everywhere = torch.ones_like(target)                                             # no other class: no specificity
    assert sem_scal(logits, everywhere).item() == pytest.approx(-math.log(p[:, 1].mean()))


# --- focal, masks, boxes, costs ---------------------------------------------------------------------------------------

def test_focal_loss_by_hand():
    logit = math.log(0.25 / 0.75)                                                    # p = 1/4
    logits = torch.tensor([[logit, logit]], dtype=torch.float64)
    expected = [0.25 * 0.75**2 * math.log(4), 0.75 * 0.25**2 * math.log(4 / 3)]
    assert sigmoid_focal_loss(logits, torch.tensor([0]))[0].tolist() == pytest.approx(expected)
    assert sigmoid_focal_loss(logits, torch.tensor([[1.0, 0.0]]))[0].tolist() == pytest.approx(expected)
    background = sigmoid_focal_loss(logits, torch.tensor([2]))[0]
    assert background.tolist() == pytest.approx([expected[1], expected[1]])
    plain = sigmoid_focal_loss(logits, torch.tensor([0]), alpha=-1, gamma=0, reduction="mean")
    assert plain.item() == pytest.approx((math.log(4) + math.log(4 / 3)) / 2)
    with pytest.raises(ValueError, match="reduction must be"):
        sigmoid_focal_loss(logits, torch.tensor([0]), reduction="average")


def test_mask_losses_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)               # p = 1/2
    target = torch.tensor([[1, 1, 1, 0]])
    assert dice_loss(logits, target).item() == pytest.approx(1 - (2 * 1.5 + 1) / (2 + 3 + 1))
    assert mask_cross_entropy(logits, target, num_masks=2).item() == pytest.approx(math.log(2) / 2)
    assert dice_loss(logits[:0], target[:0]).item() == 0 and mask_cross_entropy(logits[:0], target[:0]).item() == 0


def test_generalized_iou_by_hand():
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    b = torch.tensor([[1.0, 1.0, 3.0, 3.0], [2.0, 0.0, 3.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    giou = generalized_box_iou(a, b)
    assert giou.shape == (3, 3)
    assert giou[0, 0].item() == pytest.approx(1 / 7 - 2 / 9)
    assert giou[1, 1].item() == pytest.approx(0 - 1 / 3)                             # a gap of one box
    assert torch.isfinite(giou).all() and giou[2, 2] == 0
    torch.testing.assert_close(generalized_box_iou(a[:2], a[:2]).diagonal(), torch.ones(2))
    assert generalized_box_iou(a[:0], b).shape == (0, 3)


def test_boxes_and_elementwise_losses_have_exact_gradients():
    g = torch.Generator().manual_seed(9)
    centre = torch.rand(5, 4, generator=g, dtype=torch.float64).add(0.2).requires_grad_()
    other = torch.rand(3, 4, generator=g, dtype=torch.float64).add(0.2)
    assert gradcheck(lambda b: generalized_box_iou(cxcywh_to_xyxy(b), cxcywh_to_xyxy(other)), centre)
    logits = torch.randn(4, 6, generator=g, dtype=torch.float64, requires_grad=True)
    target = torch.rand(4, 6, generator=g, dtype=torch.float64).round()
    for loss in (sigmoid_focal_loss, dice_loss, mask_cross_entropy):
        assert gradcheck(lambda x: loss(x, target), logits)


def test_focal_cost_equals_the_losses_of_pairs():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    ids = torch.tensor([6, 0])
    one, zero = (sigmoid_focal_loss(logits, torch.full((5, 7), value)) for value in (1.0, 0.0))
    torch.testing.assert_close(focal_cost(logits, ids), (one - zero)[:, ids], atol=1e-6, rtol=0)    # its eps is 1e-8
    assert focal_cost(logits, ids[:0]).shape == (5, 0)


# --- reference vectors ------------------------------------------------------------------------------------------------

def check(v, key: str, loss, logits, gradient_key: str | None = None) -> None:
    """Value and gradient of loss(logits) against v[key] and its gradient, 1e-9."""
    logits = T(logits).clone().requires_grad_()
    value = loss(logits)
    v.close(key, value.detach(), atol=1e-9)
    v.close(gradient_key or f"{key}_grad", torch.autograd.grad(value.sum(), logits)[0], atol=1e-9)


@pytest.mark.parametrize("case", ["A", "B", "C"])
def test_vectors_dense_losses(case):
    v = load("ssc_losses")
    logits, target, weight = v[f"{case}_logits"], T(v[f"{case}_target"]), T(v[f"{case}_ce_w"])
    for classes, (name, per_sample) in itertools.product(("present", "all"), (("batch", False), ("perimg", True))):
        check(v, f"{case}_lovasz_{classes}_{name}",
              lambda x: lovasz_softmax(x, target, classes=classes, per_sample=per_sample), logits)
    check(v, f"{case}_geo_scal", lambda x: geo_scal(x, target), logits)
    check(v, f"{case}_sem_scal", lambda x: sem_scal(x, target), logits)
    check(v, f"{case}_ce", lambda x: cross_entropy(x, target, weight, per_sample=False), logits)


def test_vectors_losses_of_edge_cases():
    v = load("ssc_losses")
    v.close("D_lovasz_present_batch", lovasz_softmax(T(v["D_logits"]), T(v["D_target"])), atol=1e-9)
    logits, target = T(v["E_logits"]), T(v["E_target"])
    v.close("E_sem_scal", sem_scal(logits, target), atol=1e-9)
    # no empty voxel: the peer raises (recorded as NaN); ours drops the specificity, precision is 1, recall remains
    assert math.isnan(v["E_geo_scal"])
    recall = (1 - logits.softmax(1)[:, 0]).mean()
    assert geo_scal(logits, target).item() == pytest.approx(-math.log(recall), abs=1e-12)


def test_vectors_lovasz_gradient_of_a_sorted_foreground():
    """The peer's lovasz_grad takes a foreground already in falling order of the errors and returns J_i - J_{i-1}."""
    v = load("ssc_losses")
    foreground = T(v["lovasz_grad_in"]).bool()                                       # (6,)
    errors = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], dtype=torch.float64)
    p, gradient = torch.where(foreground, 1 - errors, errors), torch.zeros(6, dtype=torch.float64)
    value = losses._lovasz_class(p, foreground, int(foreground.sum()), out=gradient)
    v.close("lovasz_grad_out", torch.where(foreground, -gradient, gradient), atol=1e-9)
    assert value.item() == pytest.approx(float(errors @ T(v["lovasz_grad_out"])), abs=1e-12)


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (-1, 0.0), (0.5, 1.5)])
def test_vectors_focal_loss(alpha, gamma):
    v = load("points_match_loss")
    target, key = T(v["fl_target"]), f"fl_tv_a{alpha}_g{gamma}"
    check(v, key, lambda x: sigmoid_focal_loss(x, target, alpha, gamma), v["fl_logits"])
    if alpha > 0:       # Deformable DETR: mean over queries (dim 1 of one image), sum, / boxes
        loss = sigmoid_focal_loss(T(v["fl_logits"])[None], target[None], alpha, gamma).mean(1).sum() / 3
        v.close(f"fl_ddetr_a{alpha}_g{gamma}_numboxes3", loss, atol=1e-6)


def test_vectors_focal_loss_of_the_float32_kernel():
    """mmcv's kernel takes log(1 - p) in float32, which loses digits as p nears 1: equal to 1e-6 below a logit of 2.5;
    above it the peer is up to 8e-5 from the float64 value and ours is not."""
    v = load("points_match_loss")
    logits, target = T(v["fl_logits"]).float().requires_grad_(), T(v["fl_target"])
    value = sigmoid_focal_loss(logits, target)
    off = (value.detach() - T(v["fl_mmcv_f32"])).abs()
    tame = logits.detach().abs() < 2.5
    assert tame.sum() > 20 and off[tame].max() < 1e-6
    exact = sigmoid_focal_loss(logits.detach().double(), target)
    assert (value.detach() - exact).abs().max() < 1e-6 < 7e-5 < (T(v["fl_mmcv_f32"]) - exact).abs().max()
    v.passed()
    v.close("fl_mmcv_grad_f32", torch.autograd.grad(value.sum(), logits)[0], atol=1e-6)


def test_vectors_masks_and_boxes():
    v = load("points_match_loss")
    masks = T(v["mask_tgt"])
    check(v, "m2f_dice", lambda x: dice_loss(x, masks, 4), v["mask_pred"][:4])
    check(v, "m2f_ce", lambda x: mask_cross_entropy(x, masks), v["mask_pred"][:4])
    a, b = (cxcywh_to_xyxy(T(v[f"giou_b{n}_cxcywh"])) for n in (1, 2))
    v.close("giou", generalized_box_iou(a, b), atol=1e-6)


@pytest.mark.parametrize("case", ["A", "B", "C"])
def test_vectors_matching(case):
    v = load("points_match_loss")
    for i, (logits, boxes) in enumerate(zip(T(v[f"m{case}_logits"]), T(v[f"m{case}_boxes"]))):
        ids, targets, key = T(v[f"m{case}_tl{i}"]), T(v[f"m{case}_tb{i}"]), f"m{case}_ddetr"
        classes, l1 = focal_cost(logits, ids), torch.cdist(boxes, targets, p=1)
        giou = -generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets))
        total = 2 * classes + 5 * l1 + 2 * giou
        for name, value in (("class", classes), ("l1", l1), ("giou", giou), ("all", total)):
            v.close(f"{key}_{name}_cost{i}", value, atol=1e-6)
        row, column = linear_sum_assignment(total.numpy())
        v.exact(f"{key}_row{i}", row)
        v.exact(f"{key}_col{i}", column)


def test_matter_without_a_class_teaches_that_it_is_matter_and_no_class():
    torch.manual_seed(0)
    logits, weight = torch.randn(1, 4, 6), torch.tensor([1.0, 2.0, 3.0, 9.0])
    target = torch.tensor([[0, 3, 254, 2, 255, 3]], dtype=torch.uint8)
    loss = losses.occupancy_cross_entropy(logits, target, weight, free=3, l_free=2.0)
    p, matter = logits.softmax(1)[0], 1 - logits.softmax(1)[0, 3]
    first = -(matter[[0, 2, 3]].log().sum() + 2 * p[3, [1, 5]].log().sum()) / (3 + 2 * 2)
    second = -(weight[0] * (p[0, 0] / matter[0]).log() + weight[2] * (p[2, 3] / matter[3]).log()) / 4
    assert torch.allclose(loss, first + second, atol=1e-6)
