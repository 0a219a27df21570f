"""Every table and every Ray row, declared once: names, types, units, null rules.

Types are those every reader has: no unsigned integers, no float16, no nanoseconds, no dictionaries
turned into strings.
"""

from __future__ import annotations

import pyarrow as pa

TIMESTAMP = pa.timestamp("us", tz="UTC")

VERSION = 2
"""Of the tables. It grows when a column is added, always at the end and nullable; none is ever renamed, given another
type or another meaning. ``docs/tables.md`` has what changed."""

ALL = "all categories"
"""What an audit calls its estimates of all of them together."""

LABELS = pa.schema(
    [
        ("uri", pa.string()),  # as the ledger's source_uri names it
        ("category", pa.string()),
        ("label", pa.int8()),  # 1 violating, 0 not
    ]
)

REVIEWS = pa.schema(
    [
        ("image_id", pa.string()),
        ("category", pa.string()),
        ("label", pa.int8()),  # 1 violating, 0 not
    ]
)

# What people said of images on the review page, below ``reviews/``: a row for each category that was asked for.
DECISIONS = pa.schema(
    [
        ("decision_id", pa.string()),  # 32 hexadecimal digits; the same in all rows of one decision
        ("kind", pa.string()),  # first, second or appeal
        ("reviewer", pa.string()),  # as the page was started with
        ("decided_at", TIMESTAMP),
        ("run_id", pa.string()),  # whose tables brought the image into the queue
        ("image_id", pa.string()),
        ("source_uri", pa.string()),
        ("category", pa.string()),
        ("decision", pa.string()),  # violating, not violating, unsure, not seen or withdrawn
        ("label", pa.int8()),  # 1 violating, 0 not violating; null otherwise
        ("revealed", pa.bool_()),  # whether the picture had been shown without its blur
        ("sha256", pa.string()),  # of the bytes that were shown: null where there were none to show
        ("withdraws", pa.string()),  # the decision that is taken back: null unless withdrawn
    ]
)

MANIFEST = pa.schema(
    [
        ("uri", pa.string()),
        ("size_bytes", pa.int64()),  # null where the source does not tell
        ("etag", pa.string()),  # null where the source does not tell
        ("modified_at", TIMESTAMP),  # null where the source does not tell
        ("image_id", pa.string()),  # 32 hexadecimal digits
        ("canary", pa.bool_()),  # a known positive that was injected: the source does not list it
        ("ordinal", pa.int64()),  # rank in the whole manifest
        ("window", pa.int64()),
        ("shard", pa.int32()),
        ("judged_run_id", pa.string()),  # this and the next two: of an object whose earlier verdict stands, else null
        ("judged_outcome", pa.string()),
        ("sha256", pa.string()),
    ]
)

# A listed object on its way into the manifest.
LISTED = pa.schema(
    [MANIFEST.field(name) for name in ("uri", "size_bytes", "etag", "modified_at", "image_id", "canary")]
    + [pa.field("rank", pa.int64())]  # its place: a salted hash of the image id
)
RANKED = pa.schema([*LISTED, *(MANIFEST.field(name) for name in ("judged_run_id", "judged_outcome", "sha256"))])

# What the newest comparable run says of each object it listed: tonight's listing is joined with it.
EARLIER = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("judged_run_id", pa.string()),  # null where nobody has judged it, as after an error
        ("judged_outcome", pa.string()),  # cleared or flagged
        ("sha256", pa.string()),
    ]
)

# One test of one group that the image was a member of.
TEST = pa.struct(
    [
        ("stage", pa.string()),
        ("round", pa.int32()),  # 0 is the first round of the stage
        ("group_id", pa.string()),
        ("group_size", pa.int32()),  # members present: holes are not counted
        ("scores", pa.list_(pa.float32())),  # by category, in the plan's order
        ("burst", pa.bool_()),  # whether it was made because the window fell back, or of a part of such a group
    ]
)

STAGE_HISTORY = pa.struct(
    [
        ("stage", pa.string()),
        ("round", pa.int32()),
        ("group_id", pa.string()),
        ("group_size", pa.int32()),
        ("score", pa.float32()),  # of this row's category
        ("threshold", pa.float32()),
        ("model_version", pa.string()),
    ]
)

# What flags an image without a test of this run: the part of its flagged row that is not about the object.
FINDING = pa.struct(
    [
        ("category", pa.string()),
        ("score", pa.float32()),  # this and the next: null when a hash match decided
        ("threshold", pa.float32()),
        ("decided_stage", pa.string()),
        ("stages", pa.list_(STAGE_HISTORY)),
        ("plan_version", pa.string()),
        ("weights_sha256", pa.string()),
        ("match_bank", pa.string()),
        ("match_distance", pa.int32()),
        ("match_quality", pa.int32()),
        ("match_entry", pa.string()),
    ]
)

