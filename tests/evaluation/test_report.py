"""Reports of made-up runs of every kind: what is in them, that they repeat, and that no row can write into them."""

import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.fake_runs import CHAPTERS, HOSTILE, TASKS, fake_run, report_of
from shape.tree import ROOT
from tunesmith.errors import RunError
from tunesmith.evaluation.bootstrap import intervals, ratio
from tunesmith.evaluation.compare import changes
from tunesmith.evaluation.metrics import info_of
from tunesmith.evaluation.report import write_report
from tunesmith.evaluation.report.pages import fenced
from tunesmith.evaluation.report.plots import MOST_POINTS, thinned
from tunesmith.evaluation.report.values import (
    RunSeries,
    confused_pairs,
    flips,
    headline,
    headline_metrics,
    kept_report,
    regressions,
    rows_of,
    sample_text,
    summary,
)
from tunesmith.runs.folder import Run

pytestmark = pytest.mark.pages

VOID = {"meta", "br", "hr", "img", "input", "link"}
PLOTS = {
    "chat": {"loss", "lengths"},
    "text": {"loss", "lengths"},
    "classes": {"loss", "measure", "lengths"},
    "two": {"loss", "measure", "lengths"},
    "sets": {"loss", "measure", "lengths"},
    "number": {"loss", "measure", "scatter", "lengths"},
    "tag": {"loss", "measure", "lengths"},
}


class Page(HTMLParser):
    """A page as a strict reader sees it: every element closed in its turn, its ids, its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.used: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == [], "elements that nothing closes"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("href", "src") or "url(" in (value or ""):
                self.used.append(re.sub(r".*url\((.*)\).*", r"\1", value or ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self.open else ""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, tuple[Page, Path]]:
    """Kind of run → its page and its folder."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for kind in TASKS:
        run, facts, progress = fake_run(folder / kind, kind)
        write_report(run, facts, progress)
        found[kind] = Page((run.path / "report.html").read_text()), run.path
    return found


@pytest.mark.parametrize("kind", TASKS)
def test_every_kind_of_run_gets_the_plots_that_fit_it(pages, kind):
    page, folder = pages[kind]
    assert {name.removesuffix("-title") for name in page.ids if name.endswith("-title")} == PLOTS[kind]
    assert page.seen.count("svg") >= len(PLOTS[kind])
    for name in ("Measures", "Training", "Data", "Choices", "Repeat", "High-loss training rows"):
        assert name in page.text
    assert f"tunesmith train --recipe {folder}/recipe.yaml" in page.text
    assert "usual for LoRA on a model below a billion weights" in page.text
    assert "3 × cut" in page.text
    assert "step 90 of 120: the best evaluation: held-out loss 1.2900" in page.text
    assert "ab" * 32 in page.text  # the hash of the model
    before, needs_no_action, after = page.text.partition("Notes that need no action")
    assert needs_no_action
    assert ("3 × cut" in before, "padding is" in before, "padding is <pad>" in after) == (True, False, True)


@pytest.mark.parametrize("kind", TASKS)
def test_the_page_asks_nobody_for_anything(pages, kind):
    page, folder = pages[kind]
    html = (folder / "report.html").read_text()
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in html
    assert {"script", "link", "img", "iframe", "object", "base", "form"}.isdisjoint(page.seen)
    assert all(target.startswith("#") and target[1:] in page.ids for target in page.used)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"@import|@font-face|https?://|<!--|xmlns", html)
    assert not re.search(r"#0[1-9a-f]0[1-9a-f]0[1-9a-f]", html), "a colour of the plots did not become the page's"


def files_of(folder: Path) -> list[str]:
    """Both forms of a report, without the place where its run lies."""
    return [(folder / f"report.{end}").read_text().replace(str(folder), "") for end in ("html", "json")]


def test_equal_runs_give_equal_bytes(pages, tmp_path):
    run, facts, progress = fake_run(tmp_path / "run", "sets")
    returned = write_report(run, facts, progress)
    assert files_of(run.path) == files_of(pages["sets"][1])
    assert returned == report_of(run)
    # The end event holds this, and equal runs in different folders have equal values.
    assert str(tmp_path) not in str(returned)


