"""The concept table: what joins, what is said of it, and that a run keeps it."""

import json

import numpy as np
import pytest

from unicl_jax.data.concepts import make_concept_table
from unicl_jax.data.labels import load_class_names
from unicl_jax.data.synonyms import Synonyms, load_synonyms
from unicl_jax.errors import InputError
from unicl_jax.workdir import keep_concepts

ANIMALS = ("Dog", "cat", "Great_white+shark")
THINGS = ("spoon", "dog", "cup", "spoon", "DOG")  # "dog" again, two of them twice


def joined(entries):
    """(source, class, the source and class it joined) of each."""
    return [(x.source, x.label, x.to_source, x.to_label) for x in entries]


# --- What joins.


def test_names_that_say_the_same_are_one_concept():
    table = make_concept_table({"animals": ANIMALS, "things": THINGS})
    assert table.names == ("Dog", "cat", "Great white shark", "spoon", "cup")
    assert table.of_source["animals"].tolist() == [0, 1, 2]
    assert table.of_source["things"].tolist() == [3, 0, 4, 3, 0]
    assert table.of_source["things"].dtype == np.int32
    assert table.index["great white shark"] == 2


def test_names_that_join_within_a_source_are_told_apart_from_those_between():
    table = make_concept_table({"animals": ANIMALS, "things": THINGS})
    assert joined(table.merged) == [("things", 1, "animals", 0)]
    within = [("things", 3, "things", 0), ("things", 4, "things", 1)]
    assert joined(table.duplicates) == within
    assert not any(x.by_synonym for x in table.merged + table.duplicates)
    assert (table.duplicates[1].name, table.duplicates[1].to_name) == ("DOG", "dog")


def test_openais_imagenet_names_have_two_duplicates_and_ours_none():
    ours = load_class_names("ours", "imagenet")
    openais = list(ours)
    openais[744], openais[837] = "missile", "sunglasses"  # class_names/README.md
    table = make_concept_table({"ours": ours})
    assert len(table.names) == 1000 and not table.duplicates
    table = make_concept_table({"openai": openais})
    assert len(table.names) == 998 and not table.merged
    two = [("openai", 744, "openai", 657), ("openai", 837, "openai", 836)]
    assert joined(table.duplicates) == two
    assert table.of_source["openai"][744] == table.of_source["openai"][657]
    (line,) = table.describe()
    assert 'openai "missile", openai "sunglasses"; their rows are positives' in line


def test_synonyms_join_by_way_of_others_and_under_the_first_spelling():
    groups = [("couch", "settee"), ("SETTEE", "a_divan"), ("divan, a", "settee")]
    groups += [("Sofa", "a divan"), ("tv", "telly")]
    sources = {"room": ("sofa", "lamp", "Couch"), "shop": ("lamp", "TV", "couch")}
    table = make_concept_table(sources, Synonyms(groups))
    assert table.names == ("sofa", "lamp", "TV")
    assert table.of_source["room"].tolist() == [0, 1, 0]
    assert table.of_source["shop"].tolist() == [1, 2, 0]
    assert [x.by_synonym for x in table.merged] == [False, True]
    assert joined(table.duplicates) == [("room", 2, "room", 0)]
    assert table.duplicates[0].by_synonym
    # What no source has may still be a concept's name: an evaluation's, say.
    assert table.unknown_synonyms == ("settee", "a_divan", "divan, a", "telly")
    assert table.index["settee"] == table.index["a divan"] == 0
    assert table.index["telly"] == 2
    assert table.to_dict()["synonyms"] == {"Couch": "sofa", "couch": "sofa"}


def test_synonyms_of_nothing_are_no_concepts():
    table = make_concept_table({"a": ("dog",)}, Synonyms([("catt", "kat")]))
    assert table.index == {"dog": 0} and table.names == ("dog",)
    (line,) = table.describe()
    assert line.startswith("warning:") and '2, as "catt", "kat"; look for typos' in line


# --- data.synonyms.


