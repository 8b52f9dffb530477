"""Values as a person reads them, on a terminal and in a report."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from heapq import nlargest
from itertools import islice
from pathlib import Path

_DIGEST = re.compile(r"\A([0-9a-f]{12})[0-9a-f]{29,}\Z")


def duration(seconds: float, unit: str = "") -> str:
    """A time span: 42 s, 3:05 min, 2:10:00 h; in `unit` or a larger one."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    if not minutes and unit in ("", "s"):
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours or unit == "h" else f"{minutes}:{rest:02d} min"


def percent(share: float, digits: int = 1) -> str:
    """A share of one: 71.2 %."""
    return f"{round(100 * share, digits) + 0.0:.{digits}f} %"


def about(seconds: float) -> str:
    """A time that is an estimate, in one unit: about 40 s, about 5 min, about 2.5 h."""
    unit, size = _unit(seconds)
    return f"about {_number(seconds / size)} {unit}"


def between(seconds: float, low: float, high: float) -> str:
    """An estimated time and its range, all in its unit: about 5 min (2–7), about 28 s (14–140)."""
    unit, size = _unit(seconds)
    first, last = (_number(bound / size) for bound in (low, high))
    text = f"about {_number(seconds / size)} {unit}"
    return text if first == last else f"{text} ({first}–{last})"


def _unit(seconds: float) -> tuple[str, float]:
    return next(((unit, size) for unit, size in (("s", 1.0), ("min", 60.0)) if seconds / size < 90), ("h", 3600.0))


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


LOOKED_AT, MOST_COMPARED, LONGEST_COMPARED = 2_000, 50, 200


def nearest(name: str, names: Iterable[str], cutoff: float) -> str | None:
    """The name that is most like another, by difflib's ratio; None where no ratio reaches `cutoff`.

    Of many names those with the most letters in common are compared: a row can have 90,000.
    """
    letters, first = set(name[:LONGEST_COMPARED]), islice(names, LOOKED_AT)
    short = [other for other in first if len(other) <= LONGEST_COMPARED]
    alike = nlargest(MOST_COMPARED, short, key=lambda other: len(letters.intersection(other)))
    return next(iter(difflib.get_close_matches(name[:LONGEST_COMPARED], alike, n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, names: Iterable[str], folder: Path | None = None) -> str:
    """ " Did you mean ...?" for a name that is not there; "" where none is like it. `folder`: where files are
    named, which have to be liker, since they share suffixes."""
    near = nearest(name, names, 0.6 if folder is None else 0.75)
    return f" Did you mean {near if folder is None else folder / near}?" if near is not None else ""


def near_file(name: str | Path) -> str:
    """`did_you_mean` for a file or folder, by those next to it."""
    path = Path(name)
    with suppress(OSError, ValueError):
        names = sorted(name for name in os.listdir(path.parent) if not name.startswith("."))
        return did_you_mean(path.name, names, path.parent)
    return ""


def plural(number: int, noun: str) -> str:
    """A counted noun: 1 row, 2 rows, 3 classes, 4 entries."""
    if number == 1:
        return f"{number:,} {noun}"
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{number:,} {noun}es"
    ends_in_y = noun.endswith("y") and noun[-2:-1] not in "aeiou"
    return f"{number:,} {noun[:-1]}ies" if ends_in_y else f"{number:,} {noun}s"


def listed(names: Iterable[object], most: int = 6) -> str:
    """The first names, and how many there are beyond them: a, b, c and 4 more."""
    texts = list(map(str, names))
    return ", ".join(texts[:most]) + (f" and {len(texts) - most:,} more" if len(texts) > most else "")


def changes(then: Mapping[str, str], now: Mapping[str, str], words: str = "{} was {}, is {}") -> list[str]:
    """A phrase for each key whose value differs: `words` with the key, its value then and its value now. Of a
    digest the first characters are shown."""
    keys = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    shown = [[_DIGEST.sub(r"\1…", side.get(key, "absent")) for side in (then, now)] for key in keys]
    return [words.format(key, *values) for key, values in zip(keys, shown, strict=True)]


def command(*words: object) -> str:
    """A command to paste into a shell: this program as it can be started from here, and `words` quoted."""
    return " ".join([*_program(), *(shlex.quote(str(word)) for word in words)])


def set_words(settings: Mapping[str, object]) -> str:
    """Options as the command line takes them: --set method.rank=8 --set seed=1."""
    return " ".join(f"--set {key}={value}" for key, value in settings.items())


def _program() -> list[str]:
    """`tunesmith` where the shell finds it; else the script or interpreter that started this process."""
    script = Path(sys.argv[0])
    installed = shutil.which("tunesmith")
    same_place = installed is not None and Path(installed).parent == Path(sys.executable).parent
    if script.name == "__main__.py" and script.parent.name == "tunesmith":
        return ["tunesmith"] if same_place else [shlex.quote(_short(Path(sys.executable))), "-m", "tunesmith"]
    if script.stem != "tunesmith" or (installed is not None and Path(installed).resolve() == script.resolve()):
        return ["tunesmith"]
    return [shlex.quote(_short(script))]


def _short(path: Path) -> str:
    """The path, from the current folder if it is inside it. A link stays: an environment's Python is one."""
    absolute = Path(os.path.abspath(path))
    with suppress(ValueError, OSError):
        inside = str(absolute.relative_to(Path.cwd()))
        return inside if os.sep in inside else f".{os.sep}{inside}"
    return str(absolute)


def size(num_bytes: float) -> str:
    """Bytes: 1.9 GiB."""
    for unit, divisor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= divisor:
            return f"{num_bytes / divisor:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def option(value: object) -> str:
    """An option's value as it would be written: 0.0005, lora (rank 16, alpha 32); groups without empty ones."""
    if isinstance(value, Mapping):
        shown = {key: item for key, item in value.items() if key != "name" and item not in ((), [], {})}
        rest = ", ".join(f"{key} {option(item)}" for key, item in shown.items())
        name = str(value.get("name", ""))
        return f"{name} ({rest})" if name and rest else name or rest
    if isinstance(value, (list, tuple)):
        return ", ".join(map(option, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# What a reader would not see or a display would act on: C0 but tab and newline, DEL, C1, marks of direction,
# spaces without width, line ends that are none in a file, and halves of characters.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff\ufff9-\ufffb\ufffe\uffff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """Text with a sign for every character that a reader cannot see or a display acts on: ␀, ␛, ⟨U+202E⟩."""
    return _UNSEEN.sub(_sign, text)


def _sign(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def one_line(text: str, width: int) -> str:
    """The text on one line, at most `width` characters."""
    flat = " ".join(visible(text[: 8 * width]).split())
    return flat if len(flat) <= width and len(text) <= 8 * width else flat[: width - 1].rstrip() + "…"
