"""What rows begin with alike is computed once, and nothing else changes: logits, losses, every gradient."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from often import often
from packed import CAN, VOCAB, batch_of, sharp
from tunesmith.data.prefixes import Stretch, num_computed, prefix_groups, share_prefixes, stretches
from tunesmith.models import segments, short_row_attention
from tunesmith.models.attention import Segments, UnsupportedAttentionError, use_packed_attention
from tunesmith.models.forward import logits_at_targets
from tunesmith.models.modes import checkpoint_layers
from tunesmith.types import LEAST_PREFIX, Batch, Row, Segment, Source


def rows_of(*families: tuple[int, list[int]], seed: int = 0, system: int = 0) -> list[Row]:
    """Of each family (tokens they begin with, tokens of each that follow), behind a system prompt of all."""
    draw = np.random.default_rng(seed)
    rows = []
    before = draw.integers(3, VOCAB, system)
    for prefix, rests in families:
        first = np.concatenate([before, draw.integers(3, VOCAB, prefix)])
        for n in rests:
            ids = np.concatenate([first, draw.integers(3, VOCAB, n)]).astype(np.int32)
            rows.append(Row(ids, np.ones(len(ids), bool), Source("x", 1)))
    return rows


MIXED = rows_of((10, [9, 5, 5, 1]), (20, [7, 30]), (0, [12, 3]))
"""Two families, two rows on their own; longer than the tiny models' sliding windows, and one of a single own token."""
PAIRS = rows_of((9, [4, 12]), (12, [1, 3]), system=10)
"""Two answers to each of two prompts behind one system prompt: prefixes within a prefix."""


def shared_batch(rows: list[Row]) -> tuple[Batch, Batch]:
    plain = batch_of(rows)
    return plain, share_prefixes(plain, rows)


def answers(model, batch: Batch) -> list[torch.Tensor]:
    """Logits, and the gradient of every weight."""
    model.zero_grad()
    logits_NV = logits_at_targets(model, batch)
    F.cross_entropy(logits_NV.float(), batch.targets_N).backward()
    return [logits_NV.detach(), *(weight.grad.clone() for weight in model.parameters())]


def both_are_alike(model, rows: list[Row], *, tolerance: float) -> None:
    use_packed_attention(model)
    plain, shared = shared_batch(rows)
    assert shared.num_computed < plain.num_computed
    for one, other in zip(answers(model, shared), answers(model, plain), strict=True):
        # A bias of keys has no gradient at all: what is found there is rounding.
        torch.testing.assert_close(one, other, rtol=tolerance, atol=1e-6 + tolerance * float(other.abs().max()))


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("arch", often(CAN, "llama", "gpt2", "gemma2"))
def test_every_model_answers_and_learns_alike(arch, products, monkeypatch):
    """By torch's kernel and by grouped products. float32: 1e-4 of the largest is rounding through a model of such
    weights."""
    monkeypatch.setattr(short_row_attention, "LONGEST_SHARED", 512 if products else 0)
    both_are_alike(sharp(arch), MIXED + PAIRS, tolerance=1e-4)


@pytest.mark.parametrize("longest", [15, 24])
def test_long_and_short_pieces_of_one_family(longest, monkeypatch):
    """Some through products, some through torch's kernel, reading the same beginning."""
    monkeypatch.setattr(short_row_attention, "LONGEST_SHARED", longest)
    both_are_alike(sharp("llama"), MIXED + PAIRS, tolerance=1e-4)


def test_recomputed_layers_learn_alike():
    model = sharp("llama").train()
    checkpoint_layers(model, 1)
    both_are_alike(model, MIXED, tolerance=1e-4)


def test_in_bfloat16_it_is_as_near_to_the_truth_as_whole_rows():
    """Distance of all gradients together to those of float32. Rounding is the same kind in both, so neither may be much
    farther; the beginning's gradients are summed in float32."""
    model = sharp("llama").bfloat16()
    use_packed_attention(model)
    found = [answers(model, batch) for batch in shared_batch(MIXED)]
    truth = answers(model.float(), batch_of(MIXED))
    plain, shared = (
        torch.cat([(a.float() - b).flatten() / b.norm() for a, b in zip(some, truth, strict=True)]).norm()
        for some in found
    )
    assert shared < 1.5 * plain


