"""Code of graders runs apart: whatever it does, the grade has no reward at worst, and nothing of it stays."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import fresh
from graders.graders import function_in, grades, plant
from tunesmith.errors import InputError
from tunesmith.graders import children, schema
from tunesmith.graders import pool as pools
from tunesmith.graders.children import Children
from tunesmith.graders.grade import Answer, Grade, GradeError
from tunesmith.graders.pool import Pool

ODD = """
import math, os, sys
def grade(sample, item):
    text = sample["output_text"]
    print('{"value": 1.0}', flush=True)
    os.write(1, b'{"value": 1.0}\\n')
    match text:
        case "none": return None
        case "nan": return math.nan
        case "inf": return math.inf
        case "text": return "1"
        case "raises": raise ValueError("of mine")
        case "exits": sys.exit(0)
        case "ends": os._exit(0)
        case "dies": os.abort()
        case "eats": return len(bytearray(10 ** 11))
        case "sleeps": import time; time.sleep(60)
        case "spins":
            while True: pass
    return 0.25
"""
FAILURES = {
    "none": "not_a_number", "nan": "not_a_number", "inf": "not_a_number", "text": "not_a_number",
    "raises": "exception", "exits": "exception", "ends": "died", "dies": "died", "eats": "memory",
    "sleeps": "timeout", "spins": "timeout", "good": None,
}  # fmt: skip


def test_a_grade_that_fails_is_no_reward_and_the_next_one_is_made(tmp_path: Path) -> None:  # trap: R19
    found = grades(function_in(tmp_path, ODD, seconds=1.0), *FAILURES)
    assert {text: one.kind for text, one in zip(FAILURES, found, strict=True)} == FAILURES
    no_failure_counts_as_zero(found)
    assert "of mine" in found[4].error
    assert "line 12" in found[4].error


def no_failure_counts_as_zero(found: list[Grade]) -> None:
    assert [one.reward for one in found] == [None] * (len(found) - 1) + [0.25]


def test_a_failure_that_counts_as_zero_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # trap: R19
    monkeypatch.setattr(pools, "Grade", lambda reward, *rest, **more: Grade(reward or 0.0, *rest, **more))
    found = grades(function_in(tmp_path, ODD), "none", "good")
    with pytest.raises(AssertionError):
        no_failure_counts_as_zero(found)


BEGINNERS = """
def grade(sample, item):
    if sample["output_text"] == "opens":
        open("words.txt")
    if sample["output_text"] == "misses":
        item["answr"]
    1.0
"""


def test_usual_slips_are_named_with_their_way_out(tmp_path: Path) -> None:
    none, opens, misses = grades(function_in(tmp_path, BEGINNERS), "none", "opens", "misses", item={"answer": "1"})
    assert misses.error.endswith("KeyError: 'answr'\nThe row has answer.")
    assert "^" not in misses.error, "no marks below lines that are printed as one"
    assert "None, as a function does that ends without return" in none.error
    assert opens.error.endswith("find files next to its own by Path(__file__).parent.")


SLIPS = """
import json

KNOWN = {"MIT": 1.0}

def grade(sample, item):
    if sample["output_text"] == "attribute":
        return item.answer
    if sample["output_text"] == "table":
        return KNOWN[item["answer"]]
    if sample["output_text"] == "import":
        import no_such_package
    return float(json.loads(sample["output_text"]) == item["answer"])