def test_drawing_again_needs_no_torch():
    modules = ", ".join(f"tunesmith.evaluation.report{name}" for name in ("", ".pages", ".plots"))
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_run_that_held_nothing_out_says_so(tmp_path):
    run, facts, progress = fake_run(tmp_path / "run", "chat")
    kept = [line for line in run.events_path.read_text().splitlines() if '"kind":"step"' in line or '"plan"' in line]
    run.events_path.write_text("\n".join(kept) + "\n")
    for path in (run.path / "evaluation").iterdir():
        path.unlink()
    report = write_report(run, facts, {**progress, "best": {}, "kept": {}})
    assert report["metrics"] == {"before": None, "after": None}
    page = Page((run.path / "report.html").read_text())
    assert "Nothing was held out, so nothing was measured." in page.text
    assert "step 120 of 120: the last step." in page.text


# trap: M2
def test_a_change_is_judged_by_the_paired_interval_of_its_difference():
    """All 300 rows get better by a little, and rows differ widely: separate intervals meet, and yet it is certain."""
    losses = np.random.default_rng(0).exponential(5, 300)
    before, after = ([_token_row(i, loss - gain) for i, loss in enumerate(losses)] for gain in (0.0, 0.05))
    separate = [resampled_mean([row["loss"] for row in rows]) for rows in (before, after)]
    assert separate[0]["low"] < separate[1]["high"], "the two intervals meet"

    def check(found):
        assert info_of("loss").verdict(found["loss"]) == "better"
        assert info_of("loss").difference(found["loss"]) == "−0.0500 (−0.0500 to −0.0500)"

    check(changes(before, after, [], []))
    with pytest.raises(AssertionError):  # as if the rows of both sides had nothing to do with each other
        check({"loss": unpaired(*separate)})


def _token_row(i: int, loss: float) -> dict[str, Any]:
    return {"source": f"x:{i}", "hash": str(i), "text": "t", "loss": loss, "count": 1.0, "correct": 0}


def resampled_mean(values: list[float]) -> dict[str, float]:
    return intervals(len(values), {"mean": ratio(values)})["mean"]


def unpaired(one: dict[str, float], other: dict[str, float]) -> dict[str, Any]:
    """The verdict by two intervals that lie apart or do not."""
    is_clear = other["high"] < one["low"] or one["high"] < other["low"]
    return {"value": other["value"] - one["value"], "low": -1.0, "high": 1.0, "is_clear": is_clear}


def test_verdicts_follow_the_interval_and_the_better_direction():
    def told(key: str, value: float, low: float, high: float) -> str:
        return info_of(key).verdict({"value": value, "low": low, "high": high, "is_clear": low > 0 or high < 0})

    assert told("accuracy", 0.3, 0.2, 0.4) == told("loss", -0.3, -0.4, -0.2) == "better"
    assert told("accuracy", -0.3, -0.4, -0.2) == told("calibration_error", 0.3, 0.2, 0.4) == "worse"
    assert told("accuracy", 0.05, -0.05, 0.15) == "unclear"
    assert told("accuracy", 0.0, 0.0, 0.0) == told("length_ratio", 0.3, 0.2, 0.4) == ""


def test_the_summary_is_one_paragraph_in_plain_words(pages):
    report = report_of(Run(pages["two"][1]))
    assert summary(report) == (
        "models/some-model was tuned to classify texts (method lora) on 2,000 rows: 120 steps in 4:00 min "
        "on cpu. On 300 rows it was not trained on, accuracy went from 50.0 % (46.5–53.0) to 80.0 % (74.4–84.8): "
        "+51.0 (+45.0 to +56.9) points, better. Accuracy is 80.0 % (74.4–84.8), against 53.3 % for always answering "
        "`circulatory` (majority baseline): +29.0 (+22.0 to +35.9) points, better. "
        f"{report['flips']['num_gained']} rows went from wrong to right, "
        f"{report['flips']['num_lost']} rows from right to wrong. "
        "2 rows could not be used: rows/problems.jsonl lists them."
    )
    assert headline_metrics(report)[:2] == ["accuracy", "macro_f1"]


