"""A new option does not end the runs that began before it: each has the value under which they are what they were."""

import pytest

from tunesmith.recipe.docs import options
from tunesmith.training import same_run

_NAMES = """
    model revision name task method.name method.rank method.alpha method.rslora method.dropout method.targets
    method.rank_pattern method.alpha_pattern method.also_train method.loraplus_ratio method.train method.freeze
    method.kind method.settings data.train data.train[].path data.train[].weight data.mix data.eval
    data.held_out data.columns data.template data.date data.new_tokens data.max_tokens data.too_long data.stride
    data.prompt data.labels data.label_kind data.replay data.bad_rows data.control_tokens data.overlap
    data.num_proc data.limits.line_bytes data.limits.depth data.limits.messages data.limits.problems optim.name
    optim.lr optim.lr_times optim.schedule optim.warmup optim.weight_decay optim.betas optim.eps optim.momentum
    optim.clip loss.label_smoothing loss.z_loss prefer.loss prefer.beta prefer.margin prefer.label_smoothing
    prefer.nll prefer.length prefer.desirable prefer.undesirable reward.margin reward.center embed.loss
    embed.scale embed.symmetric embed.dims embed.pooling embed.normalize embed.query_prompt
    embed.document_prompt embed.include_prompt embed.documents ranking.loss ranking.positive_weight train.epochs
    train.max_steps train.rows_per_step train.tokens_per_pass train.checkpointed_layers train.class_weights
    train.masked evaluation.every evaluation.max_rows evaluation.metric evaluation.patience evaluation.keep
    evaluation.samples evaluation.sample_tokens evaluation.general evaluation.surprising checkpoint.every
    checkpoint.keep checkpoint.snapshots export.to precision device devices shard memory threads kernels
    repeatable seed track
"""
RECORDED = frozenset(_NAMES.split())
"""Options that every run which can be resumed has recorded. The list never grows."""
NEW_TASKS = ("reinforce.", "distil.")
"""Options of tasks that no run under way has: a run of another task does not record them."""
WHAT_TO_DO = (
    "new, so that no run that is under way has recorded it, and each would be refused when it is resumed. Enter it in "
    "NAMED_LATER of training/same_run.py with the value that earlier versions used, as text; if it is a field of "
    "data.train, where all fields are one setting, leave it out of what is recorded while it has that value"
)


def new_options() -> set[str]:
    later = {key.removeprefix("setting ") for key in (*same_run.NAMED_LATER, same_run.MEASURES_LATER)}
    return {key for key in set(options()) - RECORDED - later if not key.startswith(NEW_TASKS)}


def test_every_new_option_has_the_value_of_runs_that_did_not_record_it() -> None:
    assert not new_options(), f"{', '.join(sorted(new_options()))}: {WHAT_TO_DO}"


def test_an_option_that_is_forgotten_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(same_run.NAMED_LATER, "setting data.encoding")
    assert new_options() == {"data.encoding"}


def test_earlier_versions_used_what_a_recipe_without_the_option_says() -> None:
    """Else such a run would be refused nevertheless: its recipe lacks the option too."""
    defaults = {key: options()[key.removeprefix("setting ")].default for key in same_run.NAMED_LATER}
    other = {key: value for key, value in defaults.items() if value != "auto"}
    assert {key: str(value) for key, value in other.items()} == {key: same_run.NAMED_LATER[key] for key in other}


def test_an_option_that_went_is_gone_on_purpose() -> None:
    gone = RECORDED - set(options())
    assert not gone, (
        f"{', '.join(sorted(gone))}: recipes of runs that are under way name it, and could not be read: none of them "
        "could be resumed. Let recipe/load.py read it, or say so in CHANGELOG.md and take it off this list"
    )
