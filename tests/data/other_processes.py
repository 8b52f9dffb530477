"""What other processes import: without torch, transformers or pytest, so that they start soon."""

import multiprocessing
from typing import Any

from tunesmith.data import chat_template


def render_in_a_daemon(template: chat_template.ChatTemplate, to: Any) -> None:
    text = template.render([{"role": "user", "content": "Hi"}], prompt=True)
    to.send((text, chat_template.PROCESS.process.pid, multiprocessing.current_process().daemon))
