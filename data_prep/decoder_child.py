"""The child process of `data_prep.guard`. It reads requests from standard input, one JSON line each, decodes, and answers on
standard output. Decoding has a process of its own because media files are untrusted.
"""

import base64
import json
import os
import pathlib
import queue
import resource
import signal
import sys
import threading
import traceback

from data_prep import media, process_limits, streams
from data_prep.windows import Window

OUT_OF_MEMORY_STATUS, HARD_LIMIT_STATUS = 77, 78
_MAX_STDERR_BYTES = 1 << 20
MAX_PART_BYTES = 1 << 20  # per request for a part of a file that the parent reads


def main() -> None:
    """Answers requests from standard input until it ends."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes to stderr, so that it is not taken for a reply
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as KeyboardInterrupt it would look like a crash of the video
    for kind, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, _MAX_STDERR_BYTES)):
        resource.setrlimit(kind, (most, most))
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    status = 1
    try:
        _reply(replies, {"ready": True})
        while True:
            _answer(json.loads(requests.get()), replies, requests)
    except MemoryError:
        status = OUT_OF_MEMORY_STATUS
    except process_limits.HardLimitError as error:
        status = HARD_LIMIT_STATUS
        print(error, file=sys.stderr, flush=True)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(status)  # a normal exit of Python would wait for the other thread


def _read_requests(requests: queue.SimpleQueue) -> None:
    """Reads requests while the other thread decodes. When the parent ends, this ends the child, even if decoding hangs."""
    with open(0, "rb") as lines:
        for line in lines:
            requests.put(line)
    os._exit(0)


def _answer(request: dict, replies, requests: queue.SimpleQueue) -> None:
    process_limits.limit(request["cpu_s"], request["memory_mb"])
    path = pathlib.Path(request["path"])
    if request["probe"]:
        kinds = tuple(request["probe"])
        reason = streams.probe(path, kinds)
        _reply(replies, {"reason": reason, "length_s": None if reason else streams.length_s(path, kinds)})
        return
    windows = [Window(start, stop, tuple(times), open_end) for start, stop, times, open_end in request["windows"]]
    if request["hdf5"]:
        from data_prep import hdf5_audio  # imported here, since children for media files don't need h5py

        def read(start: int, stop: int) -> bytes:
            _reply(replies, {"start": start, "stop": min(stop, start + MAX_PART_BYTES)})
            return base64.b64decode(requests.get())

        num_bytes = request["remote_bytes"]
        file = path if num_bytes is None else hdf5_audio.Parts(num_bytes, read)
        cuts = hdf5_audio.cut_windows(file, windows, *request["hdf5"])
    else:
        options = {name: request[name] for name in ("short_side_px", "quality", "stereo")}
        cuts = media.cut_windows(path, windows, **options)
    for i, cut in cuts:
        if isinstance(cut, str):
            _reply(replies, {"index": i, "reason": cut})
            continue
        audio = cut.audio.astype("<i2").tobytes()
        header = {
            "index": i, "jpegs": [len(jpeg) for jpeg in cut.frames], "times_us": cut.frame_times_us.tolist(),
            "height": cut.height, "width": cut.width, "audio": len(audio),
        }  # fmt: skip
        _reply(replies, header, *cut.frames, audio)


def _reply(replies, header: dict, *payload: bytes) -> None:
    replies.write(json.dumps(header).encode() + b"\n" + b"".join(payload))
    replies.flush()


if __name__ == "__main__":
    main()
