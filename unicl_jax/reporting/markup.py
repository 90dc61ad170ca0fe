"""HTML and Markdown in which text from data cannot become markup."""

import html
import re
import unicodedata
from typing import Any

VOID = frozenset({"br", "circle", "img", "line", "meta", "path", "rect", "wbr"})
# What neither HTML nor UTF-8 can hold, and what turns the text around it over.
_UNSAID = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]"
)
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~&$]|^[#+=-])")


class Html(str):
    """Markup that is safe to put on a page as it is."""

    __slots__ = ()


def clean(value: Any) -> str:
    """A value as text: what cannot be shown becomes a replacement character."""
    return _UNSAID.sub("\ufffd", str(value))


def escape(value: Any) -> Html:
    """A value as markup: text is escaped, `Html` stays as it is."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(clean(value), quote=True))


def join(*parts: Any) -> Html:
    """Parts one after another; None is left out, lists are joined, text is escaped."""
    out = []
    for part in parts:
        if part is None:
            continue
        is_list = isinstance(part, list | tuple)
        out.append(join(*part) if is_list else escape(part))
    return Html("".join(out))


def el(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element.

    Args:
      name: of the element.
      *children: as for `join`.
      **attributes: escaped; None and False are left out, True stands alone. A trailing
        underscore is dropped (`class_`), others become dashes (`aria_label`).

    Returns:
      Its markup.
    """
    given = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        key = "viewBox" if key == "viewbox" else key
        text = "" if value is True else f'="{html.escape(clean(value), quote=True)}"'
        given.append(f" {key}{text}")
    start = f"<{name}{''.join(given)}>"
    if name in VOID and not children:
        return Html(start[:-1] + "/>")
    return Html(f"{start}{join(*children)}</{name}>")


def name_of(value: Any, limit: int = 300) -> Html:
    """A name from data, by itself in its direction: a right-to-left one turns no other.

    Args:
      value: the name.
      limit: of its length; a longer one has the whole in its tooltip.

    Returns:
      A `bdi` element.
    """
    text = clean(value)
    short = shorten(text, limit)
    return el("bdi", short or "(no name)", title=text if short != text else None)


def shorten(value: Any, limit: int) -> str:
    """A text of at most `limit` characters, in one line, with an ellipsis if cut."""
    text = " ".join(clean(value).split())
    if len(text) <= limit:
        return text
    end = limit - 1
    # Not between a letter and its accents, or the parts of an emoji.
    while end and (unicodedata.combining(text[end]) or text[end] in "\u200d\ufe0f"):
        end -= 1
    return text[:end].rstrip("\u200d ") + "\u2026"


def markdown(value: Any) -> str:
    """A value as Markdown that shows it, in one line."""
    return _MARKDOWN.sub(r"\\\1", shorten(value, 300))


def slug(*parts: Any) -> str:
    """An id made of names: letters, digits and dashes; not unique by itself."""
    text = "-".join(clean(part) for part in parts).lower()
    return re.sub("[^a-z0-9]+", "-", text).strip("-")[:60] or "x"
