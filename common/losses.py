"""Losses and matching costs that at least two papers use, as the field computes them.

    Symbol      Name             Meaning                                                    Source
    p           p                probability: softmax over classes, or sigmoid              -
    e           errors           |[target = c] - p_c| of each voxel                         Lovasz, Def. 2
    J           (inside)         Jaccard loss 1 - |A n B| / |A u B|                         Lovasz, Sec. 2
    G           size             number of voxels of class c in the target                  -

Dense losses take logits (B, K, ...) and target (B, ...), class ids in [0, K) of any integer dtype; `ignore` drops
voxels. A target in which everything is ignored gives 0 with a zero gradient. softmax=False: Lovasz and scal losses take
probabilities, so that several share one softmax. `per_sample` takes the mean of the samples' losses, so that two
processes equal one with the doubled batch; without it a batch is pooled, as the peers do.
Half-precision logits are computed in float32; sums over voxels are taken in float64.

Sources: Berman et al., The Lovasz-softmax loss (CVPR 2018); Cao and de Charette, MonoScene (CVPR 2022), Sec. 3.4;
Lin et al., Focal loss (ICCV 2017); Carion et al., DETR (ECCV 2020); Cheng et al., Mask2Former (CVPR 2022).
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


# --- dense losses: (B, K, ...) logits, (B, ...) ids -------------------------------------------------------------------

def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None = None, ignore: int = 255,
                  per_sample: bool = True) -> Tensor:
    """Class-weighted cross-entropy: sum_v w_{t_v} (-log p_{t_v}) / sum_v w_{t_v} over the valid voxels v.

    logits (B, K, ...), target (B, ...), weight (K,). Per sample by default (the one loss here that is): the weighted
    mean of each sample, then the mean over samples; a sample with nothing valid counts as 0. per_sample=False pools.
    """
    logits, target = _wide(logits), target.long()
    weight = logits.new_ones(logits.shape[1]) if weight is None else weight.to(logits)
    loss = F.cross_entropy(logits, target, weight, ignore_index=ignore, reduction="none")     # (B, ...)
    valid = target != ignore
    mass = weight[torch.where(valid, target, 0)] * valid                                      # (B, ...)
    shape = (len(logits), -1) if per_sample else (1, -1)
    total, mass = (v.reshape(shape).sum(1, dtype=torch.float64) for v in (loss, mass))        # (B,) or (1,)
    return torch.where(mass > 0, total / mass.where(mass > 0, 1.0), 0.0).mean().to(logits.dtype)


def occupied_or_free(logits: Tensor, free: int) -> Tensor:
    """(B, K, ...) with class `free` last -> (B, 2, ...): the logits of occupied, by any class, and of free."""
    return torch.stack([logits[:, :free].logsumexp(1), logits[:, free]], 1)


def occupancy_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor, free: int, l_free: float = 1.0,
                            ignore: int = 255) -> Tensor:
    """Cross-entropy in its two factors, p(t) = p(occupied) p(t | occupied): the mean of the first over all voxels and
    the weighted mean of the second over occupied ones. Class `free` is the last; weight (K,), free's is not used; in
    the first factor a free voxel counts l_free times. An id above `free` is matter without a class.

    Weights by frequency balance the classes here, and leave occupied against free as it is. In one weighted sum free,
    which is nine voxels in ten, weighs so little that networks fill space: every surface becomes several voxels thick.
    """
    logits, empty = _wide(logits), target == free
    known = torch.where(target == ignore, ignore, empty.to(torch.uint8))
    taken = cross_entropy(occupied_or_free(logits, free), known, logits.new_tensor([1.0, l_free]), ignore)
    return taken + cross_entropy(logits[:, :free], target.masked_fill(target >= free, ignore), weight[:free], ignore)


def lovasz_softmax(logits: Tensor, target: Tensor, ignore: int = 255, classes: str = "present",
                   per_sample: bool = False, softmax: bool = True) -> Tensor:
    """Lovasz-softmax: for each class the convex extension of its Jaccard loss, and the mean over classes.

    logits (B, K, ...) (softmax inside), target (B, ...). classes "present" averages over the classes in the target,
    "all" over all K. per_sample averages the samples' losses.

    With errors e sorted downwards, loss_c = sum_i e_i (J_i - J_{i-1}), J_i the Jaccard loss if the i worst voxels are
    wrong (Def. 2). The differences depend on the order alone: they are the gradient, up to the sign of e. So values
    are summed without a graph, and all that autograd sees is one product of p with W (K, V).
    """
    if classes not in ("present", "all"):
        raise ValueError(f"classes must be present or all, got {classes}")
    if per_sample:
        return _mean_over_samples(lovasz_softmax, logits, target, ignore, classes, False, softmax)
    p = _probability(logits, softmax).movedim(1, 0).flatten(1)                                # (K, V)
    target = target.long().flatten()
    valid = target != ignore
    if not valid.all():
        p, target = p[:, valid], target[valid]
    with torch.no_grad():
        sizes = torch.bincount(target, minlength=len(p)).tolist()                             # G of each class
        counted = [c for c in range(len(p)) if sizes[c] or (classes == "all" and len(target))]
        W = torch.zeros_like(p)
        terms = [(p[c], target == c, sizes[c], W[c]) for c in counted]
        threads = min(torch.get_num_threads(), len(counted)) if p.device.type == "cpu" else 1
        if threads > 1:  # a class sorts on one core
            with ThreadPoolExecutor(threads) as pool:
                losses = list(pool.map(lambda term: _lovasz_class(*term), terms))
        else:
            losses = [_lovasz_class(*term) for term in terms]
        loss = sum(losses, p.new_zeros((), dtype=torch.float64))
    linear = (W * p).sum()
    return (loss.to(p.dtype) + linear - linear.detach()) / max(len(counted), 1)              # value loss, gradient W


@torch.no_grad()                        # of the thread it runs in
def _lovasz_class(p: Tensor, foreground: Tensor, size: int, out: Tensor) -> Tensor:
    """One class: p (V,), foreground (V,) bool with `size` = G voxels set, out (V,) zeros -> loss () float64.
    Writes its gradient to out: J_i - J_{i-1}, negative on the foreground, where e = 1 - p.

    After i voxels the intersection is I = G - (foreground so far) and the union U = G + (background so far). The
    difference is taken without cancellation: 1 / U for a foreground voxel, I / (U (U - 1)) for a background voxel.
    So the voxels below every foreground voxel (I = 0) weigh nothing and are not sorted.
    """
    if size == 0:                       # "all": U = 0 before the first voxel, the worst one carries the whole loss
        out[p.argmax()] = 1.0
        return p.max().double()
    errors = torch.where(foreground, 1 - p, p)
    ranked = (errors >= errors.where(foreground, math.inf).min()).nonzero()[:, 0]             # (n,)
    errors = errors[ranked]
    # numpy's vectorised argsort is several times faster than torch.sort on a CPU
    order = torch.from_numpy(np.argsort(-errors.numpy())) if p.device.type == "cpu" else errors.argsort(descending=True)
    ranked = ranked[order]
    wrong = foreground[ranked]                                                                # (n,) in falling order
    hits = wrong.cumsum(0)
    union = (size + torch.arange(1, len(ranked) + 1, device=p.device) - hits).double()
    weight = torch.where(wrong, 1 / union, (size - hits) / (union * (union - 1).clamp_min(1)))
    out[ranked] = torch.where(wrong, -weight, weight).to(out.dtype)
    return weight @ errors[order].double()


def geo_scal(logits: Tensor, target: Tensor, empty: int = 0, ignore: int = 255, per_sample: bool = False,
             softmax: bool = True) -> Tensor:
    """MonoScene's geometric scene-class affinity: -log of the soft precision, recall and specificity of "occupied".

    logits (B, K, ...), target (B, ...); Occ3D passes empty=17. The peer raises on 0/0, so these cases are ours: without
    an empty voxel the specificity is dropped; without an occupied one precision (0, whatever is predicted) and recall.
    """
    if per_sample:
        return _mean_over_samples(geo_scal, logits, target, empty, ignore, False, softmax)
    free = _probability(logits, softmax)[:, empty]                                            # (B, ...)
    valid = target != ignore
    vacant = valid & (target == empty)
    taken = valid & (target != empty)
    p = 1 - free
    hit = _sum(p * taken)
    loss = free.sum(dtype=torch.float64) * 0                                                  # keeps the graph
    if taken.any():
        loss = loss + _minus_log(hit, _sum(p * valid)) + _minus_log(hit, taken.sum())         # precision, recall
    if vacant.any():
        loss = loss + _minus_log(_sum(free * vacant), vacant.sum())                           # specificity
    return loss.to(free.dtype)


def sem_scal(logits: Tensor, target: Tensor, ignore: int = 255, per_sample: bool = False,
             softmax: bool = True) -> Tensor:
    """MonoScene's semantic scene-class affinity: precision, recall and specificity of each class in the target, as in
    `geo_scal` (specificity dropped where the class is everywhere), and the mean over these classes, empty included.

    logits (B, K, ...), target (B, ...). Three sums per class in two passes over the voxels.
    """
    if per_sample:
        return _mean_over_samples(sem_scal, logits, target, ignore, False, softmax)
    p = _probability(logits, softmax).flatten(2)                                              # (B, K, V)
    target = target.long().flatten(1)                                                         # (B, V)
    valid = target != ignore
    target = torch.where(valid, target, 0)
    own = (p.gather(1, target[:, None])[:, 0] * valid).double()                               # (B, V) p of the truth
    K = p.shape[1]
    hit = torch.zeros(K, dtype=torch.float64, device=p.device).index_add(0, target.flatten(), own.flatten())
    predicted = (p if valid.all() else p * valid[:, None]).sum((0, 2), dtype=torch.float64)   # (K,)
    count = torch.bincount(target[valid], minlength=K)                                        # (K,)
    others = count.sum() - count
    terms = torch.where(predicted > 0, _minus_log(hit, predicted), 0.0) + _minus_log(hit, count.clamp_min(1))
    terms = terms + torch.where(others > 0, _minus_log(others - (predicted - hit), others.clamp_min(1)), 0.0)
    present = count > 0
    return (torch.where(present, terms, 0.0).sum() / present.sum().clamp_min(1)).to(p.dtype)


def _wide(logits: Tensor) -> Tensor:
    """float16 and bfloat16 become float32."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _probability(logits: Tensor, softmax: bool) -> Tensor:
    """(B, K, ...) -> the same: softmax over classes, unless that was taken already."""
    return _wide(logits).softmax(1) if softmax else logits


