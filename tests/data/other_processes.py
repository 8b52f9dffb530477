"""What other processes import: without torch, transformers or pytest, so that they start soon."""

import multiprocessing
from typing import Any

from tunesmith.data import chat_template, encode
from tunesmith.data.renderer import Renderer


class Hungry(Renderer):
    """No process of a pool has the memory for question 9."""

    def encode(self, examples: Any, **more: Any) -> Any:
        if multiprocessing.parent_process() is not None and any("question 9" in e.parts[0].text for e in examples):
            raise MemoryError
        return super().encode(examples, **more)


def render_in_a_daemon(template: chat_template.ChatTemplate, to: Any) -> None:
    text = template.render([{"role": "user", "content": "Hi"}], prompt=True)
    to.send((text, chat_template.PROCESS.process.pid, multiprocessing.current_process().daemon))


def work_soon(connection: Any, renderer: Renderer) -> None:
    """A process of a pool whose template may take half a second."""
    chat_template.RENDER_S = 0.25
    encode._work(connection, renderer)
