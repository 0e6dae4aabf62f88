#!/usr/bin/env python3
"""structure.py: what keeps a crate readable, checked over the whole repository. Ends with 1 and a line a fault where

- files of a crate import one another in a ring of more than RING_MAX files: none of them can then be read, tested or
  changed without the others. Tests are left out, and so are the names of a crate's root, which all may use;
- a Rust file has more than FILE_MAX lines;
- a function of the product has more than FUNCTION_MAX lines: it does not fit a screen.
"""

import re
import sys
from pathlib import Path

RING_MAX = 3
FILE_MAX = 600
FUNCTION_MAX = 60

# Crates that may have a larger ring, with its size: none.
RING_ALLOWED = {}
# Functions that are still too long, as `crate/file: function`, with their lines. Likewise.
FUNCTION_ALLOWED = {
    "node/lib: run": 81,
    "sandbox/pve/look: differences": 61,
}

ROOT = Path(__file__).resolve().parents[2]

# What may hold anything: comments (block comments may nest, which none of ours do), strings, characters.
OPAQUE = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | \b[bc]?r(?P<hashes>\#*)".*?"(?P=hashes) | \b[bc]?"(?:\\.|[^"\\])*" | "(?:\\.|[^"\\])*"
      | '(?:\\(?:x[0-9a-fA-F]{2}|u\{[^}]*\}|.)|[^'\\])'""",
    re.VERBOSE | re.DOTALL,
)


def plain(text):
    """The code of a file: comments and the contents of strings are spaces, line by line as before."""
    return OPAQUE.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)


def block_end(code, start):
    """The place after the brace that closes the first one at or after `start`; where it ends with `;`, the place after that."""
    depth = 0
    brackets = 0
    for at in range(start, len(code)):
        char = code[at]
        if char in "([":
            brackets += 1
        elif char in ")]":
            brackets -= 1
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return at + 1
        elif char == ";" and depth == 0 and brackets == 0:
            return at + 1
    return len(code)


TEST_ITEM = re.compile(r"#\[cfg\((?:any\()?test\b[^\]]*\]\s*(?:#\[[^\]]*\]\s*)*")
TEST_MODULE = re.compile(TEST_ITEM.pattern + r"(?:pub(?:\([^)]*\))?\s+)?mod\s+(\w+)\s*;")

# One whose file has a name of its own, which lies beside the file that declares it.
TEST_FILE = re.compile(r'#\[cfg\(test\)\]\s*#\[path = "(\w+)\.rs"\]')


def without_tests(code):
    """The code without the items that are compiled for tests only."""
    while found := TEST_ITEM.search(code):
        end = block_end(code, found.end())
        code = code[: found.start()] + re.sub(r"[^\n]", " ", code[found.start() : end]) + code[end:]
    return code


def modules(crate):
    """Path of each module of a crate (`("pods", "status")`, the root is `()`) to the code of its file, without tests."""
    source = crate / "src"
    code, tests = {}, set()
    for file in sorted(source.rglob("*.rs")):
        path = file.relative_to(source).with_suffix("").parts
        if path[-1] in ("mod", "lib", "main"):
            path = path[:-1]
        written = file.read_text()
        text = plain(written)
        tests.update((*path, name) for name in TEST_MODULE.findall(text))
        tests.update((*path[:-1], name) for name in TEST_FILE.findall(written))
        code[path] = without_tests(text)
    is_test = lambda path: any(path[:depth] in tests for depth in range(1, len(path) + 1))
    return {path: text for path, text in code.items() if not is_test(path)}


def paths_of_use(prefix, tree):
    """The paths of a `use` tree: `a::{b, c::{d}}` is `a::b` and `a::c::d`."""
    depth, part, parts = 0, "", []
    for char in tree:
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += char
    for part in filter(None, map(str.strip, [*parts, part])):
        head, brace, rest = part.partition("{")
        names = [name.split(" as ")[0].strip() for name in head.split("::") if name.strip()]
        if brace:
            yield from paths_of_use(prefix + names, rest[: rest.rindex("}")])
        else:
            yield prefix + names


def imports(module, code):
    """The paths below `crate` that a module's code names, by `use` or on the spot."""
    named = [path for tree in re.findall(r"\buse\s+((?:crate|super|self)\b[^;]*);", code) for path in paths_of_use([], tree)]
    named += [path.split("::") for path in re.findall(r"\b((?:crate|super)(?:::[a-z_0-9]+)+)", code)]
    for path in named:
        base = [] if path[0] == "crate" else list(module)
        while path and path[0] in ("crate", "super", "self"):
            if path[0] == "super":
                base = base[:-1]
            path = path[1:]
        yield tuple(base + path)


def rings(crate):
    """The rings of a crate's modules, the largest first."""
    code = modules(crate)
    edges = {}
    for module, text in code.items():
        targets = set()
        for path in imports(module, text):
            while path and path not in code:
                path = path[:-1]
            if path and path != module:
                targets.add(path)
        edges[module] = targets
    reach = {module: reachable(edges, module) for module in edges}
    found = {frozenset(other for other in reach[module] if module in reach[other]) for module in edges if module in reach[module]}
    return sorted(found, key=len, reverse=True)


def reachable(edges, start):
    """All that a walk along the edges from `start` comes to."""
    seen, ahead = set(), list(edges[start])
    while ahead:
        module = ahead.pop()
        if module not in seen:
            seen.add(module)
            ahead.extend(edges[module])
    return seen


FUNCTION = re.compile(r"\bfn\s+(\w+)")


def long_functions(crate):
    """Name of each function over FUNCTION_MAX lines, as `crate/file: function`, and its lines, braces included."""
    for module, code in modules(crate).items():
        for found in FUNCTION.finditer(code):
            lines = code.count("\n", found.start(), block_end(code, found.end())) + 1
            if lines > FUNCTION_MAX:
                yield f"{crate.name}/{'/'.join(module) or 'lib'}: {found.group(1)}", lines


def faults(root):
    """Each fault as a line."""
    for file in sorted([*root.glob("src/**/*.rs"), *root.glob("tests/**/*.rs")]):
        lines = file.read_text().count("\n")
        if lines > FILE_MAX:
            yield f"{file.relative_to(root)} has {lines} lines, {FILE_MAX} are allowed: a file has one subject"
    for crate in sorted(path.parent for path in root.glob("src/*/Cargo.toml")):
        allowed = RING_ALLOWED.get(crate.name, RING_MAX)
        for ring in rings(crate):
            if len(ring) > allowed:
                files = ", ".join(sorted("/".join(path) for path in ring))
                yield f"src/{crate.name}: {len(ring)} files import one another, {allowed} are allowed: {files}"
        for name, lines in long_functions(crate):
            if lines > FUNCTION_ALLOWED.get(name, FUNCTION_MAX):
                yield f"{name} has {lines} lines, {FUNCTION_MAX} are allowed"


def main():
    found = list(faults(ROOT))
    for fault in found:
        print(fault)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