"""


def test_slips_with_answers_and_packages_end_in_their_way_out(tmp_path: Path) -> None:
    texts = ("attribute", "table", "import", "no JSON")
    attribute, table, package, no_json = grades(function_in(tmp_path, SLIPS), *texts, item={"answer": "BSD"})
    assert attribute.error.endswith("sample and item are dicts: write ['answer'] in place of .answer.")
    assert table.error.endswith("KeyError: 'BSD'"), "it is a value of the row, and no field that the row lacks"
    assert package.error.endswith(f"install the package with {sys.executable} -m pip.")
    assert 'return float(json.loads(sample["output_text"]) == item["answer"])' in no_json.error
    assert "raw_decode" not in no_json.error, "lines of a library hide the line that called it"
    assert no_json.error.endswith('return 0.0 for it. sample["output_json"] is None then.')


def test_a_file_that_hides_a_library_is_named(tmp_path: Path) -> None:
    at_once, later = tmp_path / "numpy.py", tmp_path / "colorsys.py"
    at_once.write_text("import numpy\n\n\ndef grade(sample, item):\n    return 1.0\n")
    with pytest.raises(InputError, match=r"loaded: numpy\.py hides the library numpy: rename the file\.$"):
        Children(schema.Function(type="function", file=str(at_once)))
    later.write_text("def grade(sample, item):\n    import colorsys\n    return colorsys.rgb_to_hsv(0, 0, 1)[2]\n")
    [failed] = grades(schema.Function(type="function", file=str(later)), "x")
    assert failed.error.endswith("\ncolorsys.py hides the library colorsys: rename the file.")
    later.write_text("def grade(sample, item):\n    return 1.0\n")
    [good] = grades(schema.Function(type="function", file=str(later)), "x")
    assert good.reward == 1.0, "a name that nobody imports hides nothing"


def test_a_clients_code_is_named_without_the_folder_where_it_is_written() -> None:
    source = "def grade(sample, item):\n    return 1 / 0\n"
    [failed] = grades(schema.from_value({"type": "python", "source": source}), "x")
    assert failed.error.startswith('File "grader.py", line 2, in grade')
    with pytest.raises(InputError, match=r'cannot be loaded: File "grader\.py", line 1'):
        Children(schema.Python(type="python", source="1 / 0\n"))


def test_packages_of_an_environment_next_to_a_grader_are_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / ".venv" / "site-packages"
    place.mkdir(parents=True)
    for name in (place / "installed.py", tmp_path / "mine.py"):
        name.write_text("value = 1.0\n")
    plant(
        monkeypatch,
        f"import sysconfig; sysconfig.get_path = lambda name: {str(place)!r}; sys.path.append({str(place)!r})",
    )
    source = "import installed, mine\ndef grade(sample, item):\n    return mine.value\n"
    with Pool(function_in(tmp_path, source)) as pool:
        assert sorted(pool.children[""].files) == ["grader.py", "mine.py"]


LEAVES = """
import os, signal, subprocess, time
def grade(sample, item):
    signal.alarm(0)
    for words in (["sleep", "60"], ["setsid", "sleep", "60"]):
        with open(item["pids"], "a") as file:
            file.write(f"{subprocess.Popen(words).pid}\\n")
    while sample["output_text"] == "hangs":
        time.sleep(0.01)
    return 1.0
"""


def nothing_is_left(folder: Path, text: str) -> None:
    """After a grade that started processes, one of them in a session of its own."""
    pids = folder / f"{text}.pids"
    with Pool(function_in(folder, LEAVES, seconds=1.0)) as pool:
        pool.submit(Answer(text), {"pids": str(pids)}).result()
        alive = [int(pid) for pid in pids.read_text().split() if _is_alive(int(pid))]
    for pid in alive:
        os.kill(pid, 9)
    assert alive == []


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("text", ["hangs", "ends"])
def test_the_children_of_a_grade_end_with_it(tmp_path: Path, text: str) -> None:  # trap: R21
    nothing_is_left(tmp_path, text)


def test_a_kill_of_the_grade_alone_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # trap: R21
    plant(monkeypatch, "c._ended = lambda pid, wait: (os.kill(pid, 9), os.waitpid(pid, 0), -9)[2]")
    with pytest.raises(AssertionError):
        nothing_is_left(tmp_path, "hangs")


def test_a_process_that_has_ended_is_not_killed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool is closed with its run, and with its drawing: by then the number of its process may be another's."""
    children = Children(function_in(tmp_path, "def grade(sample, item):\n    return 0.25\n"))
    killed, kill = list[int](), os.killpg
    monkeypatch.setattr(os, "killpg", lambda pid, number: killed.append(pid) or kill(pid, number))
    children.close()
    children.close()
    assert len(killed) == 1


def test_processes_end_with_the_pool(tmp_path: Path) -> None:
    with Pool(function_in(tmp_path, ODD)) as pool:
        child = pool.children[""]._idle.queue[0]._process  # type: ignore[attr-defined]
        assert _is_alive(child.pid)
    assert not _is_alive(child.pid)


STATE = """
import random
calls = 0
def grade(sample, item):
    global calls
    calls += 1
    print('{"value": 7.0}')
    with open("left", "a") as file:
        file.write("x")
    return {"reward": calls, "drawn": random.random(), "left": len(open("left").read())}
"""


