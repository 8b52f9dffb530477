"""Losses of vectors: of all rows of a step together, whatever its micro-batches.

The vectors of a step are computed first without gradient. Its loss then has a gradient by each vector,
and every micro-batch computes its vectors again, draws the same dropout, and takes its own part of
that gradient as weights: the gradient of one large batch in the memory of a small one (Gao et al.
2021, arXiv 2101.06983, section 3).
"""

# B rows, L texts (of each row its anchor, its positive, its negatives), M documents, D vector size

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from tunesmith.recipe.objectives import Embed
from tunesmith.tasks.preference_losses import measured, values_of
from tunesmith.tasks.task import Losses, Terms
from tunesmith.types import Batch, Measured

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.parallel.world import World

SCORED = ("cosent", "angle", "cosine")
"""Losses of two texts and their score; the others are of an anchor and its positive."""
ALONE = ("cosine", "margin")
"""Losses of each row by itself."""
EMBED_USUAL = Embed(loss="ranking", normalize=True, pooling="mean")
_ODD = 0x9E3779B97F4A7C15 - 2**64
"""A factor by which two keys make one."""


class Texts(NamedTuple):
    """The texts of some rows, row after row, each with its anchor first and its positive second."""

    vectors_LD: Tensor
    keys_L: Tensor
    """int64, equal for equal texts, whatever prompt stands before them."""
    counts_B: Tensor
    """int64, texts of each row."""
    scores_B: Tensor
    """Scores of the rows; any numbers where they have none."""

    @property
    def anchors_B(self) -> Tensor:
        """Index of each anchor among the texts."""
        return self.counts_B.cumsum(0) - self.counts_B


def embed(model: nn.Module, batch: Batch, options: Embed) -> Tensor:
    """[L, D] float32, the vectors of a batch."""
    from torch.nn import functional as F

    from tunesmith.models.forward import hidden_at_targets
    from tunesmith.models.pooling import pool

    assert options.pooling != "auto", "pooling is decided before a model is loaded"
    vectors_LD = pool(hidden_at_targets(model, batch), batch, options.pooling)
    return F.normalize(vectors_LD, dim=-1) if options.normalize else vectors_LD


def texts_of(batch: Batch, vectors_LD: Tensor) -> Texts:
    """The texts of a batch."""
    from tunesmith.models.pooling import count_each

    assert batch.line_of_N is not None, "rows of texts have branches"
    assert batch.keys_L is not None, "and their texts keys"
    row_of_L = batch.row_of_N.new_zeros(len(batch.lengths))
    row_of_L[batch.line_of_N] = batch.row_of_N
    return Texts(
        vectors_LD,
        batch.keys_L,
        count_each(row_of_L, len(batch.row_indices)),
        values_of(batch)[:, 0].to(vectors_LD.dtype),
    )


def text_losses(texts: Texts, options: Embed) -> Tensor:
    """[B], the loss of each row in the company of all of them; of cosent and angle the same for each."""
    from torch.nn import functional as F

    if not options.dims:
        return _losses(texts, options)
    cut = [texts._replace(vectors_LD=F.normalize(texts.vectors_LD[:, :dim], dim=-1)) for dim in options.dims]
    return sum((_losses(shorter, options) for shorter in cut[1:]), _losses(cut[0], options))


def _losses(texts: Texts, options: Embed) -> Tensor:
    """Sources: docs/guide/embeddings.md."""
    import torch
    from torch.nn import functional as F

    if options.loss in ("ranking", "auto"):
        return _ranking(texts, options)
    anchors_B = texts.anchors_B
    a_BD, b_BD = texts.vectors_LD[anchors_B], texts.vectors_LD[anchors_B + 1]
    if options.loss == "margin":
        negatives_BD = texts.vectors_LD[anchors_B + 2]
        return ((a_BD * b_BD).sum(-1) - (a_BD * negatives_BD).sum(-1) - texts.scores_B).square()
    a_BD, b_BD = F.normalize(a_BD, dim=-1), F.normalize(b_BD, dim=-1)
    similar_B = (a_BD * b_BD).sum(-1)
    if options.loss == "cosine":
        return (similar_B - texts.scores_B).square()
    if options.loss == "angle":  # halves of a vector as real and imaginary parts: cosine and sine of the angle
        (a_re, a_im), (b_re, b_im) = (F.pad(x, (0, x.shape[1] % 2)).chunk(2, dim=1) for x in (a_BD, b_BD))
        similar_B = (similar_B + (a_im * b_re - a_re * b_im).sum(-1)).abs()
    similar_B = options.scale * similar_B
    differences_BB = similar_B[None, :] - similar_B[:, None]
    counts_BB = texts.scores_B[:, None] > texts.scores_B[None, :]
    differences_BB = differences_BB.masked_fill(~counts_BB, float("-inf"))
    loss = torch.logsumexp(torch.cat([similar_B.new_zeros(1), differences_BB.flatten()]), 0)
    return loss.expand(len(similar_B))