# Content that an earlier run has judged (``contents.py``), in the order of its digests.
CONTENTS = pa.schema(
    [
        ("sha256", pa.string()),
        ("run_id", pa.string()),  # that judged it
        ("outcome", pa.string()),  # cleared or flagged
        ("findings", pa.list_(FINDING)),  # null where it was cleared
    ]
)

# Content on its way into such a part. An image of it stands for its findings.
RANKED_CONTENT = pa.schema(
    [
        ("rank", pa.int64()),  # the digest's first eight bytes, less 2^63
        *(CONTENTS.field(name) for name in ("sha256", "run_id", "outcome")),
        ("image_id", pa.string()),
    ]
)

IMAGE = pa.struct(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("size_bytes", pa.int64()),
        ("etag", pa.string()),
        ("modified_at", TIMESTAMP),
        ("canary", pa.bool_()),
        ("payload", pa.large_binary()),  # set by fetch, null as soon as the image is decided
        ("format", pa.string()),  # format, width, height: set by decode
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("outcome", pa.string()),  # null while undecided
        ("error_code", pa.string()),  # set exactly when the outcome is error
        ("error_detail", pa.string()),
        ("tests", pa.list_(TEST)),  # in the order they were made
        ("sha256", pa.string()),  # of the payload; set by fetch
        ("judged_run_id", pa.string()),  # set by fetch when the same content has a verdict already
        ("findings", pa.list_(FINDING)),  # what flags it without a test
        ("match_ignored", pa.bool_()),  # whether it matched an entry of a bank that was not obeyed
    ]
)

# What one operator did for one window. Counts add up over windows in any order.
WORK = pa.struct(
    [
        ("operator", pa.string()),
        ("round", pa.int32()),  # null for operators without rounds
        ("images_in", pa.int64()),
        ("tests", pa.int64()),
        ("positive_tests", pa.int64()),
        ("images_out", pa.int64()),  # still undecided afterwards
        ("gmac", pa.float64()),
        ("seconds", pa.float64()),  # at work
        ("transfer_seconds", pa.float64()),  # of them, on bringing pixels to a stage's device
        ("waited_seconds", pa.float64()),  # before it, with nothing to do: with the first window of a call
        ("bursts", pa.int64()),  # 1 in a stage's first round when the window fell back there, else 0
    ]
)

# The Ray row: one window.
WINDOW = pa.schema(
    [
        ("shard", pa.int32()),
        ("window", pa.int64()),
        ("first_ordinal", pa.int64()),
        ("images", pa.large_list(IMAGE)),  # in ordinal order
        ("pixels", pa.large_binary()),  # uint8 (undecided images, side, side, 3), in ordinal order; null when none
        ("pixels_side", pa.int32()),
        ("work", pa.list_(WORK)),
    ]
)

# What the sink tells the driver about one attempt file set.
RECEIPT = pa.schema(
    [
        ("shard", pa.int32()),
        ("windows", pa.list_(pa.int64())),
        ("attempt", pa.string()),
        (
            "files",
            pa.list_(pa.struct([("table", pa.string()), ("sha256", pa.string())])),
        ),  # none for a table without rows
        ("outcomes", pa.list_(pa.struct([("outcome", pa.string()), ("images", pa.int64())]))),
        ("work", pa.list_(WORK)),
    ]
)

# Decoded pictures for training: ``pixels`` is uint8 (images, side, side, 3), or null where one is unreadable.
PICTURES = pa.schema(
    [
        ("first", pa.int64()),
        ("pixels", pa.large_binary()),
        ("decode_seconds", pa.float64()),  # of all of them
        ("uri", pa.string()),
        ("error", pa.string()),
    ]
)

# Groups on their way to a candidate and back: members are indices into the decoded pictures. Without members the test
# is timed.
SCORING = pa.schema(
    [
        ("job", pa.int64()),
        ("model", pa.string()),
        ("side", pa.int32()),  # pixels
        ("size", pa.int32()),  # members of a group
        ("members", pa.list_(pa.int64())),  # group after group; null on the way back
        ("scores", pa.list_(pa.float32())),  # group after group, by category; null on the way there
        ("seconds", pa.float64()),  # of one test, from pixels
        ("seconds_kept", pa.float64()),  # of one test, from kept features; null where there are none
    ]
)

