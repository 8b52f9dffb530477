"""The judge of `python -m benchmarks reinforce --beside trl`: draws answers of the untouched model and of each
result to held-out prompts, with the same random numbers, and grades them.

python reinforce_judge.py JOB.json RESULT.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from given_rows import run

SAMPLES = 4
"""Answers to each prompt."""


def judge(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json: {"untouched": measures, "rounds": of each {"ours" and "trl": measures, with "rose", the reward less
    the untouched model's; "ours_less_trl": reward}}. Measures are means over prompts: reward, ended, answer_tokens.
    Differences are {"value", "low", "high"}, paired over prompts."""
    import torch

    from tunesmith.evaluation.compare import compare_rows
    from tunesmith.evaluation.graded_scores import graded_result
    from tunesmith.generation.adapters import AdapterSet, LowRankPath
    from tunesmith.generation.decoder import BatchedDecoder, decoding
    from tunesmith.generation.draws import Draw, draw_answers
    from tunesmith.graders import schema
    from tunesmith.graders.grade import Answer
    from tunesmith.graders.pool import Pool
    from tunesmith.inference.load import load_model
    from tunesmith.methods.adapter_format import read_low_rank

    torch.set_num_threads(job["threads"])
    loaded, held = load_model(job["base"]), job["held_out_rows"]
    model, adapters = loaded.model, AdapterSet(loaded.model)
    how = Draw(renderer=loaded.renderer, num=SAMPLES, temperature=1.0, max_new_tokens=job["max_new_tokens"], streams=32)

    def results(folder: str | None, pool: Pool) -> list[dict[str, Any]]:
        """Of the adapter in a folder; None: of the untouched model."""
        if folder is not None:
            paths = {
                layer: LowRankPath(a_RI, b_OR, scale).to(model.device, model.dtype)
                for layer, (a_RI, b_OR, scale) in read_low_rank(Path(folder)).items()
            }
            adapters.put("result", paths)
        with decoding(model):
            answers = draw_answers(
                BatchedDecoder(model, adapters), [row["ids"] for row in held], list(range(len(held))), how,
                adapter=None if folder is None else "result",
            )  # fmt: skip
        rows = []
        for number, (row, of_row) in enumerate(zip(held, answers, strict=True)):
            asked = [Answer(drawn.text, ended=drawn.ended, tokens=len(drawn.ids)) for drawn in of_row]
            grades = [future.result() for future in [pool.submit(answer, row["item"]) for answer in asked]]
            graded = [
                {"text": answer.text, "reward": grade.reward, "scores": {}, "ended": answer.ended,
                 "tokens": answer.tokens}
                for answer, grade in zip(asked, grades, strict=True)
            ]  # fmt: skip
            if (result := graded_result(number, graded, 1.0)) is not None:
                rows.append(result)
        return rows

    rounds = []
    with Pool(schema.load(job["grader"])) as pool:
        untouched = results(None, pool)
        for of_round in job["adapters"]:
            rows = {side: results(folder, pool) for side, folder in of_round.items()}
            sides = {
                side: {**_measures(of_side), "rose": _reward(compare_rows(untouched, of_side))}
                for side, of_side in rows.items()
            }
            rounds.append({**sides, "ours_less_trl": _reward(compare_rows(rows["trl"], rows["ours"]))})
    return {"untouched": _measures(untouched), "rounds": rounds}


def _measures(rows: list[dict[str, Any]]) -> dict[str, float]:
    rewards = [sum(row["answer_rewards"]) / len(row["answer_rewards"]) for row in rows]
    columns = {
        "reward": rewards,
        "ended": [row["ended"] for row in rows],
        "answer_tokens": [row["tokens"] for row in rows],
    }
    return {name: sum(values) / len(values) for name, values in columns.items()}


def _reward(comparison: Any) -> dict[str, float]:
    return dict(comparison.metrics["reward"].b_minus_a)


if __name__ == "__main__":
    run(judge)
