"""What indexing leaves out of a source: how much, why, and where."""

import collections
from collections.abc import Iterator
from typing import NamedTuple

_NAMED = 5  # of a reason and place, by name
_MAX_PLACES = 10_000  # what is beyond goes without its place
_ELSEWHERE = "other places"


class LeftOut(NamedTuple):
    """What was left out at one place for one reason.

    Attributes:
      reason: in a few words.
      place: path of the shard, table or folder.
      count: how many.
      first: names of the first few there, where they have any.
    """

    reason: str
    place: str
    count: int
    first: tuple[str, ...]


class Damage(collections.Counter):
    """Reason -> count of what was left out, and where that was.

    Attributes:
      lost: how many of these are records, as far as their number is known; a hidden
        file is none, and how many a damaged shard held nobody knows.
    """

    def __init__(self):
        """Starts with nothing."""
        super().__init__()
        self.lost = 0
        self._places: dict[tuple[str, str], list] = {}

    def add(
        self,
        reason: str,
        place: str,
        name: object = "",
        count: int = 1,
        is_record: bool = True,
    ) -> None:
        """Counts what was left out.

        Args:
          reason: in a few words, the same for all with that fault.
          place: path of the shard, table or folder.
          name: what tells it there: a key, the number of a row.
          count: how many.
          is_record: whether it would have been one.
        """
        self[reason] += count
        self.lost += count * is_record
        if len(self._places) >= _MAX_PLACES and (reason, place) not in self._places:
            place = _ELSEWHERE
        found = self._places.setdefault((reason, place), [0, []])
        found[0] += count
        if name != "" and len(found[1]) < _NAMED:
            found[1].append(str(name))

    def join(self, other: "Damage") -> "Damage":
        """Takes over what another one holds.

        Args:
          other: of the same source.

        Returns:
          Itself.
        """
        lost = self.lost + other.lost
        for reason, place, count, first in other.places():
            self.add(reason, place, count=count)
            named = self._places.get((reason, place), [0, []])[1]
            named += first[: _NAMED - len(named)]
        self.lost = lost
        return self

    def places(self) -> Iterator[LeftOut]:
        """Yields what was left out, by reason and place."""
        for (reason, place), (count, first) in self._places.items():
            yield LeftOut(reason, place, count, tuple(first))

    def to_lists(self) -> list:
        """Gives it as plain lists, for a file."""
        return [self.lost, [*map(list, self.places())]]

    @classmethod
    def from_lists(cls, lists: list) -> "Damage":
        """Reads what `to_lists` gave.

        Args:
          lists: these.

        Returns:
          The same damage.
        """
        damage, (lost, places) = cls(), lists
        for reason, place, count, first in places:
            damage.add(reason, place, count=count)
            damage._places[reason, place][1].extend(first)
        damage.lost = lost
        return damage