# What a candidate test said of one group of labelled images (``scores.py``); an image alone is a group of one.
SCORES = pa.schema(
    [
        ("arrangement", pa.int32()),  # 0: images alone; others as the file's metadata lists them
        ("block", pa.int64()),  # groups of one block nest: a block holds the groups of every size
        ("candidate", pa.string()),
        ("half", pa.string()),  # search or certify
        ("clusters", pa.list_(pa.int64())),  # pictures of one number are versions of one
        ("uris", pa.list_(pa.string())),  # members, in order
        ("labels", pa.list_(pa.int8())),  # by category: 1 when any member shows it
        ("scores", pa.list_(pa.float32())),  # by category
    ]
)

LEDGER = pa.schema(
    [
        ("run_id", pa.string()),
        ("image_id", pa.string()),
        ("source_uri", pa.string()),
        ("outcome", pa.string()),  # cleared, flagged, error or skipped
        ("decided_stage", pa.string()),  # null for error and skipped, but for a canary found or missed; "match": a bank
        ("decided_round", pa.int32()),
        ("group_id", pa.string()),
        ("group_size", pa.int32()),
        ("group_score", pa.float32()),  # of the deciding test, for the category nearest its threshold
        ("score", pa.float32()),  # of the image alone: null when it was decided in a group
        ("category", pa.string()),  # the deciding category: null unless flagged, or a canary found
        ("burst", pa.bool_()),  # whether any test of the image was made in a fallback: null when it had none
        ("error_code", pa.string()),
        ("skip_reason", pa.string()),  # set exactly when the outcome is skipped
        ("shard", pa.int32()),
        ("ordinal", pa.int64()),
        ("sha256", pa.string()),  # of the object's bytes, by whoever fetched them last: null when nobody did
        ("judged_run_id", pa.string()),  # the run whose verdict was taken over: null when this run judged the image
        ("judged_outcome", pa.string()),  # that verdict, cleared or flagged; null with judged_run_id
        ("match_ignored", pa.bool_()),  # true when it matched an entry of a bank that was not obeyed in its window
    ]
)

FLAGGED = pa.schema(
    [
        ("run_id", pa.string()),
        ("image_id", pa.string()),
        ("source_uri", pa.string()),
        ("etag", pa.string()),
        ("size_bytes", pa.int64()),
        ("source_modified_at", TIMESTAMP),
        ("scanned_at", TIMESTAMP),
        ("image_format", pa.string()),
        ("width", pa.int32()),  # pixels, as stored: before EXIF rotation
        ("height", pa.int32()),
        ("category", pa.string()),
        ("score", pa.float32()),
        ("threshold", pa.float32()),
        ("decided_stage", pa.string()),
        ("stages", pa.list_(STAGE_HISTORY)),
        ("plan_version", pa.string()),
        ("weights_sha256", pa.string()),  # of the deciding stage's net
        ("recommended_action", pa.string()),
        ("judged_run_id", pa.string()),  # the run whose verdict was taken over: null when this run judged the image
        ("match_bank", pa.string()),  # this and the next three: of a hash match, null when a net decided
        ("match_distance", pa.int32()),  # bits of 256 that differ
        ("match_quality", pa.int32()),  # of the picture's hash, 0 to 100
        ("match_entry", pa.string()),  # the bank's hash that was matched, 64 hexadecimal digits
    ]
)

ERRORS = pa.schema(
    [
        ("run_id", pa.string()),
        ("image_id", pa.string()),
        ("source_uri", pa.string()),
        ("etag", pa.string()),
        ("size_bytes", pa.int64()),
        ("error_code", pa.string()),
        ("error_detail", pa.string()),  # one line, for people
        ("shard", pa.int32()),
        ("ordinal", pa.int64()),
        ("scanned_at", TIMESTAMP),
    ]
)

# Cleared images, drawn at random for people to look at.
AUDIT = pa.schema(
    [
        ("run_id", pa.string()),
        ("image_id", pa.string()),
        ("source_uri", pa.string()),
        ("etag", pa.string()),
        ("probability", pa.float64()),  # with which it was drawn
        ("decided_stage", pa.string()),
        ("decided_round", pa.int32()),
        ("group_id", pa.string()),
        ("group_size", pa.int32()),
        ("scores", pa.list_(pa.float32())),  # of the clearing test, by category, in the plan's order
        ("shard", pa.int32()),
        ("ordinal", pa.int64()),
        ("scanned_at", TIMESTAMP),
    ]
)

TABLES = {"ledger": LEDGER, "flagged": FLAGGED, "errors": ERRORS, "audit": AUDIT}

# Within a shard's file: analysts read flagged by category from the highest score down.
SORT_KEYS: dict[str, list[tuple[str, str]]] = {
    "ledger": [("ordinal", "ascending")],
    "flagged": [("category", "ascending"), ("score", "descending"), ("image_id", "ascending")],
    "errors": [("error_code", "ascending"), ("ordinal", "ascending")],
    "audit": [("ordinal", "ascending")],
}