def grades_do_not_know_each_other(folder: Path) -> None:
    grader = function_in(folder, STATE)
    together, again = grades(grader, "a", "b", "c"), grades(grader, "c", "b")
    assert [one.reward for one in together] == [1, 1, 1]
    assert [one.scores["left"] for one in together] == [1, 1, 1]
    assert [dict(one.scores) for one in again] == [dict(together[2].scores), dict(together[1].scores)]
    assert together[0].scores["drawn"] != together[1].scores["drawn"]


def test_prints_state_and_random_numbers_do_not_reach_the_next_grade(tmp_path: Path) -> None:  # trap: R22
    grades_do_not_know_each_other(tmp_path)


def test_grades_in_one_process_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # trap: R22
    bug = (
        "def here(work, seed, limits, then=None):\n    read, write = os.pipe()\n    work(read, write)\n"
        "    return os.read(read, 99999).decode(), None\nc._forked = here"
    )
    plant(monkeypatch, bug)
    with pytest.raises(AssertionError):
        grades_do_not_know_each_other(tmp_path)


ADD = "def add(a, b):\n    return a + b\n"
CHEATS = {
    "exits": "import sys\nsys.exit(0)",
    "ends": "import os\nos._exit(0)",
    "prints": 'print("passed")\nprint("1 passed in 0.01s")',
    "replaces": "import runpy, json\nrunpy.run_path = runpy._run_module_code = lambda *a, **k: {}\njson.dumps = repr",
    "edits": (
        "import glob, tempfile, os\n"
        "for name in glob.glob(os.path.join(os.path.dirname(os.getcwd()), '*', '*.py')):\n"
        "    if 'grade-' in name or 'test-' in name:\n        open(name, 'w').write('pass')\n"
    ),
    "exits later": "import sys\ndef add(a, b):\n    sys.exit(0)\n",
    "answers for its parent": (
        "import os\nfor place in range(3, 64):\n    try:\n        os.write(place, b'{\"value\": 1.0}\\n')\n"
        "    except OSError:\n        pass\n"
    ),
    "looks up the word": (
        "import os, sys, time\nframe, seen = sys._getframe(), {}\nwhile frame:\n"
        "    seen = {**frame.f_locals, **seen}\n    frame = frame.f_back\n"
        "os.write(seen['write'], b'loaded\\n')\ntime.sleep(0.3)\n"
        "os.write(seen['write'], seen['word'].encode() + b'\\n')\nos._exit(0)\n"
    ),
}
TESTS = ["assert add(1, 2) == 3", "def test_add():\n    assert add(2, 2) == 4"]


def unit_tests(*texts: str, tests: Any = TESTS, seconds: float = 5.0) -> list[Grade]:
    grader = schema.from_value({"type": "unit_tests", "seconds": seconds})
    return grades(grader, *texts, item={"tests": tests})


def no_cheat_passes() -> None:
    found = unit_tests(f"Here:\n```python\n{ADD}```\nDone.", ADD, *CHEATS.values())
    assert [one.reward for one in found] == [1, 1, *[0] * len(CHEATS)]


def test_a_test_passes_by_running_to_its_end_alone() -> None:  # trap: R23
    no_cheat_passes()


def test_an_exit_code_as_the_pass_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:  # trap: R23
    bug = (
        "def passes(code, test, *rest):\n    words = [sys.executable, '-c', code + chr(10) + test]\n"
        "    return subprocess.run(words, capture_output=True).returncode == 0\nc._passes = passes"
    )
    plant(monkeypatch, bug)
    with pytest.raises(AssertionError):
        no_cheat_passes()


def test_the_reward_is_the_share_of_tests() -> None:
    [found] = unit_tests("def add(a, b):\n    return 3\n")
    assert found.reward == 0.5
    assert unit_tests("while True: pass", tests=["assert True"], seconds=1.0)[0].reward == 0


@pytest.mark.parametrize("tests", [None, [], [""], 3, "class A(unittest.TestCase): ..."])
def test_a_row_without_tests_has_no_reward(tests: Any) -> None:
    assert unit_tests(ADD, tests=tests)[0].kind == "no_code"


def test_variables_of_the_environment_are_hidden_unless_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    monkeypatch.setenv("MY_WORD", "seen")
    source = (
        "import os\ndef grade(sample, item):\n    return 2 * ('MY_KEY' in os.environ) + ('MY_WORD' in os.environ)\n"
    )
    assert grades(function_in(tmp_path, source), "x")[0].reward == 0
    assert grades(function_in(tmp_path, source, env=("MY_WORD",)), "x")[0].reward == 1


