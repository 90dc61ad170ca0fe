"""Readers: one record of a format, by its index.

`read(index)` returns (image bytes, captions joined by SEPARATOR, label), or raises
Unreadable. It is called from many threads at once. `key` says where a record lies.
"""

import json
import operator
import os
from collections.abc import Mapping

from unicl_jax.data.indexing import Index
from unicl_jax.data.labels import OUT_OF_RANGE
from unicl_jax.data.listing import FileIndex
from unicl_jax.data.records import NO_LABEL, SEPARATOR
from unicl_jax.data.shards import ShardReader, open_shard
from unicl_jax.data.tensorflow import import_tensorflow
from unicl_jax.errors import InputError

NUM_PROBED = 8  # records looked at before a fault is called a wrong setting
NO_UTF8 = "caption is no UTF-8"
_EXAMPLE_KINDS = {"image": "bytes_list", "text": "bytes_list", "label": "int64_list"}


class Unreadable(Exception):
    """A record that cannot be used; `reason` is its entry in `skipped`."""

    def __init__(self, reason: str, found: object = ""):
        """Keeps both.

        Args:
          reason: in a few words, the same for all records with that fault.
          found: what is wrong in this one.
        """
        super().__init__(reason)
        self.reason = reason
        self.found = found


class LostShard(Unreadable):
    """A record whose shard is gone or cut off, and its neighbours with it."""


def check_target(
    kind: str, num_classes: int, text: bytes, label: int
) -> tuple[tuple[str, ...], int]:
    """Takes a record's captions apart, or checks its label.

    Args:
      kind: one of records.KINDS.
      num_classes: of an image-label source.
      text: captions, joined by SEPARATOR.
      label: an integer.

    Returns:
      The captions without what surrounds them, and NO_LABEL; or () and the label.

    Raises:
      Unreadable: if there is none, or it is none.
    """
    if kind == "image_label":
        if not 0 <= label < num_classes:
            raise Unreadable(OUT_OF_RANGE, label)
        return (), label
    try:
        captions = [part.decode().strip() for part in text.split(SEPARATOR)]
    except UnicodeDecodeError as error:
        raise Unreadable(NO_UTF8) from error
    captions = tuple(caption for caption in captions if caption)
    if not captions:
        raise Unreadable("empty caption")
    return captions, NO_LABEL


class TFRecordReader:
    """Reads tf.Example records; TFDS writes the same."""

    settings = "`fields`"  # what to mend where no record can be read

    def __init__(self, index: Index, fields: Mapping, label_offset: int):
        """Holds what to read.

        Args:
          index: of the shards.
          fields: feature names by "image" and "text" or "label"; of several with ";"
            between them, `check_fields` finds the one that is there.
          label_offset: the first class's label in the files.
        """
        self.index = index
        self.fields = dict(fields)
        self._label_offset = label_offset
        self.shards = ShardReader(index.shards)

    def read(self, index: int) -> tuple[bytes, bytes, int]:
        """Returns the image bytes, the captions joined by SEPARATOR, the label."""
        features = self.features(index)
        if features is None:
            raise Unreadable("not a tf.Example")
        values = {}
        for role, field in self.fields.items():
            kind = features[field].WhichOneof("kind") if field in features else None
            if kind != _EXAMPLE_KINDS[role]:
                raise Unreadable(f'no field "{field}"')
            values[role] = getattr(features[field], kind).value
            if role != "text" and len(values[role]) != 1:
                raise Unreadable(f"{len(values[role])} values of {role}")
        image = values["image"][0]
        if "text" in values:
            return image, SEPARATOR.join(values["text"]), 0
        return image, b"", values["label"][0] - self._label_offset

    def key(self, index: int) -> str:
        """Returns the shard of a record and where it starts there."""
        at = self.index
        return f"{at.shards[at.shard[index]]}#{at.offset[index]}"

    def where(self, index: int) -> str:
        """Returns the file of a record."""
        return self.index.shards[self.index.shard[index]]

    def check_fields(self, source: str) -> None:
        """Finds each field; stops if the first records all lack it: a setting.

        Args:
          source: the source's name, for the error.

        Raises:
          InputError: names the field and those that the records hold.
        """
        found = self._fields_found()
        for role, names in self.fields.items():
            fits = [n for n in names.split(";") if found.get(n) == _EXAMPLE_KINDS[role]]
            if not fits:
                wanted = '" or "'.join(names.split(";"))
                raise InputError(
                    f'source "{source}": fields.{role} must name a '
                    f'{_EXAMPLE_KINDS[role]} field: "{wanted}" is none in the first '
                    f"{NUM_PROBED} records, which hold "
                    f"{_menu(found) or 'no tf.Example'}; set the source's "
                    f"`fields.{role}`."
                )
            self.fields[role] = fits[0]

    def has(self) -> str:
        """Returns what the first records hold, for an error."""
        return f"; they hold {_menu(self._fields_found())}"

    def _fields_found(self) -> dict[str, str]:
        found = {}
        for index in range(min(NUM_PROBED, len(self.index))):
            try:
                features = self.features(index) or {}
            except Unreadable:
                continue
            found.update({key: f.WhichOneof("kind") for key, f in features.items()})
        return found

    def features(self, index: int) -> Mapping | None:
        """Returns the features of a record by name, None if it is no tf.Example."""
        at = self.index
        span = int(at.shard[index]), int(at.offset[index]), int(at.size[index])
        payload = _read(self.shards, *span)
        example = import_tensorflow().train.Example
        try:
            return example.FromString(payload).features.feature
        except Exception:  # protobuf's DecodeError moves between its versions
            return None