def _sum(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.float64)


def _minus_log(part: Tensor, whole: Tensor) -> Tensor:
    """-log(part / whole) in float64, at most 100 (as torch's binary cross-entropy), where its gradient ends."""
    share = part / (whole.clamp_min(1e-300) if whole.is_floating_point() else whole)
    return -share.clamp_min(math.exp(-100)).log()


def _mean_over_samples(loss, logits: Tensor, target: Tensor, *options) -> Tensor:
    """The mean of `loss` over the samples of a batch, each by itself."""
    return torch.stack([loss(logits[b : b + 1], target[b : b + 1], *options) for b in range(len(logits))]).mean()


# --- focal, masks, boxes ----------------------------------------------------------------------------------------------

def sigmoid_focal_loss(logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0,
                       reduction: str = "none") -> Tensor:
    """Focal loss alpha_t (1 - p_t)^gamma (-log p_t), p_t the probability of the truth, per element and class.

    logits (..., K); target of the same shape in [0, 1], or class ids (...,), where K means background (no class).
    alpha < 0 switches the weighting off. reduction: none (logits' shape), mean, sum.
    """
    logits = _wide(logits)
    if target.dim() == logits.dim() - 1:
        target = F.one_hot(target.long(), logits.shape[-1] + 1)[..., :-1]
    target = target.to(logits.dtype)
    p = logits.sigmoid()
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    loss = loss * (1 - (p * target + (1 - p) * (1 - target))) ** gamma
    if alpha >= 0:
        loss = loss * (alpha * target + (1 - alpha) * (1 - target))
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be none, mean or sum, got {reduction}")
    return loss if reduction == "none" else getattr(loss, reduction)()


