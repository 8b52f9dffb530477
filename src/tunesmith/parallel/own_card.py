"""The card of a rank: taken before anything can start CUDA, and looked at afterwards. It imports no torch."""

from __future__ import annotations

import sys
from collections.abc import MutableMapping

from tunesmith.errors import GroupError, InputError, RecipeError
from tunesmith.parallel.world import Place
from tunesmith.types import JsonObject


def take_card(place: Place, device: str, environ: MutableMapping[str, str]) -> str:
    """Let this process see its own card alone, as cuda:0, in all of its threads; returns "".

    Where CUDA runs already (Ray's workers), the card that is current there, which has to be named then:
    "cuda:1". Raises RecipeError for a device that is one, InputError for more processes than cards.
    """
    if place.size > 1 and device not in ("auto", "cuda", "cpu"):
        raise RecipeError(f"device: {device}: one device, but {place.size} processes train. Use cuda, cpu or auto.")
    if place.size == 1 or device == "cpu" or place.local_size == 1:
        return ""
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
        return f"cuda:{torch.cuda.current_device()}"
    cards = list(filter(None, environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))
    if len(cards) == 1 or environ.get("CUDA_VISIBLE_DEVICES") == "":  # its agent gave it one, or a person none
        return ""
    if cards and len(cards) < place.local_size:
        raise InputError(
            f"LOCAL_WORLD_SIZE={place.local_size}: that number of processes was started on this machine, but "
            f"CUDA_VISIBLE_DEVICES names {len(cards)} cards. Start at most {len(cards)}."
        )
    environ["CUDA_VISIBLE_DEVICES"] = cards[place.local_rank] if cards else str(place.local_rank)
    return ""


def card_of(place: Place, device: str) -> JsonObject:
    """Name and number of a rank's card; {} on a processor. Raises GroupError where the rank sees more than its
    own, because something listed the cards before it took one."""
    import torch

    if not device.startswith("cuda"):
        return {}
    seen = max(torch.cuda.device_count(), torch._C._cuda_getDeviceCount())
    if place.local_size > 1 and ":" not in device and seen != 1:
        raise GroupError(
            f"rank {place.rank}: it sees {seen} cards instead of its own: a library started CUDA before it "
            "took one. Let the launcher set CUDA_VISIBLE_DEVICES for each process."
        )
    properties = torch.cuda.get_device_properties(device)
    return {"card": properties.name, "uuid": str(getattr(properties, "uuid", ""))}
