"""Checks that what `data_prep.decoder_child` sends can be an answer to what `data_prep.guard` asked."""

import json
import math

from data_prep import decoder_child
from data_prep.windows import Window, num_samples

_MAX_JPEG_BYTES = 1 << 26
_MAX_CLIP_BYTES = 1 << 30  # a record must stay below protobuf's 2 GiB
_MAX_SIDE_PX = 65535  # of a JPEG


def check_question(line: bytes, num_bytes: int) -> tuple[int, int] | None:
    """Returns (start, stop) if the child asks for this part of a file of `num_bytes`, or None if the line is an answer.

    Raises:
      ValueError: The line is no JSON object, or the file has no such part.
    """
    asked = _object(line)
    if "start" not in asked:
        return None
    start = _whole(asked["start"], "start", 0, num_bytes - 1)
    return start, _whole(asked.get("stop"), "stop", start + 1, min(start + decoder_child.MAX_PART_BYTES, num_bytes))


def check_answer(line: bytes, windows: list[Window]) -> dict:
    """Returns the child's answer for one of the windows.

    It is either {"index", "reason"} or {"index", "jpegs", "times_us", "height", "width", "audio"}, where "jpegs" and "audio"
    are the numbers of bytes that follow, in this order.

    Raises:
      ValueError: The line can't be an answer for any of the windows.
    """
    answer = _object(line)
    index = _whole(answer.get("index"), "index", 0, len(windows) - 1)
    if "reason" in answer:
        return {"index": index, "reason": _reason(answer["reason"])}
    window = windows[index]
    samples = num_samples(window.stop_s - window.start_s)
    lists = {}
    for key, least, most in (("jpegs", 1, _MAX_JPEG_BYTES), ("times_us", -(1 << 62), 1 << 62)):
        numbers = answer.get(key)
        if not isinstance(numbers, list) or len(numbers) != len(window.frame_times_s):
            raise ValueError(f"{key} is not a list of {len(window.frame_times_s)} numbers")
        lists[key] = [_whole(number, key, least, most) for number in numbers]
    if sum(lists["jpegs"]) > _MAX_CLIP_BYTES:
        raise ValueError(f"{sum(lists['jpegs'])} bytes of jpegs, more than {_MAX_CLIP_BYTES}")
    least, most = (1, _MAX_SIDE_PX) if window.frame_times_s else (0, 0)
    sides = {key: _whole(answer.get(key), key, least, most) for key in ("height", "width")}
    size = _whole(answer.get("audio"), "audio", 2 if window.open_end else 2 * samples, 2 * samples)
    if size % 2:
        raise ValueError(f"audio has {size} bytes, not a multiple of 2")
    return {"index": index, **lists, **sides, "audio": size}


def check_length(line: bytes) -> float | str | None:
    """Returns the length of a file in seconds, None if it doesn't say, or the reason why it can't give clips.

    Raises:
      ValueError: The line can't be an answer to this question.
    """
    answer = _object(line)
    reason, length = answer.get("reason", ""), answer.get("length_s")
    if reason is not None:
        return _reason(reason)
    if not (length is None or (type(length) is float and math.isfinite(length))):
        raise ValueError(f"length_s is {length!r:.40}, not a finite number")
    return length


def printable(words: str) -> str:
    """Returns the first 200 printable characters, so that nothing can control a terminal."""
    return "".join(c for c in words if c.isprintable())[:200]


def _reason(told) -> str:
    reason = printable(str(told))
    if not reason:
        raise ValueError("the reason is empty")
    return reason


def _object(line: bytes) -> dict:
    try:
        answer = json.loads(line)
    except RecursionError:
        raise ValueError("a line of nested brackets") from None
    if not isinstance(answer, dict):
        raise ValueError("not a JSON object")
    return answer


def _whole(value, name: str, least: int, most: int) -> int:
    """Returns a value of an answer if it is a whole number from `least` to `most`.

    Raises:
      ValueError: It is not.
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {str(value)[:40]!r}, not a whole number from {least} to {most}")
    return value
