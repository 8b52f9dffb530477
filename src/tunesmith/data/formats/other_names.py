"""Names that other tools and people give to the fields of rows, in lower case, without spaces and signs."""

from __future__ import annotations

QUESTION_NAMES = (
    ("question", "answer"), ("question", "response"), ("query", "answer"), ("query", "response"),
    ("prompt", "response"), ("prompt", "answer"), ("prompt", "output"), ("input", "output"), ("problem", "solution"),
)  # fmt: skip
"""Names of a text and of its answer, which are read as prompt and completion."""
SPEAKER_NAMES = (("user", "assistant"), ("human", "assistant"), ("user", "bot"), ("human", "bot"))
"""Names of two speakers, which are read as a turn of a chat."""
ANSWER_NAMES = ("response", "answer", "completion")
"""Names of the answer to an instruction."""
TEXT_NAMES = (
    "text", "comment", "review", "sentence", "body", "content", "message", "tweet", "post", "headline", "title",
    "commenttext", "reviewtext", "reviewbody", "tweettext", "comments", "feedback", "description", "document",
)  # fmt: skip
"""Names of a text."""
LABEL_NAMES = (
    "label", "labels", "sentiment", "category", "class", "topic", "rating", "intent", "stars", "emotion", "labelname",
    "tag", "score", "target",
)  # fmt: skip
"""Names of the class of a text."""
NAMES_ABOUT = {
    "id", "title", "url", "uri", "link", "source", "author", "name", "date", "time", "timestamp", "lang", "language",
    "license", "split", "dataset", "domain", "meta", "metadata", "subset", "path", "file", "filename",
}  # fmt: skip
"""Names of columns with facts about a text: neither the text nor its class."""
