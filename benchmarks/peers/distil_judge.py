"""The judge of `python -m benchmarks distil`: how far each result is from the teacher on rows that none was trained on.

    python distil_judge.py JOB.json RESULT.json

Probabilities are those of float32 forward passes over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from given_rows import run


def judge(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json: {side: {measure: [sum, count] of each held-out row}}. Measures are `forward`, KL(teacher ‖ result)
    at the tokens of the row; `reverse`, KL(result ‖ teacher) at its own answers; `answer`, the loss of the row's
    tokens; and with a grader `reward`, of its own answers."""
    import torch

    from tunesmith.inference.load import load_any

    torch.set_num_threads(job["threads"])
    root, held = Path(job["folder"]), job["held"]
    teacher = load_any(job["teacher"], root=root, offline=True)
    teacher.model.float()
    found = {}
    for side, place in job["sides"].items():
        learner = load_any(place, root=root, offline=True)
        learner.model.float()
        rows = [(row["ids"], row["trained"]) for row in held]
        forward = [_divergences(teacher, learner, *row) for row in rows]
        answers = _answers(learner, [row["prompt"] for row in held], job["samples"], job["max_new_tokens"])
        reverse = [
            [_divergences(learner, teacher, *_row(row["prompt"], answer.ids)) for answer in of_row]
            for row, of_row in zip(held, answers, strict=True)
        ]
        found[side] = {
            "forward": [[far, num] for far, _, num in forward],
            "answer": [[loss, num] for _, loss, num in forward],
            "reverse": [[sum(far for far, *_ in of_row), sum(num for *_, num in of_row)] for of_row in reverse],
            **({"reward": _rewards(job["grader"], held, answers)} if job["grader"] else {}),
        }
    return found


def _row(prompt: Sequence[int], answer: Sequence[int]) -> tuple[list[int], list[bool]]:
    return [*prompt, *answer], [False] * len(prompt) + [True] * len(answer)


def _divergences(of: Any, away: Any, ids: Sequence[int], trained: Sequence[bool]) -> tuple[float, float, int]:
    """Σ KL(of ‖ away) at the trained tokens of a row, in nats; the loss of `away` there; and their number."""
    import torch

    vocabulary = len(of.renderer.tokenizer)
    places = [i - 1 for i, is_trained in enumerate(trained) if is_trained]
    with torch.no_grad():
        logp_NV, logq_NV = (
            loaded.model(torch.tensor([ids]), use_cache=False).logits[0, places, :vocabulary].float().log_softmax(-1)
            for loaded in (of, away)
        )
    targets_N = torch.tensor([ids[place + 1] for place in places])
    loss = -float(logq_NV.gather(1, targets_N[:, None]).sum())
    return float((logp_NV.exp() * (logp_NV - logq_NV)).sum()), loss, len(places)


def _answers(loaded: Any, prompts: Sequence[Sequence[int]], num: int, most: int) -> list[list[Any]]:
    """`num` answers of a model to each prompt, drawn with the same random numbers for every model."""
    from tunesmith.generation.draws import Draw, draw_answers, drawing

    how = Draw(renderer=loaded.renderer, num=num, temperature=1.0, max_new_tokens=most, streams=32)
    with drawing(loaded.model) as decoder:
        return draw_answers(decoder, prompts, list(range(len(prompts))), how)


def _rewards(grader: str, held: Sequence[dict[str, Any]], answers: Sequence[Sequence[Any]]) -> list[list[float]]:
    from tunesmith.graders import schema
    from tunesmith.graders.grade import Answer
    from tunesmith.graders.pool import Pool

    rows = []
    with Pool(schema.load(grader)) as pool:
        for row, of_row in zip(held, answers, strict=True):
            asked = [Answer(answer.text, ended=answer.ended, tokens=len(answer.ids)) for answer in of_row]
            grades = [future.result() for future in [pool.submit(answer, row["item"]) for answer in asked]]
            rewards = [grade.reward for grade in grades if grade.reward is not None]
            rows.append([sum(rewards), len(rewards)])
    return rows


if __name__ == "__main__":
    run(judge)