def test_the_summary_names_what_its_measure_was_counted_on(pages):
    report = report_of(Run(pages["chat"][1]))
    assert "On 300 rows it was not trained on, perplexity went" in summary(report)
    long = {**report, "task": "summarize", "short_answers": False}
    assert "On 3 answers to prompts it was not trained on, ROUGE-L went" in " ".join(headline(long))
    assert "On 40 documents it was not trained on, perplexity" in summary(report_of(Run(pages["text"][1])))
    for kind, told in (("chat", "300 rows"), ("text", "40 documents in 300 windows")):
        line = f"Counted on {told}, 3 answers, 9,000 tokens of general text. Nothing was trained on these rows."
        assert line in pages[kind][0].text


def test_a_report_of_an_early_form_is_refused(tmp_path):
    run, facts, progress = fake_run(tmp_path / "run", "chat")
    report = write_report(run, facts, progress)
    run.write_json("report.json", {key: value for key, value in report.items() if key != "headline"})
    with pytest.raises(RunError, match="an early version wrote it"):
        kept_report(run)


def test_a_report_from_before_chosen_from_still_has_its_sentences(tmp_path):
    run, facts, progress = fake_run(tmp_path / "run", "chat")
    report = write_report(run, facts, progress)
    run.write_json("report.json", {key: value for key, value in report.items() if key != "chosen_from"})
    kept = kept_report(run)
    assert list(headline(kept)) == list(headline(report))
    assert sample_text(kept) == sample_text(report)


def test_the_headline_is_by_a_measure_that_both_sides_have():
    """A model that answers the same number to every row has no rank correlation."""
    values = [{"loss": 9.0, "mse": 9.0, "spearman": math.nan}, {"loss": 4.0, "mse": 4.0, "spearman": 0.9}]
    before, after = ({"rows": 40, "measures": {key: {"value": value} for key, value in one.items()}} for one in values)
    change = {"value": -5.0, "low": -6.0, "high": -4.0, "is_clear": True}
    nothing = {"value": math.nan, "low": math.nan, "high": math.nan, "is_clear": False}
    told = headline({
        "task": "classify", "metrics": {"before": before, "after": after}, "baseline": None, "flips": None,
        "changes": {"loss": change, "mse": change, "spearman": nothing}, "details": {"after": {}},
        "rows": {"overlap": 0, "held_out": 40},
    })  # fmt: skip
    assert next(told) == (
        "On 40 rows it was not trained on, mean squared error went from 9.0000 to 4.0000: "
        "−5.0000 (−6.0000 to −4.0000), better."
    )


def test_rows_that_were_trained_on_too_are_said(tmp_path):
    run, facts, progress = fake_run(tmp_path / "run", "chat")
    facts["rows"]["overlap"] = 12
    report = write_report(run, facts, progress)
    overlap = "12 of the 300 rows held out are also in the training files"
    assert f"On 300 rows that were held out ({overlap}), perplexity went" in summary(report)
    long = {**report, "task": "summarize", "short_answers": False}
    assert f"On 3 answers to prompts that were held out ({overlap}), ROUGE-L went" in " ".join(headline(long))
    text = (run.path / "report.html").read_text()
    assert "not trained on" not in text
    assert "Nothing was trained on" not in text
    assert f"{overlap}: that flatters the tuned model." in text


def row(source: int, label, predicted, **more):
    key = "tags" if "tags" in more else "label"
    text_hash = f"{source:016x}"
    fields = {"source": f"held.jsonl:{source}", "hash": text_hash, "text": f"row {source}", "loss": 1.0, "count": 1}
    return (text_hash, 0), fields | {key: label, "predicted": predicted} | more


