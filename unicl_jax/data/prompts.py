"""Class names to sentences: the prompt templates and how they are filled.

A template is a sentence with one `{}` where the class name goes. Training draws one at
random for each record; zero-shot evaluation averages the embeddings of all of them
(Yang et al., CVPR 2022, arXiv 2204.03610).
"""

from collections.abc import Callable, Iterable, Sequence
from importlib import resources

from unicl_jax.errors import InputError, did_you_mean

_SLOT = "{}"


def _clip_imagenet_80() -> tuple[str, ...]:
    path = resources.files(__package__) / "templates" / "clip_imagenet_80.txt"
    return tuple(path.read_text(encoding="utf-8").splitlines())


def _unicl_81() -> tuple[str, ...]:
    # microsoft/UniCL, data/imagenet/constants.py: CLIP's 80 and the bare name.
    return (*_clip_imagenet_80(), "{}.")


def _short() -> tuple[str, ...]:
    return ("{}", "a {}", "a picture of {}", "a drawing of {}")


TEMPLATES: dict[str, Callable[[], tuple[str, ...]]] = {
    "clip_imagenet_80": _clip_imagenet_80,  # CLIP's, for ImageNet
    "unicl_81": _unicl_81,  # what UniCL trains and evaluates with
    "short": _short,  # ours, for small runs: few words, so few ids
}


def load_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """The templates of a name on the menu, or explicit ones, checked.

    Args:
      templates: a key of `TEMPLATES`, or the templates themselves, each with exactly
        one `{}`.

    Returns:
      At least one template.

    Raises:
      TypeError: if `templates` or one of them is not a string.
      InputError: if a name is not on the menu, the sequence is empty, or a template
        does not hold exactly one `{}`.
    """
    if isinstance(templates, str):
        if templates not in TEMPLATES:
            advice = did_you_mean(templates, TEMPLATES)
            if _SLOT in templates:
                advice = f"to use it as a template, pass the sequence ({templates!r},)."
            raise InputError(
                "templates must be a name on the menu or a sequence of templates: got "
                f"{templates!r}; {advice}"
            )
        return TEMPLATES[templates]()
    if isinstance(templates, bytes) or not isinstance(templates, Iterable):
        raise TypeError(
            "templates must be a name or a sequence of strings: got "
            f"{type(templates).__name__}; choose from {', '.join(TEMPLATES)}."
        )
    templates = tuple(templates)
    if not templates:
        raise InputError(
            "templates must hold at least one template: got an empty sequence; use "
            "('{}',) for bare class names."
        )
    for index, template in enumerate(templates):
        if not isinstance(template, str):
            raise TypeError(
                f"templates must be strings: got {type(template).__name__} at index "
                f"{index}; write each as a sentence with {{}} for the class name."
            )
        _check_slot(template)
    return templates


def fill(template: str, class_name: str) -> str:
    """A template with the class name in its place; braces in the name are kept.

    Args:
      template: text with exactly one `{}`.
      class_name: any text.

    Returns:
      The sentence.

    Raises:
      InputError: if the template does not hold exactly one `{}`.
    """
    _check_slot(template)
    # Not str.format: it would read braces elsewhere in the template as fields.
    return template.replace(_SLOT, class_name)


def clean_class_name(name: str) -> str:
    """A class name as words: no commas, no "+" or "_", single spaces.

    Removing commas and turning "+" into a space is what the method does to the names it
    trains on (it evaluates with raw names); "_" and the white space are our additions,
    since folder names and file formats bring both.

    Args:
      name: a class name, as a data set or a folder spells it.

    Returns:
      The name, at least one character; case is kept.

    Raises:
      TypeError: if `name` is not a string.
      InputError: if nothing is left of it.

    Source: microsoft/UniCL, the training text of its data pipeline.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"a class name must be a string: got {name!r} ({type(name).__name__}); "
            "give the name, not the label."
        )
    cleaned = " ".join(
        name.replace(",", "").replace("+", " ").replace("_", " ").split()
    )
    if not cleaned:
        raise InputError(
            "a class name must hold more than white space, commas, '+' and '_': got "
            f"{name!r}; write it in words."
        )
    return cleaned


def _check_slot(template: str) -> None:
    count = template.count(_SLOT)
    if count != 1:
        raise InputError(
            f"a template must hold {{}} exactly once: got {template!r} with {count}; "
            "put one where the class name goes."
        )