class _PartsReader:
    """What readers share whose records have no names of their fields."""

    settings = "`fields`"

    def key(self, index: int) -> str:
        """Returns where a record lies."""
        return self.where(index)

    def check_fields(self, source: str) -> None:
        """Stops if none of a few records can be read: a setting, not damage.

        Args:
          source: the source's name, for the error.

        Raises:
          InputError: says what is wrong with them.
        """
        num = len(self.index)
        reasons = {}  # and a record of each
        for index in sorted({i * num // NUM_PROBED for i in range(NUM_PROBED)}):
            try:
                self.read(index)
                return
            except Unreadable as error:
                reasons.setdefault(error.reason, self.where(index))
        found = ", ".join(f"{reason} ({at})" for reason, at in sorted(reasons.items()))
        raise InputError(
            f'source "{source}": records must hold an image and a text or label: of '
            f"{min(NUM_PROBED, num)} records none does: {found}; set the source's "
            f"{self.settings}."
        )

    def has(self) -> str:
        """Returns "": the places say it."""
        return ""


class WebDatasetReader(_PartsReader):
    """Reads the image member and the caption or label member of a key."""

    def __init__(self, index: Index, text_key: str, is_label: bool, label_offset: int):
        """Holds what to read.

        Args:
          index: of the tars.
          text_key: the key inside a JSON member; "" takes the whole member.
          is_label: whether that is a label rather than captions.
          label_offset: the first class's label in the files.
        """
        self.index = index
        self._key = text_key
        self._is_label = is_label
        self._label_offset = label_offset
        self.shards = ShardReader(index.shards)

    def read(self, index: int) -> tuple[bytes, bytes, int]:
        """Returns the image bytes, the captions joined by SEPARATOR, the label."""
        at, shard = self.index, int(self.index.shard[index])
        text = _read(
            self.shards, shard, int(at.text_offset[index]), int(at.text_size[index])
        )
        image = _read(self.shards, shard, int(at.offset[index]), int(at.size[index]))
        value = text
        if self._key:
            try:
                value = json.loads(text)[self._key]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise Unreadable(f'no "{self._key}" in the JSON') from error
        if self._is_label:
            try:
                # `int` would make 3 of JSON's 3.7.
                label = (
                    int(value)
                    if isinstance(value, bytes | str)
                    else operator.index(value)
                )
            except (ValueError, TypeError) as error:
                raise Unreadable("label is no integer") from error
            return image, b"", label - self._label_offset
        if isinstance(value, bytes):
            return image, value, 0
        captions = value if isinstance(value, list) else [value]
        try:
            return image, SEPARATOR.join(str(c or "").encode() for c in captions), 0
        except UnicodeEncodeError as error:  # JSON can say half a character: "\ud83d"
            raise Unreadable(NO_UTF8) from error

    def where(self, index: int) -> str:
        """Returns the tar of a record."""
        return self.index.shards[self.index.shard[index]]

    def key(self, index: int) -> str:
        """Returns the tar of a record and where its image starts there."""
        return f"{self.where(index)}#{self.index.offset[index]}"


class FileReader(_PartsReader):
    """Reads records that are image files of their own."""

    def __init__(self, index: FileIndex, settings: str):
        """Holds what to read.

        Args:
          index: of the files.
          settings: those that say where the files are, for errors.
        """
        self.index = index
        self.settings = settings

    def read(self, index: int) -> tuple[bytes, bytes, int]:
        """Returns the image bytes, the captions joined by SEPARATOR, the label."""
        at = self.index
        try:
            with open_shard(self.where(index)) as file:
                image = file.read()
        except Exception as error:  # gfile has error types of its own
            missing = ("FileNotFoundError", "NotFoundError")
            is_missing = type(error).__name__ in missing
            raise Unreadable(
                "file is missing" if is_missing else "file cannot be read"
            ) from error
        if len(at.texts):
            return image, at.texts[index], 0
        return image, b"", int(at.labels[index])

    def where(self, index: int) -> str:
        """Returns the path of a record."""
        return os.fsdecode(self.index.paths[index])


def _menu(found: Mapping[str, str]) -> str:
    return ", ".join(f"{field} ({kind})" for field, kind in sorted(found.items()))


def _read(shards: ShardReader, *span: int) -> bytes:
    try:
        return shards.read(*span)
    except Exception as error:  # gfile has error types of its own
        raise LostShard("shard cannot be read") from error
