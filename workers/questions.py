"""What workers can be asked: one table for ComfyUI's process and for theirs."""

from dataclasses import dataclass

from ..processes import LOADING, READY, RUNNING

HOUR = 3600.0


@dataclass(frozen=True)
class Question:
    """One that workers can be asked. Its name is the kind of its message, and of the method of Worker that answers.

    state: shown of the workers from then on. everybody: whether every rank answers; else rank 0 alone.
    seconds: how long ComfyUI's process waits for the answers.
    """

    state: str
    everybody: bool = False
    seconds: float = HOUR


QUESTIONS = {
    "holdings": Question(LOADING, everybody=True),
    "load": Question(LOADING),
    "forget": Question(READY),
    "begin": Question(LOADING, everybody=True),  # quantizes
    "call": Question(RUNNING),  # may compile
    "end": Question(READY, everybody=True),
    "take_vae": Question(LOADING),
    "decode_strip": Question(RUNNING, everybody=True),
    "decode_tile": Question(RUNNING, everybody=True),
    "room": Question(READY, everybody=True),
    "make_room": Question(READY, everybody=True, seconds=600.0),
}