def test_a_file_of_synonyms_is_as_good_as_groups(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text("\ufeffsofa\tcouch \tsettee\r\n\n tv\ttelevision\n", "utf-8")
    groups = [["sofa", "couch", "settee"], ("tv", "television")]
    for found in (load_synonyms(str(path)), load_synonyms(groups)):
        assert list(found.names) == ["sofa", "couch", "settee", "tv", "television"]
        roots = [found.root(name) for name in found.names]
        assert len(set(roots)) == 2 and len(set(roots[:3])) == 1
    assert load_synonyms(None).names == load_synonyms("").names == {}


@pytest.mark.parametrize(
    "text, message",
    [
        ("sofa\tcouch\ntv television\n", r"line 2 is \['tv television'\]; in a file"),
        ("sofa\t\n", "line 1 is"),
        ("\n\nsofa\t,,\n", "line 3 is"),
    ],
)
def test_a_line_that_joins_nothing_is_named(tmp_path, text, message):
    (tmp_path / "synonyms.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        load_synonyms(str(tmp_path / "synonyms.txt"))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.txt is not \(.*set data\.synonyms"):
        load_synonyms(str(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes("Käfer\tbug".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt is not \("):
        load_synonyms(str(tmp_path / "latin.txt"))


# --- What is said.


def test_a_thousand_merges_take_one_short_line():
    names = [f"thing {i}" for i in range(1000)]
    lines = make_concept_table({"a": names, "b": names}).describe()
    assert lines == [
        '1,000 classes joined concepts of other sources: b "thing 0", b "thing 1", '
        'b "thing 2" and 997 more; concepts.json has all'
    ]


def test_nothing_is_said_where_nothing_joined():
    assert make_concept_table({"a": ("cat",), "b": ("dog",)}).describe() == []
    table = make_concept_table({"a": ("sofa",), "b": ("couch",)})
    assert table.describe() == []
    synonyms = Synonyms([("sofa", "couch")])
    table = make_concept_table({"a": ("sofa",), "b": ("couch",)}, synonyms)
    (line,) = table.describe()
    assert line.startswith("1 class joined") and 'b "couch" (as "sofa")' in line


# --- concepts.json.


def table_of(*things, animals=ANIMALS):
    return make_concept_table({"animals": animals, "things": things or THINGS})


@pytest.fixture
def started(tmp_path):
    """A run's directory with its table, after a checkpoint."""
    keep_concepts(tmp_path, table_of(), write=True)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    return tmp_path


def test_the_table_is_saved_with_the_run(started):
    said = json.loads((started / "concepts.json").read_text("utf-8"))
    assert said["names"] == ["Dog", "cat", "Great white shark", "spoon", "cup"]
    assert said["sources"] == {"animals": [0, 1, 2], "things": [3, 0, 4, 3, 0]}
    assert [x["name"] for x in said["merged"]] == ["dog"]
    duplicate = dict(source="things", label=3, name="spoon", by_synonym=False)
    duplicate |= dict(to_source="things", to_label=0, to_name="spoon")
    assert said["duplicates"][0] == duplicate and len(said["duplicates"]) == 2
    assert said["synonyms"] == {} and said["unknown_synonyms"] == []
    assert [p.name for p in started.glob("concepts*")] == ["concepts.json"]


def test_the_same_table_goes_on_and_the_file_stays(started):
    path = started / "concepts.json"
    before = path.read_bytes(), path.stat().st_mtime_ns
    keep_concepts(started, table_of(), write=True)
    # Another case is the same text.
    keep_concepts(started, table_of("SPOON", *THINGS[1:]), write=True)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    "table, said",
    [
        (table_of("fork", *THINGS[1:]), 'class 0 was "spoon", is "fork"'),
        (table_of("cup", "dog", "spoon", "spoon", "dog"), 'class 0 was "spoon", is'),
        (table_of(*THINGS, "fork"), 'class 5 was not there, is "fork"'),
        (table_of(*THINGS[:4]), 'class 4 was "Dog", is not there'),
        (make_concept_table({"animals": ANIMALS}), '"things": class 0 was "spoon", is'),
        (table_of(animals=("dog", "Cat", "ray")), 'class 2 was "Great white shark"'),
        # The same classes, in sources the other way round: other rows of a classifier.
        (
            make_concept_table({"things": THINGS, "animals": ANIMALS}),
            'concept 0 was "Dog", is "spoon"',
        ),
        (
            make_concept_table(
                {"animals": ANIMALS, "things": THINGS}, Synonyms([("cup", "spoon")])
            ),
            '"things": class 2 was "cup", is "spoon"',
        ),
    ],
)
@pytest.mark.parametrize("write", [True, False])
def test_another_table_stops_the_run(started, table, said, write):
    before = (started / "concepts.json").read_bytes()
    with pytest.raises(InputError, match="labels mean something else") as caught:
        keep_concepts(started, table, write=write)
    assert said in str(caught.value).splitlines()[1]
    assert (started / "concepts.json").read_bytes() == before


def test_the_first_differences_are_named_not_all(tmp_path):
    names = [f"thing {i}" for i in range(1000)]
    keep_concepts(tmp_path, make_concept_table({"a": names}), write=True)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(InputError, match="and 1995 more") as caught:
        keep_concepts(tmp_path, make_concept_table({"a": names[::-1]}), write=True)
    assert len(str(caught.value).splitlines()) == 8


def test_a_run_without_the_file_gets_it_and_one_without_a_checkpoint_a_new_one(started):
    path = started / "concepts.json"
    path.unlink()
    keep_concepts(started, table_of(), write=False)
    assert not path.exists()
    keep_concepts(started, table_of(), write=True)
    assert len(json.loads(path.read_text())["names"]) == 5
    (started / "checkpoints" / "3").rmdir()
    keep_concepts(started, table_of("fork"), write=True)
    assert json.loads(path.read_text())["sources"]["things"] == [3]


def test_captions_alone_leave_no_file(tmp_path):
    keep_concepts(tmp_path, make_concept_table({}), write=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"names": [], "sources": {"a": 3}}']
)
def test_a_file_that_is_no_table_is_named(started, text):
    (started / "concepts.json").write_text(text)
    with pytest.raises(InputError, match="cannot be read .*; delete it"):
        keep_concepts(started, table_of(), write=True)
