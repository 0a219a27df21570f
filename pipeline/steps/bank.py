"""Known content by its look: pictures whose PDQ hash is near one of a bank's are flagged before any net has seen them.

A hash says what is known, never what is harmless: who is not matched is tested as ever. An entry that matches more
different files of a window than a single content can explain says more about the entry than about the images, so it is
not obeyed there; decided from the window alone, like every verdict. The nets then test those images, and one that they
clear is marked in the ledger: the next run asks it again, and its content is not known.

PDQ: Facebook's perceptual hash of 256 bits; a distance of 31 is its authors' threshold.
Shapes: E entries of a bank.
"""

from __future__ import annotations

import importlib.util
import io
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.errors import UsageError
from pipeline.plan import BankSpec
from pipeline.storage import parse_uri, read_object, reason
from pipeline.store import Store, digest
from pipeline.window import Window, Work

OPERATOR = "match"
STAGE = "match"
"""What tables name as the deciding stage of a match."""
IGNORED = "ignored"
"""Operator, with bank and entry behind colons, of matches that were not obeyed."""
HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A bank as a run has it: a copy among the run's own files. ``source_sha256``: of the file that was copied."""

    name: str
    key: str
    sha256: str
    source_sha256: str


def freeze_banks(specs: Sequence[BankSpec], store: Store, prefix: str, endpoint_url: str | None) -> list[Frozen]:
    """Copies the banks of a plan below ``prefix``. Raises UsageError."""
    if specs and importlib.util.find_spec("pdqhash") is None:
        raise UsageError("the plan has banks, but pdqhash is not installed: pip install 'dorfman[bank]'")
    frozen = []
    for number, spec in enumerate(specs):
        body, hash_E4 = read_bank(spec, endpoint_url)
        key, content = f"{prefix}/bank-{number:02d}.npy", hash_E4.tobytes()
        store.write(key, content)
        frozen.append(Frozen(name=spec.name, key=key, sha256=digest(content), source_sha256=digest(body)))
    return frozen


def read_bank(spec: BankSpec, endpoint_url: str | None) -> tuple[bytes, np.ndarray]:
    """The file's bytes and its hashes (E, 4), uint64. Raises UsageError."""
    where = f"bank {spec.name!r}, {spec.file}"
    try:
        body = read_object(parse_uri(spec.file), endpoint_url)
        table = pq.read_table(io.BytesIO(body)) if spec.file.endswith(".parquet") else _read_csv(body)
        hashes = [str(value).strip().lower() for value in table["hash"].to_pylist()]
    except FileNotFoundError as error:
        raise UsageError(f"{where}: no such file") from error
    except (KeyError, ValueError, OSError, pa.ArrowException) as error:
        raise UsageError(f"{where}: wanted Parquet or CSV with a column 'hash'; {reason(error)}") from error
    bad = next((value for value in hashes if not HASH.fullmatch(value)), None)
    if bad is not None or not hashes:
        what = "there are no rows in it" if bad is None else f"{bad[:80]!r} is no PDQ hash of 64 hexadecimal digits"
        raise UsageError(f"{where}: {what}")
    return body, _to_numbers(sorted(set(hashes)))


def _read_csv(body: bytes) -> pa.Table:
    options = pyarrow.csv.ConvertOptions(column_types={"hash": pa.string()})  # digits alone would become a number
    return pyarrow.csv.read_csv(io.BytesIO(body), convert_options=options)


def _to_numbers(hashes: Sequence[str]) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(hashes)), np.uint64).reshape(-1, 4)


@dataclass(frozen=True)
class Banks:
    """A value that travels to the actors; the hashes are read where they are asked for."""

    store: Store
    banks: tuple[tuple[BankSpec, Frozen], ...]
    plan_version: str

    def match(self, window: Window, hashes: Mapping[int, tuple[str, int]]) -> None:
        """Flags the images that match. ``hashes``: by id of the image its PDQ hash and quality. Canaries are left to
        the nets, which they are there to test."""
        began = time.perf_counter()
        undecided = window.undecided
        images = [window.images[position] for position in undecided]
        asked = [image for image in images if id(image) in hashes and not image.canary]
        found: dict[int, dict[str, dict[str, Any]]] = {}
        ignored: list[Work] = []
        for spec, frozen in self.banks:
            hits = [(image, hit) for image in asked if (hit := self._nearest(spec, frozen, *hashes[id(image)]))]
            # Copies of the same bytes are one content, however often they were put there.
            contents = {(hit["match_entry"], image.sha256 or image.image_id) for image, hit in hits}
            different = Counter(entry for entry, _ in contents)
            counts = Counter(hit["match_entry"] for _, hit in hits)
            for image, hit in hits:
                if different[hit["match_entry"]] > spec.most:
                    image.match_ignored = True
                else:
                    # Of several banks of one category the nearest: an image has one row a category.
                    best = found.setdefault(id(image), {}).setdefault(hit["category"], hit)
                    if hit["match_distance"] < best["match_distance"]:
                        found[id(image)][hit["category"]] = hit
            ignored += [
                Work(operator=f"{IGNORED}:{spec.name}:{entry}", images_in=count, images_out=count)
                for entry, count in counts.items()
                if different[entry] > spec.most
            ]
        for image in images:
            if id(image) in found:
                image.findings = list(found[id(image)].values())
                image.decide("flagged")
        window.keep_pixels(undecided)
        window.work.append(
            Work(
                operator=OPERATOR,
                images_in=len(undecided),
                tests=len(asked),
                positive_tests=len(found),
                images_out=len(window.undecided),
                seconds=time.perf_counter() - began,
            )
        )
        window.work += ignored

    def _nearest(self, spec: BankSpec, frozen: Frozen, pdq: str, quality: int) -> dict[str, Any] | None:
        """The bank's nearest entry as a finding, when it is near enough."""
        if quality < spec.quality:
            return None
        hash_E4 = _open(self.store, frozen)
        distance_E = np.bitwise_count(hash_E4 ^ _to_numbers([pdq])).sum(axis=1, dtype=np.int32)
        nearest = int(distance_E.argmin())
        if distance_E[nearest] > spec.distance:
            return None
        return {
            "category": spec.category,
            "score": None,
            "threshold": None,
            "decided_stage": STAGE,
            "stages": [],
            "plan_version": self.plan_version,
            "weights_sha256": None,
            "match_bank": spec.name,
            "match_distance": int(distance_E[nearest]),
            "match_quality": quality,
            "match_entry": hash_E4[nearest].tobytes().hex(),
        }


@lru_cache(maxsize=64)
def _open(store: Store, frozen: Frozen) -> np.ndarray:
    return np.frombuffer(store.read(frozen.key, frozen.sha256), np.uint64).reshape(-1, 4)


def ignored_entries(work: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """By bank: entries that matched too much somewhere, and how many images they would have flagged there."""
    found: dict[str, dict[str, int]] = {}
    for row in work:
        if row["operator"].startswith(f"{IGNORED}:"):
            bank, _, entry = row["operator"].removeprefix(f"{IGNORED}:").rpartition(":")
            found.setdefault(bank, {})[entry] = int(row["images_in"])
    return found
