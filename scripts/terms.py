"""Make examples/data/terms.jsonl and terms-held-out.jsonl: medical terms, each with the description of its code.

`pip install simple-icd-10-cm==1.5; python scripts/terms.py`. Codes are ICD-10-CM's, in the public domain. One term of a
code is trained, so that no description is there twice; others are held out.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "data"
ROWS = {"terms.jsonl": 3000, "terms-held-out.jsonl": 300}


def main() -> None:
    import simple_icd_10_cm as icd

    codes = icd.get_all_codes(with_dots=True)
    used = {icd.get_description(code).lower() for code in codes}
    trained, held_out, described = [], [], set[str]()
    for code in codes:
        description = icd.get_description(code)
        for term in icd.get_inclusion_term(code):
            if term.lower() in used:
                continue
            used.add(term.lower())
            rows = held_out if description.lower() in described else trained
            rows.append({"query": term, "positive": description})
            described.add(description.lower())
    for name, rows in zip(ROWS, (trained, held_out), strict=True):
        rows.sort(key=lambda row: hashlib.sha256(row["query"].encode()).digest())
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows[: ROWS[name]]]
        (FOLDER / name).write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    main()