def _ranking(texts: Texts, options: Embed) -> Tensor:
    """Cross-entropy of each anchor's positive among all documents. Those that are the same text as its anchor,
    or a positive of the same anchor text in another row, are not negatives."""
    import torch
    from torch.nn import functional as F

    anchors_B, keys_L = texts.anchors_B, texts.keys_L
    is_anchor_L = torch.zeros_like(keys_L)
    is_anchor_L[anchors_B] = 1
    # Nobody waits for a card here.
    documents = torch.argsort(is_anchor_L, stable=True)[: len(keys_L) - len(anchors_B)]
    rows_B = torch.arange(len(anchors_B), device=keys_L.device)
    own_B = anchors_B - rows_B  # among the documents
    vectors_LD = F.normalize(texts.vectors_LD, dim=-1)
    queries_B, documents_M = keys_L[anchors_B], keys_L[documents]
    belongs_BM = _is_in(queries_B[:, None] * _ODD + documents_M, queries_B * _ODD + documents_M[own_B])
    hidden_BM = belongs_BM | (documents_M == queries_B[:, None])
    hidden_BM[rows_B, own_B] = False
    scores_BM = options.scale * vectors_LD[anchors_B] @ vectors_LD[documents].T
    scores_BM = scores_BM.masked_fill(hidden_BM, float("-inf"))
    losses_B = F.cross_entropy(scores_BM, own_B, reduction="none")
    if not options.symmetric:
        return losses_B
    return (losses_B + F.cross_entropy(scores_BM[:, own_B].T, rows_B, reduction="none")) / 2


def _is_in(asked_BM: Tensor, known_B: Tensor) -> Tensor:
    """bool [B, M], as `torch.isin`, which would wait for a card."""
    import torch

    known_B = known_B.sort().values
    return known_B[torch.searchsorted(known_B, asked_BM).clamp_max(len(known_B) - 1)] == asked_BM


def embedding_loss_sum(model: nn.Module, batch: Batch, *, options: Embed = EMBED_USUAL) -> Tensor:
    """Sum of the losses of a batch whose rows are all that there are."""
    return text_losses(texts_of(batch, embed(model, batch, options)), options).sum()


def embedding_measure(model: nn.Module, batch: Batch, *, options: Embed = EMBED_USUAL) -> Measured:
    """The vectors of each row, as a NumPy array [texts, D] under "vectors". Losses follow from all rows: see
    `evaluation.retrieval`."""
    import torch

    with torch.no_grad():
        texts = texts_of(batch, embed(model, batch, options))
    parts = torch.split(texts.vectors_LD.cpu(), texts.counts_B.tolist())
    return measured(torch.zeros(len(parts)), {"vectors": [part.numpy() for part in parts]})


def prepass(
    model: nn.Module, batches: Iterable[Batch], world: World, *, options: Embed = EMBED_USUAL
) -> partial[Tensor]:
    """The `loss_sum` of the micro-batches of a step. Of a step that is one
    micro-batch, nothing is computed twice."""
    import torch

    batches = list(batches)
    if world.size == 1 and len(batches) == 1:
        return partial(embedding_loss_sum, options=options)
    of_batches = [texts_of(batch, embed(model, batch, options)) for batch in batches]
    names = [name for batch in batches for name in zip(batch.row_indices, batch.copies_B, strict=True)]
    if not of_batches:  # of several ranks this one has no row in the step
        size = int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr,operator]
        none = torch.empty(0, dtype=torch.int64)
        of_batches = [Texts(torch.empty(0, size), none, none, torch.empty(0))]
    texts, start = _of_all_ranks(joined(of_batches), world)
    with torch.enable_grad():
        vectors_LD = texts.vectors_LD.detach().requires_grad_()
        losses_B = text_losses(texts._replace(vectors_LD=vectors_LD), options)
        (gradient_LD,) = torch.autograd.grad(losses_B.sum(), vectors_LD)
    parts = torch.split(gradient_LD, texts.counts_B.tolist())[start : start + len(names)]
    by_row = dict(zip(names, zip(parts, losses_B.detach()[start : start + len(names)], strict=True), strict=True))
    return partial(_kept_loss_sum, kept=by_row, options=options)


def _kept_loss_sum(
    model: nn.Module, batch: Batch, *, kept: Mapping[tuple[int, int], tuple[Tensor, Tensor]], options: Embed
) -> Tensor:
    """A sum whose value is the share of these rows in the loss of the step, and
    whose gradient is their part of its."""
    import torch

    gradients, losses = zip(*(kept[name] for name in zip(batch.row_indices, batch.copies_B, strict=True)), strict=True)
    weighted = (embed(model, batch, options) * torch.cat(gradients)).sum()
    return (torch.stack(losses).sum() - weighted).detach() + weighted


def joined(found: Sequence[Texts]) -> Texts:
    """All of these texts."""
    import torch

    return Texts(*map(torch.cat, zip(*found, strict=True)))


def _of_all_ranks(own: Texts, world: World) -> tuple[Texts, int]:
    """The texts of all processes, in order of ranks, and the place of the first own row."""
    from safetensors.torch import load, save

    if world.size == 1:
        return own, 0
    contents = world.gather(save({key: values.cpu().contiguous() for key, values in own._asdict().items()}))
    device = own.vectors_LD.device
    ranks = [Texts(**{key: values.to(device) for key, values in load(content).items()}) for content in contents]
    return joined(ranks), sum(len(content.counts_B) for content in ranks[: world.rank])


def losses_of(terms: Terms) -> Losses:
    """Losses of vectors."""
    options = terms.recipe.embed
    return Losses(
        partial(embedding_loss_sum, options=options),
        partial(embedding_measure, options=options),
        partial(prepass, options=options) if options.loss not in ALONE else None,
    )