def test_rows_that_flipped_are_counted_by_hand():
    before = dict([row(1, "a", "a"), row(2, "a", "b"), row(3, "a", "a"), row(4, "b", "a"), row(5, "b", "b")])
    after = dict(
        [row(1, "a", "b", probability=0.6), row(2, "a", "a", probability=0.9), row(3, "a", "a"), row(4, "b", "c")]
    )  # row 5 is not there: nothing can be said of it
    found = flips(before, after)
    assert (found["num_lost"], found["num_gained"]) == (1, 1)
    assert found["lost"] == [
        {"source": "held.jsonl:1", "text": "row 1", "label": "a", "before": "a", "after": "b", "probability": 0.6}
    ]
    assert [flip["source"] for flip in found["gained"]] == ["held.jsonl:2"]


def test_sets_of_classes_flip_as_a_whole_and_tags_word_by_word():
    sets = flips(dict([row(1, ["a", "b"], ["a", "b"])]), dict([row(1, ["a", "b"], [], probability=[])]))
    assert sets["lost"][0] | {"text": ""} == {
        "source": "held.jsonl:1", "text": "", "label": "a, b", "before": "a, b", "after": "none", "probability": 0.0
    }  # fmt: skip
    tags = ["O", "B-PER", "O"]
    words = flips(dict([row(1, tags, ["O", "O", "O"], tags=tags)]), dict([row(1, tags, tags, tags=tags)]))
    assert (words["gained"][0]["before"], words["gained"][0]["after"]) == ("word 2 O", "word 2 B-PER")


def test_rows_of_text_are_listed_by_how_much_worse_they_got(tmp_path):
    run, facts, progress = fake_run(tmp_path / "run", "chat")
    line = '{"source":"held.jsonl:%d","hash":"%d","text":"t","loss":%s,"count":2,"correct":1}\n'
    (run.path / "evaluation/before.jsonl").write_text(line % (1, 1, 4.0) + line % (2, 2, 4.0) + line % (3, 3, 4.0))
    (run.path / "evaluation/after.jsonl").write_text(line % (1, 1, 5.0) + line % (2, 2, 3.0) + line % (3, 3, 8.0))
    report = write_report(run, facts, progress)
    assert report["flips"] is None
    assert [(row["source"], row["before"], row["after"]) for row in report["worse_rows"]] == [
        ("held.jsonl:3", 2.0, 4.0),
        ("held.jsonl:1", 2.0, 2.5),
    ]


def test_windows_of_a_document_get_worse_together(tmp_path):
    """Of document 1 one window lost 2 and the other won 3; all of document 2 lost 1 of 4 targets."""
    run, _, _ = fake_run(tmp_path / "run", "text")
    line = '{"source":"held.txt:%d","hash":"%d","text":"t","loss":%s,"count":2,"correct":1,"bytes":9}\n'
    windows = (((1, 4.0), (2, 4.0), (1, 4.0), (2, 1.0)), ((1, 6.0), (2, 4.0), (1, 1.0), (2, 2.0)))
    for name, told in zip(("before", "after"), windows, strict=True):
        (run.path / f"evaluation/{name}.jsonl").write_text("".join(line % (n, n, loss) for n, loss in told))
    before, after = rows_of(run, "before"), rows_of(run, "after")
    assert [(row["loss"], row["count"], row["bytes"]) for row in before.values()] == [(8.0, 4, 18), (5.0, 4, 18)]
    [worse] = regressions(before, after)
    assert (worse["source"], worse["before"], worse["after"]) == ("held.txt:2", 1.25, 1.5)


def test_a_line_that_is_no_row_is_named(tmp_path):
    run, _, _ = fake_run(tmp_path / "run", "chat")
    path = run.path / "evaluation" / "after.jsonl"
    path.write_text(path.read_text() + '{"source": "x"}\n')
    with pytest.raises(RunError, match=r"after\.jsonl:301: not a row"):
        rows_of(run, "after")


def test_a_curve_has_one_point_a_step_each_of_that_steps_weights(pages):
    """The result is measured after step 120 with the weights of step 90."""
    run = Run(pages["chat"][1])
    report = report_of(run)
    assert [step for step, _ in report["held_out_curve"]] == [0, 30, 60, 90, 120]
    own = next(e for e in run.events() if e.kind == "evaluation" and (e.step, e.values["name"]) == (120, "step"))
    assert report["held_out_curve"][-1] == [120, own.values["loss"]]
    assert report["metrics"]["after"]["loss"] == 1.3
    log = RunSeries.of(run.events())
    assert log.course(120)[-1][1]["name"] == "after"  # where the last step's weights are the result
    assert {values["name"] for _, values in log.course(90)} == {"before", "step"}


