"""What a report says first: of new heads, of short answers, of what the log or the folder lost."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from evaluation.fake_runs import fake_run, report_of
from tunesmith.evaluation.compare import never_right
from tunesmith.evaluation.report import write_report
from tunesmith.evaluation.scores import ANSWER_SCORES as SCORES
from tunesmith.runs.atomic import to_json
from tunesmith.runs.folder import Run

pytestmark = pytest.mark.pages


@pytest.fixture(scope="module")
def new_head(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run, facts, progress = fake_run(tmp_path_factory.mktemp("runs") / "classes", "classes")
    write_report(run, facts, progress)
    return run


def test_a_new_head_has_no_before_and_no_flips(new_head: Run) -> None:
    report = report_of(new_head)
    assert (report["metrics"]["before"], report["flips"]) == (None, None)
    page = (new_head.path / "report.html").read_text()
    assert "On 300 rows it was not trained on, accuracy is 80.0 % (74.4–84.8), against 14.3 % for always" in page
    assert "majority baseline" in page
    assert "flipped" not in page
    assert "went from" not in page
    assert report["held_out_curve"][0][0] == 0, "its loss before the first step is where the curve begins"


def test_a_log_that_lost_what_was_measured_before_still_makes_a_report(tmp_path) -> None:
    run, facts, progress = fake_run(tmp_path / "run", "chat")
    lines = [line for line in run.events_path.read_text().splitlines() if '"name":"before"' not in line]
    run.events_path.write_text("\n".join(lines) + "\n")
    report = write_report(run, facts, progress)
    assert report["metrics"]["before"] is None
    page = (run.path / "report.html").read_text()
    assert "The sperm whale" in page
    assert "perplexity is 4.10" in page


def test_a_run_without_its_rows_says_that_nothing_is_judged(tmp_path) -> None:
    run, facts, progress = fake_run(tmp_path / "run", "chat")
    (run.path / "evaluation" / "before.jsonl").unlink()
    write_report(run, facts, progress)
    first = (run.path / "report.html").read_text().partition("<header>")[2].partition("<nav>")[0]
    assert "Whether the change may be chance is not known: evaluation/before.jsonl" in first
    assert "better" not in first


def test_an_answer_of_one_word_is_marked_and_leads_where_all_were_answered(tmp_path) -> None:
    run, facts, progress = fake_run(tmp_path / "run", "chat")
    events = [event for event in run.events() if event.kind not in ("sample", "answers")]
    run.events_path.write_bytes(b"")
    for event in events:
        run.append(event)
    for name, said in (("before", "no"), ("after", "yes")):
        for index in range(40):
            values = {"name": name, "index": index, "prompt": f"p{index}", "reference": "yes", "answer": said}
            run.append(type(events[0])("sample", 0, 0.0, {**values, "stopped": True, "source": f"x:{index}"}))
        scores = {"exact_match": {"value": float(said == "yes"), "low": 0.0, "high": 1.0}}
        run.append(type(events[0])("answers", 0, 0.0, {"name": name, "num": 40, "measures": scores}))
        same = {"reference": "yes", "answer": said} | dict.fromkeys(SCORES, float(said == "yes"))
        lines = [{"source": f"x:{i}", "prompt": f"p{i}", **same} for i in range(40)]
        (run.path / "evaluation" / f"answers-{name}.jsonl").write_bytes(b"".join(to_json(row) + b"\n" for row in lines))
    write_report(run, facts, progress)
    assert (
        "On 40 answers to prompts it was not trained on, exact match went from 0.0 % (0.0–100.0) "
        "to 100.0 % (0.0–100.0): +100.0 (+100.0 to +100.0) points, better."
    ) in (html := (run.path / "report.html").read_text())
    assert html.count('title="equal to the reference">✓') == html.count('title="not equal to the reference">✗') == 40


def of_one_word(folder: Path, references: Sequence[str], said: str) -> Run:
    """A run whose answers after training are all one word."""
    run, facts, progress = fake_run(folder, "chat")
    events = [event for event in run.events() if event.kind not in ("sample", "answers")]
    run.events_path.write_bytes(b"")
    for event in events:
        run.append(event)
    for name, answer in (("before", "no idea"), ("after", said)):
        right = [float(answer == reference) for reference in references]
        for index, reference in enumerate(references):
            values = {"name": name, "index": index, "prompt": f"p{index}", "reference": reference, "answer": answer}
            run.append(type(events[0])("sample", 0, 0.0, {**values, "stopped": True, "source": f"x:{index}"}))
        scores = {"exact_match": {"value": sum(right) / len(right), "low": 0.0, "high": 1.0}}
        run.append(type(events[0])("answers", 0, 0.0, {"name": name, "num": len(right), "measures": scores}))
        lines = [
            {
                "source": f"x:{i}",
                "prompt": f"p{i}",
                "reference": reference,
                "answer": answer,
                **dict.fromkeys(SCORES, one),
            }
            for i, (reference, one) in enumerate(zip(references, right, strict=True))
        ]
        (run.path / "evaluation" / f"answers-{name}.jsonl").write_bytes(b"".join(to_json(row) + b"\n" for row in lines))
    write_report(run, facts, progress)
    return run


def test_answers_that_are_all_alike_are_named_with_the_constant_baseline(tmp_path: Path) -> None:
    run = of_one_word(tmp_path / "run", ["yes", "no"] * 20, "yes")
    assert "All 40 answers are `yes`." in report_of(run)["headline"]
    page = (run.path / "report.html").read_text()
    assert "All 40 answers are <code><bdi>yes</bdi></code>." in page
    row = page.partition('<th scope="row">exact match</th>')[2].partition("</tr>")[0]
    assert 'data-name="majority baseline">50.0 %</td>' in row
    assert not any("All 40" in said for said in report_of(of_one_word(tmp_path / "b", ["yes"] * 40, "yes"))["headline"])


def test_two_measurements_are_marks_without_a_line(tmp_path: Path) -> None:
    for num, has_line in ((2, False), (3, True)):
        run, facts, progress = fake_run(tmp_path / str(num), "chat", num_steps=40)
        events = [
            one for one in run.events() if one.kind != "evaluation" or one.step in {2: (0, 40), 3: (0, 20, 40)}[num]
        ]
        events = [one for one in events if one.values.get("name") != "step" or one.step != 40]
        run.events_path.write_bytes(b"")
        for event in events:
            run.append(event)
        progress["kept"] = {"step": 40, "reason": "the last step"}
        write_report(run, facts, progress)
        plot = (run.path / "report.html").read_text().partition('aria-labelledby="loss-title')[2].partition("</svg>")[0]
        assert len(report_of(run)["held_out_curve"]) == num
        assert bool(re.search(r'stroke-dasharray[^"]*var\(--accent\)', plot)) is has_line


def test_never_right_comes_with_the_way_out() -> None:
    details = {"per_class": [{"label": "a", "recall": 1.0, "support": 9}, {"label": "b", "recall": 0.0, "support": 2}]}
    assert list(never_right(details, "equal")) == [
        "`b` (2 rows) is never right.",
        "Train on more rows of it, or let rare classes count as much as frequent ones: "
        "--set train.class_weights=balanced.",
    ]
    assert list(never_right(details, "balanced"))[1] == "Train on more rows of it."
    details["per_class"][0]["support"] = 2
    assert list(never_right(details, "equal"))[1] == "Train on more rows of it.", "it is as frequent as the other"
    assert len(list(never_right(details))) == 1