@given(
    prefixes=st.lists(st.tuples(st.integers(0, 20), st.lists(st.integers(1, 9), min_size=1, max_size=4)), min_size=1),
    seed=st.integers(0, 99),
    system=st.integers(0, 20),
)
@settings(deadline=None, max_examples=60)
def test_a_shared_batch_says_of_every_token_what_the_plain_one_says(prefixes, seed, system):
    """Each target has the same id, row and position, and the tokens that it may read are those of its row."""
    rows = rows_of(*prefixes, seed=seed, system=system)
    plain, shared = shared_batch(rows)
    assert shared.num_computed == num_computed([row.ids for row in rows])
    assert torch.equal(shared.targets_N, plain.targets_N)
    assert torch.equal(shared.row_of_N, plain.row_of_N)
    assert torch.equal(shared.positions_BT[0, shared.predict_N], plain.positions_BT[0, plain.predict_N])
    assert torch.equal(shared.ids_BT[0, shared.predict_N], plain.ids_BT[0, plain.predict_N])
    assert shared.num_tokens == plain.num_tokens
    if not shared.pieces:
        return
    keys_K = Segments.sharing(shared.pieces, device=torch.device("cpu")).shared.index_K  # type: ignore[union-attr]
    read = keys_K.split([piece.keys for piece in shared.pieces])
    whole = sorted(tuple(shared.ids_BT[0, places].tolist()) for places in read)
    for row in rows:
        assert tuple(row.ids.tolist()) in whole
    for piece, places in zip(shared.pieces, read, strict=True):
        assert shared.positions_BT[0, places].tolist() == list(range(piece.keys))


@given(
    rows=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=7),
)
@settings(deadline=None, max_examples=60)
def test_families_save_as_much_as_any_cut_of_the_sorted_rows(rows):
    """Against all 2^(n-1) cuts."""
    arrays = [np.array(row, np.int32) for row in rows]
    found = prefix_groups(arrays)
    assert sorted(i for family in found for i in family.members) == list(range(len(rows)))
    for family in found:
        heads = {tuple(rows[i][: family.stop]) for i in family.members}
        assert len(heads) == 1
        assert all(len(rows[i]) > family.stop for i in family.members)
    saved = sum((len(f.members) - 1) * f.stop for f in found)
    assert saved == _most_saved(sorted(rows))
    assert num_computed(arrays) <= sum(map(len, rows)) - saved


def test_answers_share_their_prompt_and_all_of_them_the_system_prompt():
    found = stretches([row.ids for row in PAIRS])
    assert sorted((one.start, one.stop, one.members) for one in found) == sorted([
        (0, 10, (0, 1, 2, 3)), (10, 19, (0, 1)), (10, 22, (2, 3)),
        (19, 23, (0,)), (19, 31, (1,)), (22, 23, (2,)), (22, 25, (3,)),
    ])  # fmt: skip


def _most_saved(rows: list[list[int]]) -> int:
    best = 0
    for cuts in range(2 ** (len(rows) - 1)):
        groups, group = [], [rows[0]]
        for i, row in enumerate(rows[1:]):
            if cuts >> i & 1:
                groups.append(group)
                group = []
            group.append(row)
        saved = 0
        for members in [*groups, group]:
            common = min(map(len, members)) - 1
            while common and len({tuple(row[:common]) for row in members}) > 1:
                common -= 1
            saved += common * (len(members) - 1) if common >= LEAST_PREFIX else 0
        best = max(best, saved)
    return best


def test_rows_that_share_nothing_stay_as_they_are():
    plain, shared = shared_batch(rows_of((0, [9, 5, 4])))
    assert shared is plain
    assert prefix_groups([np.arange(3, dtype=np.int32)]) == [Stretch(0, 0, (0,))]


def test_what_reads_both_ways_is_refused():
    """An encoder's beginning reads what follows it, so it cannot be the same for two rows."""
    model = sharp("llama")
    use_packed_attention(model)
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    with pytest.raises(UnsupportedAttentionError, match="both directions"):
        logits_at_targets(model, shared_batch(MIXED)[1])


def test_the_test_catches_a_reader_whose_gradient_is_lost(monkeypatch):
    """Planted: the beginning learns from all of its readers but the first."""
    real = segments.SharedPrefixes.of

    def forgetful(pieces, device):
        shared = real(pieces, device)
        families = tuple((start, places_CP[1:]) for start, places_CP in shared.families)
        return segments.SharedPrefixes(shared.index_K, shared.own_T, families)

    monkeypatch.setattr(segments.SharedPrefixes, "of", forgetful)
    with pytest.raises(AssertionError):
        both_are_alike(sharp("llama"), MIXED, tolerance=1e-4)


def test_the_test_catches_a_reader_of_the_nearest_prefix_alone():
    """Planted: answers read their prompt, but not the system prompt before it."""
    model = sharp("llama")
    use_packed_attention(model)
    plain, shared = shared_batch(PAIRS)
    wrong = [Segment(piece.tokens, piece.before[-1:]) for piece in shared.pieces]
    found = answers(model, replace(shared, pieces=tuple(wrong)))
    assert (found[0] - answers(model, plain)[0]).abs().max() > 0.5


def test_the_test_catches_another_familys_beginning():
    """Planted: what is left of the rows reads what the first family begins with."""
    model = sharp("llama")
    use_packed_attention(model)
    plain, shared = shared_batch(rows_of((10, [9, 5]), (10, [7, 3])))
    wrong = [Segment(piece.tokens, tuple((0, num) for _, num in piece.before)) for piece in shared.pieces]
    found = answers(model, replace(shared, pieces=tuple(wrong)))
    assert (found[0] - answers(model, plain)[0]).abs().max() > 0.5
