"""Answers of a model, many at once: the batch, its cache, and answers that go on
from rows that were measured."""