def dice_loss(logits: Tensor, target: Tensor, num_masks: float | None = None) -> Tensor:
    """Mask2Former's dice: 1 - (2 sum p t + 1) / (sum p + sum t + 1) per mask, summed over masks / num_masks.

    logits, target (M, ...) of one shape; num_masks defaults to M (at least 1).
    """
    p, target = _wide(logits).sigmoid().flatten(1), target.flatten(1).to(_wide(logits).dtype)
    dice = 1 - (2 * (p * target).sum(1) + 1) / (p.sum(1) + target.sum(1) + 1)                 # (M,)
    return dice.sum() / (max(len(dice), 1) if num_masks is None else num_masks)


def mask_cross_entropy(logits: Tensor, target: Tensor, num_masks: float | None = None) -> Tensor:
    """Mask2Former's mask BCE: mean over a mask's pixels, summed over masks / num_masks. Shapes as `dice_loss`."""
    logits = _wide(logits)
    loss = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none").flatten(1).mean(1)
    return loss.sum() / (max(len(loss), 1) if num_masks is None else num_masks)


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Boxes (..., 4): centre and size -> two corners."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def generalized_box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Boxes a (M, 4), b (N, 4) as x1 y1 x2 y2 -> (M, N) GIoU = IoU - (hull - union) / hull, in [-1, 1].

    Boxes without an area have IoU 0 with everything; two equal points have GIoU 0.
    """
    tiny = torch.finfo(a.dtype).tiny
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(1), (b[:, 2:] - b[:, :2]).prod(1)
    a, b = a[:, None], b[None]
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = area_a[:, None] + area_b[None] - overlap
    return overlap / union.clamp_min(tiny) - (hull - union) / hull.clamp_min(tiny)


# --- costs of matching Q predictions to T targets, (Q, T), for scipy's linear_sum_assignment --------------------------


def focal_cost(logits: Tensor, ids: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Deformable DETR: focal loss of "is class c" minus that of "is not". logits (Q, K), ids (T,) -> (Q, T)."""
    p = logits.sigmoid()[:, ids.long()]
    present = alpha * (1 - p) ** gamma * -(p + 1e-8).log()
    absent = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    return present - absent