def test_a_python_grader_has_no_network_where_the_system_allows_that() -> None:
    source = "import socket\ndef grade(sample, item):\n    return len(socket.if_nameindex())\n"
    with Pool(schema.from_value({"type": "python", "source": source})) as pool:
        [num] = [pool.submit(Answer("x"), {}).result().reward]
        assert not pool.children[""].offline or num == 1  # loopback, which is down


def test_code_that_keeps_its_network_is_named(tmp_path: Path) -> None:
    theirs, ours = (
        {"type": "python", "source": "def grade(s, i): return 1"},
        function_in(tmp_path, "def grade(s, i): ..."),
    )
    for grader, is_told in ((schema.from_value(theirs), True), (ours, False)):
        with Pool(grader, at_once=1) as pool:
            pool.children[""].offline = True
            assert pool.notes == []
            pool.children[""].offline = False
            assert [note.endswith("so the grader's code has one") for note in pool.notes] == [True] * is_told


def test_a_process_that_says_nothing_is_ended(tmp_path: Path) -> None:
    child = Children(function_in(tmp_path, ODD, seconds=1.0))
    first = child._idle.queue[0]
    os.kill(first._process.pid, 19)  # SIGSTOP
    begun = time.monotonic()
    with pytest.raises(GradeError, match=r"more than 0\.3 s"):
        first.ask({"sample": {}, "item": {}, "seed": 0}, 0.3)
    assert time.monotonic() - begun < 5
    child.close()


HELPED = "from helper import worth\ndef grade(sample, item):\n    return worth\n"


def an_edited_helper_counts(folder: Path) -> None:
    """Grades that are kept from before are not those of a grader whose helper was edited since."""
    kept: dict[str, Grade] = {}
    rewards = []
    for worth in (0.25, 0.25, 0.75):
        (folder / "helper.py").write_text(f"worth = {worth}\n")
        with Pool(function_in(folder, HELPED), kept=kept) as pool:
            rewards.append(pool.submit(Answer("x"), {"n": 1}).result().reward)
    assert rewards == [0.25, 0.25, 0.75]
    assert len(kept) == 2


def test_an_edited_helper_is_graded_anew(tmp_path: Path) -> None:  # trap: R38
    an_edited_helper_counts(tmp_path)


def test_a_key_without_the_files_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # trap: R38
    plant(monkeypatch, "c._own_files = lambda file: {}")
    with pytest.raises(AssertionError):
        an_edited_helper_counts(tmp_path)


def test_a_grader_that_is_edited_while_it_grades_has_no_further_process(tmp_path: Path) -> None:
    """A process that takes the place of one that was ended loads the file as it is then."""
    children = Children(function_in(tmp_path, "def grade(sample, item):\n    return 0.25\n"))
    children._idle.get_nowait()  # at work on another grade
    (tmp_path / "grader.py").write_text("def grade(sample, item):\n    return 0.75\n")
    with pytest.raises(GradeError, match="edited meanwhile"):
        children.ask({"sample": {}, "item": {}, "seed": 0})
    children.close()


def test_grades_that_wait_end_with_the_pool(tmp_path: Path) -> None:
    pool = Pool(function_in(tmp_path, "import time\ndef grade(sample, item):\n    time.sleep(60)\n"), at_once=1)
    grades = [pool.submit(Answer(str(n)), {}) for n in range(3)]
    begun = time.monotonic()
    pool.close()
    assert all(grade.cancelled() for grade in grades[1:])
    pool._threads.shutdown(wait=True)
    assert time.monotonic() - begun < 10
    assert all(child._process.poll() is not None for child in pool.children[""]._all)


def test_a_file_that_trains_when_it_is_loaded_is_no_grader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process of the grader would load it and train, and start one more."""
    monkeypatch.setattr(children, "python_words", lambda module: [str(fresh.python()), "-m", module])
    text = f"""
import tunesmith

def grade(sample, item):
    return 0.5

tunesmith.train("model", [{{"prompt": "Hi"}}], grader=grade, root={str(tmp_path)!r})
"""
    with pytest.raises(InputError, match="trains when it is loaded"):
        Children(function_in(tmp_path, text))
