"""The page and the plot of `python -m benchmarks methods`, drawn from the results in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.methods import CASES, WARM_UP_STEPS, Result, Settings

BEGIN, END = "<!-- measured by benchmarks methods: begin -->", "<!-- measured by benchmarks methods: end -->"
_HEAD = (
    "rate, chat / medical", "trained", "result, MB", "peak, GiB", "tokens/s", "chat: held-out loss",
    "general text: change", "medical: accuracy", "macro-F1",
)  # fmt: skip


def table(settings: Settings, results: Sequence[Result], command: str) -> str:
    """Markdown: what was run, where, and a line a method."""
    found = {(result.data, result.case): result for result in results if not result.error}
    failed = [f"{result.case} on {result.data}: {result.error}" for result in results if result.error]
    if not found:
        return "\n".join(["Nothing was measured yet.", *failed]) + "\n"
    some = next(iter(found.values()))
    loads = [result.load for result in found.values()]
    processor, memory = some.machine["processor"], some.machine["memory_bytes"] / 2**30
    steps = ", ".join(f"{num} of {name}" for name, num in settings.steps.items())
    told = ", ".join(
        f"{name} {' and '.join(sorted({result.versions[name] for result in found.values()}))}" for name in some.versions
    )
    lines = [
        f"`{command}`",
        "",
        f"{Path(settings.model).name}; updates: {steps}, {settings.rows_per_step} rows each, every method the same "
        f"rows in the same order. {processor}, {some.machine['cores']} cores, {memory:.0f} GiB; load before the runs "
        f"{min(loads):.1f} to {max(loads):.1f}. {told}.",
        "",
        f"| | {' | '.join(_HEAD)} |",
        "|---|" + "---:|" * len(_HEAD),
        *(_row(case, found) for case in CASES if any(case == name for _, name in found)),
        "",
        _before(found),
        "Rates are those that Tunesmith chooses. Trained numbers, result and peak (resident memory of the whole "
        f"process): on chat; tokens/s too, after {WARM_UP_STEPS} steps. General text: its loss after less before, on "
        "the same passages for all: what was forgotten. –: not measured.",
    ]
    if missing := [case for case in CASES if not any(case == name for _, name in found)]:
        lines.append(f"Not measured yet: {', '.join(missing)}.")
    return "\n".join([*lines, *failed]) + "\n"


def _before(found: Mapping[tuple[str, str], Result]) -> str:
    words = []
    for data, name in (("chat", "loss"), ("medical", "accuracy")):
        plain = [result for (one, case), result in found.items() if one == data and not case.startswith("peft")]
        values = [result.before[name] for result in plain]
        if values:
            words.append(f"{data}: {name} {values[0]:.3f}")
    return f"Before the first update: {'; '.join(words)}." if words else ""


def _row(case: str, found: Mapping[tuple[str, str], Result]) -> str:
    chat, medical = found.get(("chat", case)), found.get(("medical", case))
    rates = " / ".join(f"{result.rate:g}" if result else "–" for result in (chat, medical))
    general = f"{chat.general[1] - chat.general[0]:+.3f}" if chat and chat.general else "–"
    cells = (
        rates,
        f"{chat.trained:,}" if chat else "–",
        f"{chat.result_bytes / 1e6:,.2f}" if chat else "–",
        f"{chat.peak_bytes / 2**30:.2f}" if chat else "–",
        f"{chat.tokens_per_second:,.0f}" if chat and chat.tokens_per_second else "–",
        f"{chat.after['loss']:.3f}" if chat else "–",
        general,
        f"{medical.after['accuracy']:.3f}" if medical else "–",
        f"{medical.after['macro_f1']:.3f}" if medical else "–",
    )
    return f"| {case} | {' | '.join(cells)} |"


def plot(results: Sequence[Result], path: Path) -> None:
    """An SVG of two fields: what was learnt against what was forgotten, and speed against memory; on chat."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    chat = [result for result in results if result.data == "chat" and not result.error and result.general]
    if not chat:
        return
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "methods", "font.size": 9}):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        learnt, cost = figure.subplots(1, 2)
        for number, result in enumerate(chat):
            assert result.general is not None, "those without were left out"
            forgotten = result.general[1] - result.general[0]
            color = f"C{number % 10}"
            for axes, x, y in (
                (learnt, forgotten, result.after["loss"]),
                (cost, result.peak_bytes / 2**30, result.tokens_per_second),
            ):
                axes.scatter([x], [y], color=color, s=28, label=result.case if axes is learnt else None)
        learnt.set(xlabel="general text: loss after less before (forgotten)", ylabel="chat: held-out loss (learnt)")
        cost.set(xlabel="peak memory of the process, GiB", ylabel="tokens/s, chat")
        cost.set_ylim(bottom=0)
        for axes in (learnt, cost):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
        figure.savefig(path, format="svg", metadata={"Date": None})


def put_into(page: Path, text: str, *, first: str = BEGIN, last: str = END) -> None:
    """Write a text between the page's two markers. Raises ValueError where it has none."""
    before, begin, rest = page.read_text("utf-8").partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"{page}: it lacks the lines {first} and {last}")
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{after}", "utf-8")
