"""The file that names what somebody appealed about: uris or image ids, one a line."""

from __future__ import annotations

import codecs
from collections import defaultdict
from collections.abc import Iterable

from pipeline.errors import UsageError
from pipeline.reporting.visible import visible
from pipeline.review.items import Item
from pipeline.review.queue import Queue
from pipeline.storage import parse_uri, read_object


def read_appeals(uri: str, endpoint_url: str | None, queue: Queue) -> list[Item]:
    """The images of the queue that the file names, in its order, each once.

    Raises UsageError for a file with lines that name nothing in the queue. It says which and why, of all of them: one
    pass mends the file. The others are not reviewed without them, for an appeal that is left out would go unnoticed.
    """
    try:
        lines = read_object(parse_uri(uri), endpoint_url).removeprefix(codecs.BOM_UTF8).splitlines()
    except FileNotFoundError as error:
        raise UsageError(f"appeals {uri}: no such file") from error
    named = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}
    if not named:
        raise UsageError(f"appeals {uri}: it names nothing; write one uri or image id a line")
    by_name: dict[bytes, list[Item]] = defaultdict(list)
    for item in queue.items:
        by_name[item.uri.encode()].append(item)
        by_name[item.image_id.encode()].append(item)
    strange = {number: name for number, name in named.items() if name not in by_name}
    if strange:
        raise UsageError(f"appeals {uri}: {_problems(strange, len(named), queue.run_ids)}")
    return list(dict.fromkeys(item for name in named.values() for item in by_name[name]))


def _problems(strange: dict[int, bytes], lines: int, run_ids: Iterable[str]) -> str:
    """By reason, each with the lines that it holds for."""
    unknown, unreadable = [], []
    for number, name in strange.items():
        try:
            unknown.append(f"{number} {visible(name.decode())!r}")
        except UnicodeDecodeError:
            unreadable.append(str(number))
    said = [f"{len(strange):,} of {lines:,} lines name no image to review"]
    if unknown:
        said.append(
            f"about nothing that {', '.join(run_ids)} flagged or drew (name the runs that did with --run-id, or take "
            f"the lines out): line {', line '.join(unknown)}"
        )
    if unreadable:
        said.append(f"no text in UTF-8 (save the file as such): line {', line '.join(unreadable)}")
    return "; ".join(said)
