#!/usr/bin/env python3
"""What `cmake --install` gives, used as a stranger would: python3 install_test.py CMAKE BUILD SOURCE CXX STATIC|SHARED

Installs into a temporary prefix, builds examples/ against it with the CMake package and with pkg-config, runs them.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

CMAKE, BUILD, SOURCE, CXX, KIND = sys.argv[1:6] if len(sys.argv) > 5 else ("", "", "", "", "")


def run(*command, env=None, cwd=None):
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, check=False, cwd=cwd,
                            env={**os.environ, **(env or {})})
    if result.returncode != 0:
        raise AssertionError(f"{' '.join(map(str, command))}: {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result.stdout


class Install(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory(prefix="sparvar-install-")
        cls.addClassCleanup(folder.cleanup)
        cls.dir = Path(folder.name)
        cls.prefix = cls.dir / "prefix"
        run(CMAKE, "--install", BUILD, "--prefix", cls.prefix)
        cls.pc = next(cls.prefix.rglob("sparvar.pc"))
        cls.lib = cls.pc.parent.parent

    def check_examples(self, folder, env):
        report = run(folder / "attention", env=env)
        self.assertRegex(report, r"^576 queries, 917 keys, [0-9.]+ % of the pairs; out\[0\] = -?[0-9.e-]+\n$")
        share = float(report.split(", ")[2].split(" ")[0])
        self.assertTrue(2 < share < 50, share)
        picture = folder / "heart.png"
        run(folder / "draw", "red heart, noto style", picture, env=env)
        self.assertEqual(picture.read_bytes()[:8], b"\x89PNG\r\n\x1a\n")
        self.assertGreater(picture.stat().st_size, 5000, "a picture, not one colour")  # one colour: 3 kB

    def environment(self):
        """A shared library finds the model beside itself; a program that took the static one in is told."""
        return {"SPARVAR_MODEL": str(self.prefix / "share/sparvar/models/emoji") if KIND == "STATIC" else ""}

    def test_one_library_of_the_kind(self):
        names = sorted(path.name for path in self.lib.glob("lib*"))
        if KIND == "STATIC":
            self.assertEqual(names, ["libsparvar.a"])
        else:
            self.assertIn("libsparvar.so", names)
            self.assertEqual([name for name in names if not name.startswith("libsparvar.so")], [])
            symbols = run("nm", "-DC", "--defined-only", self.lib / "libsparvar.so")
            self.assertIn("sparvar::Pipeline::load(", symbols)
            strangers = [line for line in symbols.splitlines() if "sparvar::" not in line]
            self.assertEqual(strangers, [], "names of others are not shown")

    def test_the_program_finds_its_model(self):
        program = self.prefix / "bin" / "sparvar"
        report = json.loads(run(program, "info", "--json", env={"SPARVAR_MODEL": ""}))
        self.assertEqual(Path(report["model"]["folder"]).resolve(), (self.prefix / "share/sparvar/models/emoji").resolve())

    def test_headers_stand_alone(self):
        """Each compiles by itself, and includes nothing but the standard library and its neighbours."""
        headers = sorted((self.prefix / "include/sparvar").glob("*.h"))
        self.assertIn("attention.h", [header.name for header in headers])
        self.assertEqual([h.name for h in headers], sorted(h.name for h in Path(SOURCE, "include/sparvar").glob("*.h")))
        for header in headers:
            includes = re.findall(r'#include\s*([<"][^>"]+[>"])', header.read_text())
            strangers = [name for name in includes if not re.fullmatch(r'<[a-z_]+>|"sparvar/[a-z_]+\.h"', name)]
            self.assertEqual(strangers, [], header.name)
            run(CXX, "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{self.prefix}/include",
                "-include", header, "-x", "c++", "/dev/null")

    def test_the_cmake_package(self):
        folder = self.dir / "cmake"
        run(CMAKE, "-S", Path(SOURCE, "examples"), "-B", folder, f"-DCMAKE_PREFIX_PATH={self.prefix}",
            f"-DCMAKE_CXX_COMPILER={CXX}", "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror")
        run(CMAKE, "--build", folder)
        self.check_examples(folder, self.environment())

    def test_pkg_config(self):
        folder = self.dir / "pkg-config"
        folder.mkdir()
        env = {"PKG_CONFIG_PATH": str(self.pc.parent)}
        flags = run("pkg-config", "--cflags", "--libs", "sparvar", env=env).split()
        for name in ("draw", "attention"):
            run(CXX, "-std=c++20", Path(SOURCE, "examples", f"{name}.cpp"), *flags, "-o", folder / name)
        model = run("pkg-config", "--variable=modeldir", "sparvar", env=env).strip()
        self.assertTrue(Path(model, "config.json").is_file(), model)
        self.check_examples(folder, {**self.environment(), "LD_LIBRARY_PATH": str(self.lib)})

    def test_every_public_name_is_on_the_stability_page(self):
        page = Path(SOURCE, "docs/api.md").read_text()
        for header in sorted(Path(SOURCE, "include/sparvar").glob("*.h")):
            text = header.read_text()
            names = re.findall(r"^(?:struct|class|enum class) (\w+)", text, re.M)
            names += re.findall(r"^using (\w+) =", text, re.M)
            names += re.findall(r"^[A-Za-z_:<>]+ (\w+)\([^;{]*\);", text, re.M)
            for name in names:
                self.assertRegex(page, rf"\b{name}\b", f"{header.name}: say in docs/api.md whether {name} is stable")


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[6:]], verbosity=2)
