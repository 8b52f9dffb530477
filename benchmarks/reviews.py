"""Chats that ask for the verdict of a review: long questions with answers of one word, drawn by seed.

Of the size and shape of drug reviews: 20 to 250 words, most of them about 90, one of three answers of which one is
commoner. A third of the sentences say what the verdict is, the others nothing, and a few reviews contradict theirs.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

SHARES = {"positive": 0.65, "negative": 0.23, "neutral": 0.12}
CONTRARY = 0.08
QUESTION = "What does this review say of the medicine: positive, neutral or negative? Answer with one word.\n\n"
SAID = {
    "positive": (
        "It works better than anything I had tried in {n} years.",
        "Within {n} days the {part} pain was gone and I can sleep again.",
        "My doctor and I are both very happy with how it helped my {part}.",
        "I would recommend it to anybody who suffers as I did.",
    ),
    "negative": (
        "I had to stop after {n} days because the {part} pain became unbearable.",
        "It did nothing for my {part} and made me sick every {time}.",
        "Worst {n} weeks of my life, please do not take this.",
        "I gained {n} pounds and felt like another person, never again.",
    ),
    "neutral": (
        "It helped my {part} a little, but the price of {n} dollars is hard to justify.",
        "Some {time}s it works and on others I notice no difference at all.",
        "The first {n} weeks were good, then the effect wore off.",
        "It is neither better nor worse than what I took for my {part} before.",
    ),
}
BESIDE = (
    "I am {n} years old and have had trouble with my {part} since I was a child.",
    "My sister took the same thing in the {time} for {n} months.",
    "I take it with a glass of water and something to eat at about {n} in the {time}.",
    "The pharmacy changed the maker twice, so the tablets look different every {n} weeks.",
    "Before this I was on {n} milligrams of another one for my {part}.",
    "They put me on this after an operation on my {part} last {time}.",
    "I also drink coffee, about {n} cups, and I walk the dog in the {time}.",
    "The leaflet says to wait {n} hours before driving, which I did.",
)
PARTS = ("back", "stomach", "head", "knee", "chest", "neck", "shoulder", "skin")
TIMES = ("morning", "evening", "night", "winter", "summer", "afternoon")


def make_reviews(folder: Path, train: int, held_out: int) -> list[str]:
    """Write `train` chats, and `held_out` others; the words of `tunesmith train` that name them. With 0 held out the
    command holds out rows of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, written = random.Random(0), []
    for name, num in (("train", train), ("held-out", held_out)):
        path = folder / f"reviews-{name}.jsonl"
        path.write_text("".join(json.dumps(_chat(draw)) + "\n" for _ in range(num)), "utf-8")
        written.append(str(path))
    return [written[0], *(["--eval", written[1]] if held_out else [])]


def _chat(draw: random.Random) -> dict[str, list[dict[str, str]]]:
    (verdict,) = draw.choices(list(SHARES), SHARES.values())
    says = verdict if draw.random() > CONTRARY else draw.choice(list(SHARES))
    length, sentences = min(250, max(20, round(draw.lognormvariate(4.5, 0.5)))), list[str]()
    while sum(len(sentence.split()) for sentence in sentences) < length:
        kind = SAID[says] if draw.random() < 1 / 3 or not sentences else BESIDE
        words = {"n": draw.randint(2, 90), "part": draw.choice(PARTS), "time": draw.choice(TIMES)}
        sentences.append(draw.choice(kind).format(**words))
    draw.shuffle(sentences)
    asked = {"role": "user", "content": QUESTION + " ".join(sentences)}
    return {"messages": [asked, {"role": "assistant", "content": verdict}]}
