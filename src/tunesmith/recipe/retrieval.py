"""Options of tasks that make texts findable."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.recipe.methods import Auto, OptionGroup, Positive
from tunesmith.types import Pooling, PoolingKind


class Embed(OptionGroup):
    """Task embed: vectors of texts, see docs/embeddings.md."""

    loss: Literal["ranking", "cosent", "angle", "cosine", "margin"] | Auto = "auto"
    """Loss. ranking: an anchor finds its positive among all documents of the step. cosent and angle order pairs by
    their score, cosine meets the score, margin meets a teacher's difference of positive and negative. auto: ranking, of
    rows with a score cosent, with a score and a negative margin."""
    scale: Annotated[float, Field(gt=0)] = 20.0
    """Factor of the similarities inside the softmax (ranking, cosent, angle): the inverse of the temperature."""
    symmetric: bool = False
    """ranking: a positive also has to find its anchor among all anchors of the step; the mean of both losses."""
    dims: tuple[Positive, ...] = ()
    """Matryoshka: sizes to which a vector may be cut. The losses of all of them are added; name the full size too."""
    pooling: PoolingKind | Auto = "auto"
    """How the token vectors of a text become its vector: mean, cls (its first), last or max. auto: as the model's files
    of sentence-transformers say, else mean, of causal models last."""
    normalize: bool | Auto = "auto"
    """Scale vectors to length 1. auto: as the model's files say, else true."""
    query_prompt: str | None = None
    """Text in front of anchors, queries and first sentences. null: that of the model's files, if there is one."""
    document_prompt: str | None = None
    """Text in front of positives, negatives and second sentences. null: as for `query_prompt`."""
    include_prompt: bool | None = None
    """Whether the tokens of a prompt are pooled too. null: as the model's files say, else true."""
    documents: Positive = 10_000
    """Most documents among which held-out anchors look for their positive: those of held-out rows, and more of training
    rows."""

    def as_pooling(self, max_tokens: int | None) -> Pooling | None:
        """The pooling that these options describe; None while it is not decided."""
        if self.pooling == "auto" or self.normalize == "auto":
            return None
        prompts = (self.query_prompt or "", self.document_prompt or "")
        return Pooling(self.pooling, self.normalize, max_tokens, *prompts, self.include_prompt is not False)


class Rank(OptionGroup):
    """Task rank: scores of documents for a query, see docs/embeddings.md."""

    loss: Literal["pointwise", "listwise", "pairwise"] = "pointwise"
    """pointwise: each document is right or wrong, by a label from 0 to 1. listwise: the scores of a row as shares.
    pairwise: of each two documents the better one has the higher score."""
    positive_weight: Annotated[float, Field(gt=0)] = 1.0
    """pointwise: weight of right documents; as many as there are wrong ones for each makes both weigh the same."""
