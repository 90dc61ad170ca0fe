"""Prompts: every template has one place for the name, and the name goes there."""

import re

import pytest

from unicl_jax.data.prompts import TEMPLATES, clean_class_name, fill, load_templates


@pytest.mark.parametrize(
    ("name", "count"), [("clip_imagenet_80", 80), ("unicl_81", 81), ("short", 4)]
)
def test_each_list_has_its_count_of_distinct_templates(name, count):
    templates = load_templates(name)
    assert isinstance(templates, tuple)
    assert len(templates) == len(set(templates)) == count


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_template_on_the_menu_has_one_slot_and_no_stray_space(name):
    for template in load_templates(name):
        assert template.count("{}") == 1
        assert template == " ".join(template.split())
    assert load_templates(load_templates(name)) == load_templates(name)


def test_the_81_are_the_80_and_the_bare_name():
    assert load_templates("unicl_81") == (*load_templates("clip_imagenet_80"), "{}.")


def test_the_80_hold_what_clip_is_known_for():
    templates = load_templates("clip_imagenet_80")
    assert templates[0] == "a bad photo of a {}."
    assert templates[-1] == "a tattoo of the {}."
    # The seven that OpenAI's notebook singles out as the best subset.
    assert set(templates) >= {
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    }
    assert all(template.endswith(".") for template in templates)


def test_explicit_templates_are_kept_in_order():
    assert load_templates(["b {}", "a {}"]) == ("b {}", "a {}")
    assert load_templates(("{}",)) == ("{}",)


def test_a_typo_lists_the_choices():
    with pytest.raises(ValueError, match='did you mean "unicl_81"') as error:
        load_templates("unicl_80")
    assert all(name in str(error.value) for name in TEMPLATES)


def test_a_lone_template_is_told_how_to_be_passed():
    with pytest.raises(ValueError, match=re.escape("sequence ('a {} toy',)")):
        load_templates("a {} toy")


@pytest.mark.parametrize(
    "template", ["a photo", "", "{} or {}", "{0}", "{name}", "{ }"]
)
def test_a_template_without_exactly_one_slot_is_refused(template):
    with pytest.raises(ValueError, match="exactly once"):
        load_templates(["a {}", template])
    with pytest.raises(ValueError, match="exactly once"):
        fill(template, "cat")


def test_no_templates_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        load_templates([])


@pytest.mark.parametrize("templates", [None, 3, b"short"])
def test_templates_must_be_a_name_or_a_sequence(templates):
    with pytest.raises(TypeError, match="a name or a sequence"):
        load_templates(templates)


def test_a_template_that_is_no_string_is_named_by_index():
    with pytest.raises(TypeError, match="got int at index 1"):
        load_templates(["a {}", 3])


@pytest.mark.parametrize(
    "name", ["cat", "", "{}", "{0}", "a {} b", "{x!r}", "100%", "\\1"]
)
def test_a_class_name_is_filled_in_as_it_is(name):
    assert fill("a photo of a {}.", name) == "a photo of a " + name + "."


def test_braces_elsewhere_in_a_template_are_kept():
    assert fill("{a} {} {b", "cat") == "{a} cat {b"


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("crane, bird", "crane bird"),
        ("black+white", "black white"),
        ("ankle_boot", "ankle boot"),
        ("  hot \t dog\n", "hot dog"),
        ("a,b", "ab"),
        ("T-shirt", "T-shirt"),
        ("_x_+_y_,", "x y"),
        ("{}", "{}"),
        ("naïve café", "naïve café"),
    ],
)
def test_class_names_become_words(name, cleaned):
    assert clean_class_name(name) == cleaned
    assert clean_class_name(cleaned) == cleaned


@pytest.mark.parametrize("name", ["", " ", ",", "+", "__", " ,+_\t"])
def test_a_class_name_with_nothing_left_is_refused(name):
    with pytest.raises(ValueError, match="must hold more"):
        clean_class_name(name)


@pytest.mark.parametrize("name", [None, 3, b"cat"])
def test_a_class_name_must_be_a_string(name):
    with pytest.raises(TypeError, match="must be a string"):
        clean_class_name(name)
