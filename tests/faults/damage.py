"""Damage: what can happen to a file. Each strategy gives (what was done, the content after it)."""

import json
import random
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Damaged = tuple[str, bytes]
Damage = st.SearchStrategy[Damaged]

RAW: dict[str, str] = {
    "5,000 digits": "1" * 5000,
    "2**63": str(2**63),
    "-10**30": str(-(10**30)),
    "1e999": "1e999",
    "NaN": "NaN",
    "-Infinity": "-Infinity",
    "lone surrogate": '"\\ud800"',
    "NUL": '"a\\u0000b"',
    "escape sequence": '"\\u001b[31mred"',
    "nested 200 deep": "[" * 200 + "]" * 200,
    "nested 950 deep": "[" * 950 + "]" * 950,
    "nested 5,000 deep": '{"a":' * 5000 + "1" + "}" * 5000,
    "opened 100,000 times": "[" * 100_000,
    "duplicate keys": '{"a": 1, "a": 2}',
    "100,000 characters": json.dumps("x" * 100_000),
}
"""Values as they stand in a JSON file."""
PLAIN: list[Any] = [
    None, True, False, 0, 1, -1, 7, 0.5, -0.0, 1e300, "", " ", "x", "1", "\n", "é€😀", "../../../../etc/passwd", "/dev/zero",
    "/dev/null", "x" * 300, ".", "/", [], {}, [None], [[]], {"": None}, {"kind": "rl"}, ["a", "b"],
]  # fmt: skip
JSON_VALUES = RAW | {repr(value)[:40]: json.dumps(value) for value in PLAIN}
"""Name of a value -> how it stands in a JSON file."""
YAML_VALUES = (
    "", "~", "true", "-1", "0", ".nan", "-.inf", "1e400", "0x_", "0b_", "0xffff" + "f" * 5000, "9" * 5000, "9" * 25, "1:99:99",
    "2024-13-45", "2024-01-01", "!!binary cjE=", "!!binary '*'", "!!python/object/apply:os.getcwd []", "!!set {a, b}",
    "!!int x", "!!float x", "!!timestamp x", "!unknown x", "*undefined", "&a [*a]", "&a {b: *a}", "[", "{", "'", '"', "|", "@",
    "`", "- x", "a: b: c", "? [a]", "{[a]: b}", "{1: 2}", "{~: 2}", "{<<: 1}", "{<<: {kind: rl}}", "<<", "=", '"\\ud800"',
    '"\\0"', '"\\e[31m"', "x" * 100_000, "[" * 400 + "]" * 400, "[" * 20_000, "{a: " * 500 + "1" + "}" * 500, "[]", "{}",
    "[[]]",
    "{kind: sft}", "{source: hub, name: a/b}", "../../../../etc/passwd", "/dev/zero", "/dev/null", "\t", "%YAML 9.9",
    "!!omap [a]", "!!bool x", "!!int ''", "0001-01-01T00:00:00+23:00", "zero9", "base", "cold_start",
    "[base, base]", "1", "2.5", "text",
)  # fmt: skip
"""Values as they stand in a YAML file."""


def bomb(form: str, levels: int = 40) -> str:
    """Billion laughs: small as a text, 2^levels values when it is walked. `form`: of a value made of two others."""
    lines = ["  l0: &l0 x", *(f"  l{i}: &l{i} {form.format(f'*l{i - 1}')}" for i in range(1, levels))]
    return "shared:\n" + "\n".join(lines)