def test_surprising_rows_say_of_how_many(pages):
    page, folder = pages["classes"]
    assert "The 5 training rows that the tuned model finds least likely, of 200 that were measured." in page.text
    assert report_of(Run(folder))["surprising"]["looked_at"] == 200


def test_lost_general_ability_is_told_at_the_top_and_in_its_section(pages):
    page, _ = pages["chat"]
    assert page.text.count("past the bound") == 2
    assert "General ability" not in pages["classes"][0].text


def test_confused_pairs_are_counted_and_sorted():
    details = {"labels": ["a", "b", "c"], "confusion": [[5, 3, 0], [0, 4, 0], [3, 1, 2]]}
    assert confused_pairs(details) == [("c", "a", 3, 0.5), ("a", "b", 3, 0.375), ("c", "b", 1, 1 / 6)]
    assert confused_pairs({}) == []


@pytest.mark.parametrize(("num", "has_matrix"), [(12, True), (13, False)])
def test_many_classes_are_a_list_of_pairs_and_not_a_matrix(tmp_path, num, has_matrix):
    run, facts, progress = fake_run(tmp_path / "run", "classes", labels=[f"class {i}" for i in range(num)])
    write_report(run, facts, progress)
    for text in (Page((run.path / "report.html").read_text()).text, (run.path / "report.md").read_text()):
        assert ("by the class they were given" in text) == has_matrix
        assert ("Confused most" in text) != has_matrix


def test_preferences_and_ranks_are_shown_by_length_and_by_rank(tmp_path):
    by_length = [{"chosen": "shorter", "pairs": 9, "accuracy": None}, {"chosen": "longer", "pairs": 30, "accuracy": 1}]
    recall = {"at": [1, 10], "model": [0.5, 1.0], "BM25": [0.25, 0.75]}
    run, facts, progress = fake_run(tmp_path / "run", "chat")
    run.write_json("evaluation/after.json", {"by_length": by_length, "recall": recall, "documents": 1200})
    write_report(run, facts, progress)
    text = (run.path / "report.md").read_text()
    for line in (
        "| shorter | 9 | – |",
        "| longer | 30 | 100.0 % |",
        "| BM25 | 25.0 % | 75.0 % |",
        "of 1,200 documents",
    ):
        assert line in text


def test_a_long_line_keeps_its_peaks_when_it_is_thinned():
    values = np.zeros(100_000)
    values[77_777], values[3] = 9.0, -4.0
    values[5] = np.nan
    steps, kept = thinned(np.arange(100_000.0), values)
    assert len(kept) <= MOST_POINTS
    assert kept.max() == 9.0
    assert np.nanmin(kept) == -4.0
    assert steps[kept.argmax()] == 77_777


@pytest.mark.parametrize("kind", ["classes", "chat", "tag"])
def test_no_row_can_write_into_the_report(tmp_path, kind):
    labels = [*HOSTILE, *CHAPTERS[:3]]
    run, facts, progress = fake_run(tmp_path / "run", kind, labels=labels, texts=HOSTILE, name=HOSTILE[3])
    facts |= {"model": HOSTILE[0], "notes": list(HOSTILE), "data": ["\udcff.jsonl"]}
    write_report(run, facts, progress)
    html, markdown = ((run.path / f"report.{end}").read_text() for end in ("html", "md"))
    page = Page(html)
    assert {"script", "img"}.isdisjoint(page.seen)
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}{% raw %}" in page.text
    assert "x" * 10_000 in page.text
    for text in (html, markdown):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"(?<!\\)[<\[]", outside)


def test_a_fence_in_a_text_stays_inside_its_fence():
    assert fenced("````\n# not a title\n````") == "`````text\n````\n# not a title\n````\n`````"
