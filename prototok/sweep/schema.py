"""Columns of the tables in a run folder."""

from __future__ import annotations

import pyarrow as pa

VERSION = 1

_STRING, _INT, _REAL, _SINGLE, _BOOL = (
    pa.string(), pa.int64(), pa.float64(), pa.float32(), pa.bool_(),
)  # fmt: skip
_IDS, _SINGLES = pa.list_(pa.int32()), pa.list_(pa.float32())


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema(list(columns.items()), metadata={"prototok.sweep": str(VERSION)})


# One row an (experiment, unit). `spec` is the unit's canonical JSON, the others are read from it.
PLAN = _schema(
    experiment=_STRING, key=_STRING, mode=_STRING, model=_STRING, source=_STRING, length=_INT,
    share=_STRING, group_size=_INT, arrangement=_STRING, vectors=_INT, recipe=_STRING,
    rows=_INT, spec=_STRING,
)  # fmt: skip

# One row a text as tokenised for one model. `number` counts the texts of a (source, tokenizer);
# `context` names what a continuation continues, null elsewhere; `origin` is a file and a place.
TEXTS = _schema(
    text_id=_STRING, source=_STRING, number=_INT, context=_STRING, origin=_STRING, ids=_IDS,
    text=_STRING,
)  # fmt: skip

# One row a (text, seed) of a finished unit.
FITS = _schema(
    # What was asked for. `experiment` is the one that was planned first, or the one read by.
    key=_STRING, experiment=_STRING, mode=_STRING, model=_STRING, source=_STRING, text_id=_STRING,
    number=_INT, context=_STRING, seed=_INT, length=_INT, share=_STRING, group_size=_INT,
    arrangement=_STRING, vectors=_INT, recipe=_STRING,
    # With what: resolved revision, settings of the recipe as JSON, versions as JSON.
    revision=_STRING, fingerprint=_STRING, recipe_settings=_STRING, dtype=_STRING, device=_STRING,
    backend=_STRING, versions=_STRING,
    # What came of it. accuracy, exact, correct and margin as decoded alone at batch 1, the worse of
    # the model's dtype and float32 (autoregressive: as generated); loss in nats a token; seconds is
    # the row's share of the batches it was in.
    accuracy=_REAL, exact=_BOOL, correct=_INT, margin=_SINGLE, loss=_SINGLE,
    accuracy_in_batch=_SINGLE,  # autoregressive: teacher-forced
    steps=_INT, seconds=_REAL,
    # H_LM of the N target tokens in nats, over `h_lm_tokens` of them (BOS dropped: N − 1).
    h_lm=_REAL, h_lm_tokens=_INT,
    target_ids=_IDS, decoded_ids=_IDS, target_text=_STRING, decoded_text=_STRING,
    margins=_SINGLES,  # (N,) target logit − best other logit; autoregressive: null
    # Median seconds of decoding this row alone, where the unit is timed and the row is exact, and
    # by which decoder.
    decode_seconds=_REAL, tokens_per_second=_REAL, decoder=_STRING,
    # Where the vectors are: text `row` of tensors/<key>.safetensors, whose SHA-256 this is.
    row=_INT, tensors_sha256=_STRING,
    worker=_STRING, finished=pa.timestamp("ms", tz="UTC"),
)  # fmt: skip

# One row a unit that could not be done.
FAILED = _schema(
    key=_STRING, reason=_STRING, attempts=_INT, traceback=_STRING,
    time=pa.timestamp("ms", tz="UTC"),
)  # fmt: skip
