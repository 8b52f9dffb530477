"""Our loop against a loop of transformers' own: padded batches, the model's own loss, torch's AdamW, step by step."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from tiny_tasks import task_recipe
from tunesmith.data.branches import lines_of
from tunesmith.optim import rate
from tunesmith.training.loop import training_steps
from tunesmith.training.setup import Setup, prepare
from tunesmith.training.trainer import train

STEPS = 8
OWN = {
    ("classify", "encoder"): AutoModelForSequenceClassification,
    ("tag", "encoder"): AutoModelForTokenClassification,
    ("generate", "encoder_decoder"): AutoModelForSeq2SeqLM,
    ("summarize", "encoder_decoder"): AutoModelForSeq2SeqLM,
}


def own_batch(setup: Setup, rows: list[int], task: str, kind: str) -> dict[str, torch.Tensor]:
    """As a data collator of transformers would make it: padded to the right, −100 where nothing is learnt."""
    made: dict[str, list] = {"input_ids": [], "labels": []}
    for row in (setup.rows.store.row(i) for i in rows):
        ids, trained = torch.from_numpy(row.ids.astype("int64")), torch.from_numpy(row.trained)
        if kind == "encoder_decoder":
            made["input_ids"].append(ids[~trained])
            made["labels"].append(ids[trained])
            continue
        made["input_ids"].append(ids)
        labels = torch.from_numpy(row.labels)
        made["labels"].append(torch.full_like(ids, -100).masked_scatter(trained, labels) if task == "tag" else labels)
    pad = torch.nn.utils.rnn.pad_sequence
    ids_BT = pad(made["input_ids"], batch_first=True, padding_value=0)
    mask_BT = pad([torch.ones_like(ids) for ids in made["input_ids"]], batch_first=True, padding_value=0)
    if task == "classify":
        return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": torch.cat(made["labels"])}
    labels_BT = pad(made["labels"], batch_first=True, padding_value=-100)
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}


def own_losses(setup: Setup, task: str, kind: str, *, fresh: dict[str, torch.Tensor]) -> list[float]:
    model = OWN[task, kind].from_pretrained(setup.recipe.model, num_labels=setup.model.config.num_labels)
    model.load_state_dict(fresh)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    losses = []
    for step in range(1, STEPS + 1):
        rows = [i for members in setup.sampler.step(step) for i in members]
        loss = model(**own_batch(setup, rows, task, kind)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, setup.total_steps, setup.recipe.optim)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(("task", "kind"), list(OWN))
def test_losses_are_those_of_a_plain_loop(tmp_path, task, kind):
    """1e-4: float32, eight updates in which rounding grows; another denominator or target is off by tenths."""
    setup = prepare(task_recipe(tmp_path, task, kind, dropout=0.0, train={"max_steps": STEPS}), root=tmp_path)
    fresh = {name: tensor.detach().clone() for name, tensor in setup.model.state_dict().items()}
    ours = [event.values["loss"] for event in training_steps(setup)]
    theirs = own_losses(setup, task, kind, fresh=fresh)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] != pytest.approx(ours[0], rel=1e-2)


def own_logps(model: torch.nn.Module, setup: Setup, rows: list[int]) -> torch.Tensor:
    """[B, 2], log-probabilities of both answers, each line alone and its logits whole."""
    sums = []
    for line in (line for row in rows for line in lines_of(setup.store.row(row))):
        ids = torch.from_numpy(line.ids.astype("int64"))
        logps = F.log_softmax(model(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
        sums.append(logps[torch.from_numpy(line.trained[1:])].sum())
    return torch.stack(sums).view(-1, 2)


def test_losses_of_preferences_are_those_of_a_second_model_in_memory(tmp_path):
    """DPO as its authors wrote it: a frozen copy of the model, four passes a pair."""
    recipe = task_recipe(
        tmp_path, "prefer", "causal", dropout=0.0, train={"max_steps": STEPS, "rows_per_step": 4}, precision="float32"
    )
    setup = prepare(recipe, root=tmp_path / "own")
    run = train(recipe, root=tmp_path / "runs")
    model, reference = (AutoModelForCausalLM.from_pretrained(recipe.model) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    losses = []
    for step in range(1, STEPS + 1):
        rows = setup.sampler.rows(step)
        with torch.no_grad():
            before = own_logps(reference, setup, rows)
        moved = own_logps(model, setup, rows) - before
        loss = -F.logsigmoid(0.1 * (moved[:, 0] - moved[:, 1])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, setup.total_steps, setup.recipe.optim)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    ours = [event.values["loss"] for event in run.events() if event.kind == "step"]
    assert ours == pytest.approx(losses, rel=1e-4)
    assert ours[-1] < ours[0] - 1e-3