@st.composite
def flipped(draw: st.DrawFn, content: bytes) -> Damaged:
    """One to three bits the other way round."""
    if not content:
        return "nothing", content
    changed = bytearray(content)
    places = draw(st.lists(st.integers(0, len(content) * 8 - 1), min_size=1, max_size=3, unique=True))
    for place in places:
        changed[place // 8] ^= 1 << place % 8
    return f"flip bits {places}", bytes(changed)


@st.composite
def overwritten(draw: st.DrawFn, content: bytes) -> Damaged:
    """A range of bytes replaced, as by a lost disk block."""
    start = draw(st.integers(0, max(0, len(content) - 1)))
    length = draw(st.integers(1, 64))
    filler = draw(st.sampled_from([b"\0", b"\xff", b"\xfe\xff", b"\x1b", b" ", b'"', b"{", b"9", b"\n"]))
    filled = (filler * length)[:length]
    return f"overwrite {start}+{length} with {filler!r}", content[:start] + filled + content[start + length :]


@st.composite
def cut(draw: st.DrawFn, content: bytes) -> Damaged:
    """Cut short."""
    end = draw(st.one_of(st.integers(0, max(0, len(content) - 1)), st.just(max(0, len(content) - 1))))
    return f"cut to {end} bytes", content[:end]


@st.composite
def inserted(draw: st.DrawFn, content: bytes) -> Damaged:
    """Bytes that do not belong there."""
    strangers = [b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\x80", b"\r", b"\x1b[2J", b"{", b"]", b",", b'"', b"x" * 70_000]
    what = draw(st.sampled_from(strangers))
    place = draw(st.one_of(st.just(0), st.integers(0, len(content))))
    return f"insert {what[:6]!r} at {place}", content[:place] + what + content[place:]


def emptied(_: bytes) -> Damage:
    """Nothing is left, or nothing but zeros (what a crash leaves of a file that was not synced)."""
    return st.sampled_from([("empty", b""), ("4 kB of zeros", b"\0" * 4096), ("a newline", b"\n"), ("random", _noise())])


def _noise() -> bytes:
    return random.Random(0).randbytes(300)


@st.composite
def lines(draw: st.DrawFn, content: bytes) -> Damaged:
    """A line twice, gone, moved, or glued to the next."""
    found = content.splitlines(keepends=True)
    if len(found) < 2:
        return "nothing", content
    how = draw(st.sampled_from(["twice", "gone", "moved", "glued", "blank"]))
    at = draw(st.integers(0, len(found) - 1))
    if how == "twice":
        found.insert(at, found[at])
    elif how == "gone":
        del found[at]
    elif how == "moved":
        found.insert(draw(st.integers(0, len(found) - 1)), found.pop(at))
    elif how == "glued":
        found[at] = found[at].rstrip(b"\n")
    else:
        found.insert(at, b"\n")
    return f"line {at} {how}", b"".join(found)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document; the whole document comes first."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def with_value(document: Any, path: tuple[Any, ...], text: str) -> bytes:
    """The JSON document with `text` in place of one value; without that value when there is no text."""
    mark = "@@here@@"
    copy = [json.loads(json.dumps(document))]
    above: Any = copy
    for before, key in zip((0, *path), path, strict=False):
        above = above[before]
        last = key
    if not path:
        copy[0] = mark
    elif text:
        above[last] = mark
    else:
        del above[last]
    return json.dumps(copy[0]).replace(f'"{mark}"', text).encode()


@st.composite
def json_values(draw: st.DrawFn, content: bytes) -> Damaged:
    """A value of a JSON document (or of one line of JSON lines) replaced, left out, or with another beside it."""
    rows = content.split(b"\n") if content[:1] == b"{" and b"\n{" in content else [content]
    at = draw(st.integers(0, max(0, sum(bool(row.strip()) for row in rows) - 1)))
    document = json.loads(rows[at])
    path = draw(st.sampled_from(places(document)))
    how = draw(st.sampled_from([*JSON_VALUES, "left out", "more", "renamed"] if path else list(JSON_VALUES)))
    if how in ("more", "renamed"):
        above = document
        for key in path[:-1]:
            above = above[key]
        if isinstance(above, list):
            above.append(above[path[-1]])
        else:
            above[f"{path[-1]}x"] = above.pop(path[-1]) if how == "renamed" else 1
        rows[at] = json.dumps(document).encode()
    else:
        rows[at] = with_value(document, path, JSON_VALUES.get(how, ""))
    return f"{path}: {how}", b"\n".join(rows)


def other_type(content: bytes) -> Damage:
    """Another kind of JSON document altogether."""
    whole = [b"null", b"1", b'"text"', b"[]", b"{}", b"[[1]]", b"NaN", b'{"a": 1}', b"[" * 100_000, b"\xef\xbb\xbf" + content]
    return st.sampled_from([(f"now {text[:20]!r}", text) for text in whole])


@st.composite
def yaml_values(draw: st.DrawFn, content: bytes) -> Damaged:
    """The value behind a key of a YAML file replaced."""
    found = content.decode().split("\n")
    places = [i for i, line in enumerate(found) if ":" in line.partition("#")[0]]
    at = draw(st.sampled_from(places))
    head = found[at].partition(":")[0]
    value = draw(st.sampled_from(YAML_VALUES))
    found[at] = f"{head}: {value}"
    return f"line {at}: {found[at][:80]}", "\n".join(found).encode()


def yaml_whole(content: bytes) -> Damage:
    """What concerns a YAML file as a whole: bombs, documents, keys that are no text."""
    tail = {
        "a bomb of lists": bomb("[{0}, {0}]"),
        "a bomb of mappings": bomb("{{a: {0}, b: {0}}}"),
        "a wide bomb": "b: &b [" + "x, " * 1000 + "x]\n" + "\n".join(f"c{i}: &c{i} [" + "*b, " * 50 + "*b]" for i in range(50)),
        "a circle": "loop: &loop {again: *loop}",
        "a second document": "---\nname: two",
        "unhashable key": "? {a: b}\n: c",
        "number as key": "1: 2",
        "same key twice": "name: again",
        "a comment": "# nothing",
        "extends itself": "extends: own.yaml",
        "extends a folder": "extends: .",
        "extends a device": "extends: /dev/zero",
        "extends NUL": 'extends: "a\\0b"',
        "extends a long name": f"extends: {'x' * 5000}",
        "extends far away": "extends: ../../../../../../../../etc/passwd",
        "extends numbers": "extends: [1, 2]",
        "extends ten times ten": f"extends: [{', '.join(['recipes/r1.yaml'] * 10)}]",
        "long stage name": f"stages: {{{'n' * 5000}: {{kind: toy_base}}}}",
        "runs in NUL": 'runs: "a\\0b"',
        "surrogate in a key": 'shared: {"\\ud800": 1}',
    }
    return st.sampled_from([(name, content + b"\n" + text.encode() + b"\n") for name, text in tail.items()])


def exchanged(others: list[bytes]) -> Callable[[bytes], Damage]:
    """The content of another file."""
    return lambda _: st.sampled_from([(f"the content of another file ({o[:12]!r}…)", o) for o in others])


BYTES = (flipped, flipped, overwritten, cut, inserted, emptied)
TEXT = (*BYTES, lines, lines)
JSON = (*TEXT, json_values, json_values, json_values, json_values, other_type)
YAML = (*TEXT, yaml_values, yaml_values, yaml_values, yaml_values, yaml_whole, yaml_whole)


@st.composite
def damaged(draw: st.DrawFn, content: bytes, kinds: tuple[Callable[[bytes], Damage], ...]) -> Damaged:
    """One kind of damage."""
    return draw(draw(st.sampled_from(kinds))(content))
