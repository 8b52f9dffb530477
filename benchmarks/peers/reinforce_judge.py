"""The judge of `python -m benchmarks reinforce --beside trl`: draws answers of each result to held-out prompts, with
the same random numbers, and grades them.

python reinforce_judge.py JOB.json RESULT.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from given_rows import run

SAMPLES = 4
"""Answers to each prompt."""


def judge(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json: {"rewards": mean of each side in each round, "rounds": ours less TRL's, paired over prompts}."""
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
    how = Draw.of(loaded.renderer, num=SAMPLES, temperature=1.0, max_new_tokens=job["max_new_tokens"], streams=32)

    def results(folder: str, pool: Pool) -> list[dict[str, Any]]:
        paths = {
            layer: LowRankPath(a_RI, b_OR, scale).to(model.device, model.dtype)
            for layer, (a_RI, b_OR, scale) in read_low_rank(Path(folder)).items()
        }
        adapters.put("result", paths)
        with decoding(model):
            answers = draw_answers(
                BatchedDecoder(model, adapters), [row["ids"] for row in held], list(range(len(held))), how,
                adapter="result",
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

    rewards, rounds = [], []
    with Pool(schema.load(job["grader"])) as pool:
        for of_round in job["adapters"]:
            found = {side: results(folder, pool) for side, folder in of_round.items()}
            rewards.append({
                side: sum(sum(row["answer_rewards"]) / len(row["answer_rewards"]) for row in rows) / len(rows)
                for side, rows in found.items()
            })  # fmt: skip
            rounds.append(compare_rows(found["trl"], found["ours"]).metrics["reward"].b_minus_a)
    return {"rewards": rewards, "rounds": rounds}


if __name__ == "__main__":
    run(judge)
