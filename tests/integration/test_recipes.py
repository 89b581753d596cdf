#!/usr/bin/python3
"""The documentation is true: every block marked ```sh recipe in README.md, CONTRIBUTING.md and docs/ runs, and links lead somewhere.

A recipe runs in an empty directory with gantryd and gantry in PATH. What it leaves in the background is ended.
"""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt

PAGES = [gt.ROOT / "README.md", gt.ROOT / "CONTRIBUTING.md", *sorted((gt.ROOT / "docs").glob("*.md"))]
RECIPE = re.compile(r"^```sh recipe\n(.*?)^```$", re.M | re.S)
TOOLS = ("nbdinfo", "nbdcopy", "nbdsh", "nbdkit", "nbd-client", "qemu-img", "qemu-io", "qemu-system-x86_64", "socat", "fio",
         "systemd-socket-activate", "sfdisk", "debugfs", "mkfs.ext4", "unshare")


class Recipes(gt.Case):
    def environment(self):
        os.mkdir(self.path("bin"))
        for program in (gt.GANTRYD, gt.GANTRY):
            os.symlink(program, self.path("bin/" + os.path.basename(program)))
        os.mkdir(self.path("run"), 0o700)
        os.mkdir(self.path("work"))
        # libnbd's shell is a module of the system's Python.
        environment = {**os.environ, "PATH": f"{self.path('bin')}:/usr/bin:{os.environ['PATH']}", "XDG_RUNTIME_DIR": self.path("run")}
        for name in ("RUNTIME_DIRECTORY", "NOTIFY_SOCKET", "LISTEN_FDS"):
            environment.pop(name, None)
        return environment

    def end_daemons(self):
        """Ends what the recipe left: its pid files and its background jobs (the process group)."""
        for name in os.listdir(self.path("work")):
            if name.endswith(".pid"):
                # The recipe may have ended it itself: it goes, and its file before it.
                with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                    os.kill(int(pathlib.Path(self.path("work"), name).read_text()), signal.SIGTERM)
                gt.wait_for(lambda name=name: not os.path.exists(self.path("work/" + name)), f"the end of {name}")

    def run_recipe(self, text):
        for port in ("10999", "10998"):  # those of the text may be taken
            text = text.replace(port, str(gt.free_port()))
        gt.require(*(tool for tool in TOOLS if re.search(rf"(^|[\s|]){re.escape(tool)}\s", text, re.M)))
        process = subprocess.Popen(["bash", "-euo", "pipefail", "-c", "trap 'kill $(jobs -p) 2>/dev/null || :; wait || :' EXIT\n" + text],
                                   cwd=self.path("work"), env=self.environment(), stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True)
        try:
            output, _ = process.communicate(timeout=2 * gt.DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            self.fail(f"did not end:\n{text}\n{output}")
        finally:
            self.end_daemons()
        self.assertEqual(process.returncode, 0, f"{text}\n--- printed\n{output}")

    def test_links(self):
        for page in [*PAGES, *gt.ROOT.glob("*/README.md")]:
            for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
                if "://" not in target:
                    self.assertTrue((page.parent / target).exists(), f"{page.name}: {target}")

    def test_paths_in_the_text_exist(self):
        """`tests/...`, `docs/...` and the like in backquotes."""
        rooms = "runtime schema block exports nbd fuse qmp systemd cli tests bench docs".split()
        for page in [*PAGES, gt.ROOT / "tests/README.md", gt.ROOT / "qmp/README.md", gt.ROOT / "cli/README.md"]:
            for path in re.findall(r"`((?:%s)/[\w./@-]*)`" % "|".join(rooms), page.read_text()):
                if "NAME" not in path and "/x_" not in path and "test_x" not in path:  # stand for names to be chosen
                    self.assertTrue((gt.ROOT / path.rstrip(".")).exists(), f"{page.name}: {path}")

    def test_options_in_the_text_exist(self):
        gt.require_gantry()
        known = self.run_daemon("--help").stdout
        for command in ("serve", "mount", "umount", "status", "qmp", "tls"):
            known += subprocess.run([gt.GANTRY, command, "--help"], capture_output=True, text=True, check=True).stdout
        for command in ("create", "info", "check", "map", "resize", "snapshot", "amend", "measure", "compact", "commit", "rebase"):
            known += subprocess.run([gt.GANTRY, "image", command, "--help"], capture_output=True, text=True, check=True).stdout
        for page in PAGES:
            for block in re.findall(r"^```sh.*?^```$", page.read_text(), re.M | re.S):
                for line in block.replace("\\\n", " ").splitlines():
                    words = line.split("#")[0].split()
                    if words and words[0] in ("gantryd", "gantry"):
                        for option in re.findall(r"(?<=\s)--[a-z][\w-]*", line.split("|")[0]):
                            self.assertIn(option, known, f"{page.name}: {line}")


def add_recipes():
    """One test per recipe, so that a failure names it."""
    for page in PAGES:
        for number, match in enumerate(RECIPE.finditer(page.read_text()), 1):
            def test(self, text=match[1]):
                gt.require_gantry()
                self.run_recipe(text)
            setattr(Recipes, f"test_{page.stem.lower()}_{number}", test)


add_recipes()
if __name__ == "__main__":
    gt.main()
