"""Tests of structure.py: `python3 -m unittest discover scripts/lint`."""

import tempfile
import unittest
from pathlib import Path

import structure


class Structure(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.root = Path(directory.name)
        self.write("Cargo.toml", "")

    def write(self, path, text):
        file = self.root / "src/crate" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def rings(self):
        return [sorted("/".join(path) for path in ring) for ring in structure.rings(self.root / "src/crate")]

    def ring_of(self, count):
        for n in range(count):
            self.write(f"src/f{n}.rs", f"use crate::f{(n + 1) % count}::Thing;\n")

    def test_a_ring_of_four_files_is_a_fault_and_one_of_three_is_none(self):
        self.ring_of(4)
        self.assertRegex("".join(structure.faults(self.root)), "4 files import one another.*f0, f1, f2, f3")
        self.write("src/f3.rs", "")
        self.assertEqual([], list(structure.faults(self.root)))
        self.ring_of(3)
        self.assertEqual([["f0", "f1", "f2"]], self.rings())
        self.assertEqual([], list(structure.faults(self.root)))

    def test_imports_are_seen_in_trees_with_super_and_on_the_spot(self):
        self.write("src/a/mod.rs", "use crate::{b::{self, X as Y}, c};")
        self.write("src/b.rs", "fn f() { crate::c::g() }")
        self.write("src/c/mod.rs", "")
        self.write("src/c/inner.rs", "use super::super::a::Thing;")
        self.write("src/c/mod.rs", "use self::inner::Other;")
        self.assertEqual([["a", "b", "c", "c/inner"]], self.rings())

    def test_comments_strings_and_tests_import_nothing(self):
        self.write("src/a.rs", "use crate::b::X;")
        self.write("src/b.rs", '// use crate::a::X;\nconst S: &str = "use crate::a::X;";\n#[cfg(test)]\nmod tests { use crate::a::X; }\n')
        self.assertEqual([], self.rings())
        self.write("src/b.rs", "#[cfg(test)]\nmod tests;\n")
        self.write("src/b/tests.rs", "use crate::a::X;\nuse crate::b::Y;")
        self.assertEqual([], self.rings())
        self.write("src/b.rs", "#[cfg(test)]\nmod tests { }\nuse crate::a::X;")
        self.assertEqual([["a", "b"]], self.rings())

    def test_a_function_has_sixty_lines(self):
        body = "    let x = '{';\n" * 58
        self.write("src/a.rs", "fn short() -> [u8; 4] {\n" + body + "}\n\ntrait T {\n    fn declared(&self) -> [u8; 4];\n}\n")
        self.assertEqual([], list(structure.faults(self.root)))
        self.write("src/a.rs", "fn long() {\n" + body + "    x\n}\n")
        self.assertEqual(["crate/a: long has 61 lines, 60 are allowed"], list(structure.faults(self.root)))

    def test_a_file_has_six_hundred_lines(self):
        self.write("src/a.rs", "//\n" * 601)
        self.assertRegex("".join(structure.faults(self.root)), "a.rs has 601 lines, 600 are allowed")


if __name__ == "__main__":
    unittest.main()
