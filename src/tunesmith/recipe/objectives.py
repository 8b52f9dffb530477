"""Options of tasks that compare answers, and of those that make texts findable."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from tunesmith.recipe.methods import Auto, OptionGroup, Positive
from tunesmith.types import Pooling, PoolingKind

PreferenceLoss = Literal["dpo", "robust", "hinge", "ipo", "dpo_norm", "apo_zero", "simpo", "cpo", "orpo", "kto"]
_LOSSES_WITH: Mapping[tuple[str, ...], tuple[str, ...]] = MappingProxyType({
    ("label_smoothing",): ("dpo", "robust"), ("margin", "length"): ("dpo", "hinge", "dpo_norm", "simpo", "cpo"),
    ("nll",): tuple(loss for loss in get_args(PreferenceLoss) if loss != "kto"), ("desirable", "undesirable"): ("kto",),
})  # fmt: skip
"""Options and the losses that have them. A loss that has `margin` reads each row's margin too."""
_BETAS: Mapping[str, float] = MappingProxyType({"dpo_norm": 5.0, "simpo": 2.0})


class Prefer(OptionGroup):
    """Task prefer: the loss of a pair of answers, see docs/guide/preferences.md."""

    loss: PreferenceLoss | Auto = "auto"
    """Loss of a pair, or with kto of an answer that is labelled true or false. simpo, cpo and orpo do not
    compare the model with the one that it was at step 1, all others do. auto: dpo, for rows with a label
    kto."""
    beta: Annotated[float, Field(gt=0)] | None = None
    """Weight of the difference of both answers: smaller lets the model move further. null: 0.1, of dpo_norm 5,
    of simpo 2."""
    margin: Annotated[float, Field(ge=0)] | None = None
    """Margin by which the chosen answer has to win, in addition to the row's own (dpo, dpo_norm, hinge, simpo,
    cpo). null: 0, of simpo β / 2."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs that are taken to be labelled the wrong way round (dpo, robust)."""
    nll: Annotated[float, Field(ge=0)] | None = None
    """Weight of the chosen answer's negative log-likelihood a token, which keeps it likely. null: 0, of cpo and
    orpo 1."""
    length: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the difference in tokens, by which a longer chosen answer counts as won less: learns length
    less."""
    desirable: Annotated[float, Field(gt=0)] | None = None
    """Weight of an answer with label true (kto). null: both sides weigh the same, an answer of the larger one
    1."""
    undesirable: Annotated[float, Field(gt=0)] | None = None
    """Weight of an answer with label false (kto). null: as of `desirable`."""

    @property
    def has_margin(self) -> bool:
        """Whether the loss has a margin, of the recipe and of a row; `auto` becomes dpo or kto."""
        return self.loss in (*_LOSSES_WITH["margin", "length"], "auto")

    def filled(self) -> Prefer:
        """These options with what null and auto mean for pairs."""
        loss = "dpo" if self.loss == "auto" else self.loss
        beta = _BETAS.get(loss, 0.1) if self.beta is None else self.beta
        usual = {"beta": beta, "margin": beta / 2 if loss == "simpo" else 0.0, "desirable": 1.0, "undesirable": 1.0}
        usual["nll"] = 1.0 if loss in ("cpo", "orpo") else 0.0
        defaults = {key: value for key, value in usual.items() if getattr(self, key) is None}
        return self.model_copy(update={"loss": loss, **defaults})

    @model_validator(mode="after")
    def _has_what_it_is_given(self) -> Prefer:
        for options, losses in _LOSSES_WITH.items():
            for option in options:
                if getattr(self, option) and self.loss not in (*losses, "auto"):
                    raise ValueError(f"prefer.{option}: is for {', '.join(losses)}, not for {self.loss}. Leave it out")
        return self


class Reward(OptionGroup):
    """Task reward: the loss of a better and a worse answer, see docs/guide/preferences.md."""

    margin: Annotated[float, Field(ge=0)] = 0.0
    """Margin by which the better answer has to win for each point of difference in score, in addition to the
    margin of a row. Answers without scores differ by 1 from one to the next."""
    center: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the squared sum of both rewards, which keeps their mean at 0."""


class Embed(OptionGroup):
    """Task embed: vectors of texts, see docs/guide/embeddings.md."""

    loss: Literal["ranking", "cosent", "angle", "cosine", "margin"] | Auto = "auto"
    """Loss. ranking: an anchor finds its positive among all documents of the step. cosent and angle order pairs
    by their score, cosine meets the score, margin meets a teacher's difference of positive and negative. auto:
    ranking, of rows with a score cosent, with a score and a negative margin."""
    scale: Annotated[float, Field(gt=0)] = 20.0
    """Factor of the similarities inside the softmax (ranking, cosent, angle): the inverse of the
    temperature."""
    symmetric: bool = False
    """ranking: a positive also has to find its anchor among all anchors of the step; the mean of both
    losses."""
    dims: tuple[Positive, ...] = ()
    """Matryoshka: sizes to which a vector may be cut. The losses of all of them are added; name the full size
    too."""
    pooling: PoolingKind | Auto = "auto"
    """Way from the token vectors of a text to its vector: mean, cls (its first), last or max. auto: as the
    files of sentence-transformers say, else mean, of causal models last."""
    normalize: bool | Auto = "auto"
    """Scale vectors to length 1. auto: as the model's files say, else true."""
    query_prompt: str | None = None
    """Text in front of anchors, queries and first sentences. null: the prompt in the model's files, if any."""
    document_prompt: str | None = None
    """Text in front of positives, negatives and second sentences. null: as for `query_prompt`."""
    include_prompt: bool | None = None
    """Whether the tokens of a prompt are pooled too. null: as the model's files say, else true."""
    documents: Positive = 10_000
    """Most documents among which held-out anchors look for their positive: the held-out rows' own and others
    from training."""

    def as_pooling(self, max_tokens: int | None) -> Pooling | None:
        """The pooling that these options describe; None while it is not decided."""
        if self.pooling == "auto" or self.normalize == "auto":
            return None
        prompts = (self.query_prompt or "", self.document_prompt or "")
        return Pooling(self.pooling, self.normalize, max_tokens, *prompts, self.include_prompt is not False)


class Rank(OptionGroup):
    """Task rank: scores of documents for a query, see docs/guide/embeddings.md."""

    loss: Literal["pointwise", "listwise", "pairwise"] = "pointwise"
    """pointwise: each document is right or wrong, by a label from 0 to 1. listwise: the scores of a row as
    shares. pairwise: of each two documents the better one has the higher score."""
    positive_weight: Annotated[float, Field(gt=0)] = 1.0
    """pointwise: weight of right documents; as many as there are wrong ones for each makes both weigh the
    same."""
