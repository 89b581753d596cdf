#!/usr/bin/python3
"""gantry mount and gantry umount: an image as a file, for a person or a script."""
# One configuration: nothing of it depends on how loops do their I/O.

import os
import pathlib
import re
import signal
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import fuse_case
import fuse_guard
import gantry_test as gt
from gantry_test import KIB, MIB, require, wait_for

SIZE = 8 * MIB
SBIN = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}


class Tool(fuse_case.FuseCase):
    def setUp(self):
        super().setUp()
        gt.require_gantry()
        os.mkdir(self.path("run"), 0o700)
        self.environment = {**SBIN, "XDG_RUNTIME_DIR": self.path("run")}
        self.environment.pop("RUNTIME_DIRECTORY", None)

    def gantry(self, *arguments, status=0, **options):
        done = subprocess.run([gt.GANTRY, *map(str, arguments)], capture_output=True, text=True, timeout=gt.DEADLINE,
                              env=self.environment, cwd=self.dir, check=False, **options)
        if status is not None:
            self.assertEqual(done.returncode, status, done.stderr)
        return done

    def refused(self, *arguments, text, status=1):
        done = self.gantry(*arguments, status=status)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        self.assertRegex(done.stderr, f"^gantry {arguments[0]}: .*{text}")
        self.assertEqual(done.stdout, "")

    def start(self, *arguments, file="file"):
        """A `gantry mount` in the foreground: its process, once the file is there."""
        path = self.path(file)
        self._guard_mount(path)
        process = subprocess.Popen([gt.GANTRY, "mount", *gt.gantryd_options(), *map(str, arguments)], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment, cwd=self.dir)
        key = self.guard.push(pid=process.pid)

        def end():
            process.kill()
            process.communicate()
            self.guard.pop(key)
        self.addCleanup(end)
        line = process.stdout.readline()
        if not line:
            self.fail(f"gantry mount ended: {process.stderr.read()}")
        self.assertIn(" shows ", line)
        self.assertIn("umount", process.stdout.readline())
        self.assertTrue(fuse_guard.mounts(path))
        return process

    def ended(self, process, path, made=True):
        """It has ended by itself, cleanly, and left nothing."""
        self.assertEqual(process.wait(gt.DEADLINE), 0)
        self.assertEqual(process.stderr.read(), "")
        self.assertEqual(fuse_guard.mounts(path), [])
        self.assertEqual(os.path.exists(path), not made)

    def command(self, *arguments, **options):
        """A mount on "file" with a command."""
        self._guard_mount(self.path("file"))
        return self.gantry("mount", *gt.gantryd_options(), *arguments, **options)


class WithCommand(Tool):
    def test_status_and_output(self):
        image = self.make_image("qcow2", SIZE, pattern=gt.text_block)
        done = self.command(image, "file", "--", "sh", "-c", "stat -c '%s %a' file; head -c 8 file | od -An -tx1; exit 7", status=7)
        self.assertEqual(done.stdout.split("\n")[0], f"{SIZE} 400")
        self.assertEqual(done.stdout.split("\n")[1].split(), [f"{b:02x}" for b in gt.text_block(0)[:8]])
        self.assertEqual(done.stderr, "")
        self.assertFalse(os.path.exists(self.path("file")))
        # A read-only mount does not write the image.
        self.check_image(image, "qcow2")
        self.command(image, "file", "--", "sh", "-c", "kill -TERM $$", status=128 + signal.SIGTERM)

    def test_a_file_system_is_made(self):
        require("mkfs.ext4") if gt.shutil.which("mkfs.ext4", path=SBIN["PATH"]) is None else None
        image = self.make_image("qcow2", SIZE)
        self.command("--write", image, "file", "--", "mkfs.ext4", "-q", "file")
        self.check_image(image, "qcow2")
        self.command(image, "file", "--", "e2fsck", "-fn", "file")

    def test_over_the_image_itself(self):
        for form in ("raw", "qcow2"):
            with self.subTest(form):
                image = self.make_image(form, SIZE)
                self._guard_mount(image)
                self.gantry("mount", "-w", "-f", form, image, image, "--", "sh", "-c", f"echo new | dd of={image} conv=notrunc status=none")
                self.assertTrue(os.path.exists(image))
                self.check_image(image, form)
                self.assertEqual(self.contents(image, form)[:4], b"new\n")

    def test_words_of_the_command_are_its_own(self):
        image = self.make_image("qcow2", SIZE)
        done = self.command(image, "file", "--", "printf", "%s|", "--help", "-p", "x y", "--")
        self.assertEqual(done.stdout, "--help|-p|x y|--|")

    def test_what_cannot_be_run(self):
        image = self.make_image("qcow2", SIZE)
        self.command(image, "file", "--", "no-such-command", status=127)
        pathlib.Path(self.path("data")).touch()
        self.command(image, "file", "--", "./data", status=126)
        self.assertFalse(os.path.exists(self.path("file")))

    def test_signals_go_to_the_command(self):
        image = self.make_image("qcow2", SIZE)
        script = "trap 'echo got it; stat -c %s file; exit 3' TERM; echo ready; while :; do read x <fifo; done"
        os.mkfifo(self.path("fifo"))
        self._guard_mount(self.path("file"))
        process = subprocess.Popen([gt.GANTRY, "mount", image, "file", "--", "sh", "-c", script], stdout=subprocess.PIPE, text=True,
                                   env=self.environment, cwd=self.dir)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        self.assertEqual(process.stdout.readline(), "ready\n")
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: process.poll() is not None or self.nudge(), "the command's end")
        self.assertEqual(process.returncode, 3)
        self.assertEqual(process.stdout.read(), f"got it\n{SIZE}\n")

    def nudge(self):
        """A shell acts on a signal once what it runs has ended."""
        try:
            fd = os.open(self.path("fifo"), os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return False
        os.close(fd)
        return False

    def test_what_it_leaves_behind_loses_the_file(self):
        image = self.make_image("qcow2", SIZE)
        os.mkfifo(self.path("fifo"))
        done = self.command("-w", image, "file", "--", "sh", "-c", "(exec 3<file >/dev/null 2>&1; echo open >fifo; read x <fifo) & read x <fifo")
        self.assertEqual(done.stderr, "")
        self.assertEqual(fuse_guard.mounts(self.path("file")), [])
        self.check_image(image, "qcow2")
        pathlib.Path(self.path("fifo")).write_text("end\n", encoding="ascii")


class Foreground(Tool):
    def test_until_interrupted(self):
        image = self.make_image("qcow2", SIZE)
        for number in (signal.SIGINT, signal.SIGTERM):
            process = self.start("-w", image, "file")
            self.assertIn("fuse", self.gantry("status").stdout)
            with open(self.path("file"), "r+b", buffering=0) as file:
                file.write(b"kept")
            process.send_signal(number)
            self.ended(process, self.path("file"))
            self.check_image(image, "qcow2")
        self.assertEqual(self.contents(image, "qcow2")[:4], b"kept")

    def test_until_unmounted(self):
        image = self.make_image("qcow2", SIZE)
        process = self.start(image, "file")
        self.assertEqual(self.gantry("umount", "file").stderr, "")
        self.ended(process, self.path("file"))

    def test_a_file_that_was_there_stays(self):
        image = self.make_image("qcow2", SIZE)
        pathlib.Path(self.path("file")).write_text("mine", encoding="ascii")
        process = self.start(image, "file")
        self.assertEqual(os.stat(self.path("file")).st_size, SIZE)
        self.gantry("umount", "file")
        self.ended(process, self.path("file"), made=False)
        self.assertEqual(pathlib.Path(self.path("file")).read_text(encoding="ascii"), "mine")

    def test_in_the_background(self):
        image = self.make_image("qcow2", SIZE)
        self._guard_mount(self.path("file"))
        done = self.gantry("mount", "--background", "--write", image, "file")
        self.assertIn("'gantry umount file' ends it", done.stdout)
        with open(self.path("file"), "r+b", buffering=0) as file:
            file.write(b"kept")
        self.gantry("umount", "file")
        wait_for(lambda: not os.path.exists(self.path("file")), "the mount to be over")
        self.assertEqual(self.contents(image, "qcow2")[:4], b"kept")

    def test_options_of_the_export(self):
        raw = self.make_image("raw", SIZE)
        process = self.start("-w", "-f", "raw", "--growable", "--allow-other=off", raw, "file")
        with open(self.path("file"), "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"end", SIZE)
        self.assertEqual(os.stat(self.path("file")).st_size, SIZE + 3)
        with open("/proc/self/mountinfo", encoding="utf-8") as table:
            self.assertNotIn("allow_other", [line for line in table if f" {self.path('file')} " in line][0])
        process.send_signal(signal.SIGINT)
        self.ended(process, self.path("file"))
        self.assertEqual(os.stat(raw).st_size, SIZE + 3)
        process = self.start("-f", "raw", "--cached", "--transport", "classic", raw, "file")
        self.assertEqual(os.stat(self.path("file")).st_size, SIZE + 3)
        process.send_signal(signal.SIGINT)
        self.ended(process, self.path("file"))

    def test_a_snapshot(self):
        require("qemu-img", "qemu-io")
        image = self.make_image("qcow2", SIZE)
        self.run_tool("qemu-io", "-f", "qcow2", "-c", "write -P 0x31 0 4k", image)
        self.run_tool("qemu-img", "snapshot", "-c", "then", image)
        self.run_tool("qemu-io", "-f", "qcow2", "-c", "write -P 0x32 0 4k", image)
        self.assertEqual(self.command("--snapshot", "then", image, "file", "--", "head", "-c4", "file").stdout, "1111")
        self.assertEqual(self.command(image, "file", "--", "head", "-c4", "file").stdout, "2222")


class Partitions(Tool):
    """Tables made by a program that is not ours."""

    def setUp(self):
        super().setUp()
        if not gt.shutil.which("sfdisk", path=SBIN["PATH"]):
            gt.missing("sfdisk is not installed")

    def disk(self, script, size=64 * MIB, *words):
        path = self.raw_image("disk.raw", size)
        subprocess.run(["sfdisk", "-q", *words, path], input=script, text=True, check=True, env=SBIN, capture_output=True)
        listed = subprocess.run(["sfdisk", "-d", path], text=True, check=True, env=SBIN, capture_output=True).stdout
        # "/tmp/disk.raw5 : start= 2048, size= 4096, type=83"
        self.parts = {int(number): (int(start) * 512, int(count) * 512)
                      for number, start, count in re.findall(r"raw(\d+) : start= *(\d+), size= *(\d+)", listed)}
        with open(path, "r+b") as file:
            for number, (start, _) in self.parts.items():
                file.seek(start)
                file.write(b"partition %02d" % number)
        return path

    def check_each(self, image, form):
        self.assertGreater(len(self.parts), 2)
        for number, (_, size) in self.parts.items():
            done = self.command("-f", form, "--partition", str(number), image, "file", "--", "sh", "-c", "stat -c %s file; head -c 12 file")
            self.assertEqual(done.stdout, f"{size}\npartition {number:02d}")

    def test_mbr_with_logical_ones(self):
        image = self.disk("label: dos\n,4M\n,8M,82\n,,E\n,5M\n,6M\n,7M\n")
        self.assertEqual(sorted(self.parts), [1, 2, 3, 5, 6, 7])
        del self.parts[3]  # the extended one has no content of its own
        self.check_each(image, "raw")
        self.refused("mount", "-f", "raw", "-p", "3", image, "file", text="has no partition 3; its MBR has 1 ")

    def test_gpt_in_qcow2(self):
        raw = self.disk("label: gpt\n,4M\n,8M\n20M,9M\n,,U\n")
        image = self.path("disk.qcow2")
        self.run_tool("qemu-img", "convert", "-O", "qcow2", raw, image)
        self.check_each(image, "qcow2")
        self.refused("mount", "-p", "9", image, "file", text="has no partition 9; its GPT has 1 ")
        self.assertFalse(os.path.exists(self.path("file")))

    def test_a_damaged_gpt(self):
        image = self.disk("label: gpt\n,4M\n,8M\n,9M\n")
        with open(image, "r+b") as file:
            file.write(bytes(34 * 512))
        done = self.command("-f", "raw", "-p", "2", image, "file", "--", "head", "-c12", "file")
        self.assertEqual(done.stdout, "partition 02")
        self.assertIn("the one at its end is used", done.stderr)
        with open(image, "r+b") as file:
            file.seek(-512, os.SEEK_END)
            file.write(bytes(512))
        self.refused("mount", "-f", "raw", "-p", "2", image, "file", text="no partition table")

    def test_a_file_system_in_a_partition(self):
        """Written through the partition, seen by nobody outside of it."""
        image = self.disk("label: gpt\n,16M\n,16M\n,16M\n")
        before = pathlib.Path(image).read_bytes()
        self.command("-w", "-f", "raw", "-p", "2", image, "file", "--", "mkfs.ext4", "-q", "-F", "file")
        self.command("-f", "raw", "-p", "2", image, "file", "--", "e2fsck", "-fn", "file")
        after = pathlib.Path(image).read_bytes()
        start, size = self.parts[2]
        self.assertEqual((before[:start], before[start + size:]), (after[:start], after[start + size:]))
        self.assertNotEqual(before[start:start + size], after[start:start + size])
        done = self.command("-w", "-f", "raw", "-p", "2", image, "file", "--", "sh", "-c",
                            f"printf x | dd of=file bs=1 seek={size} conv=notrunc", status=1)
        self.assertIn("No space left", done.stderr)


class Umount(Tool):
    def test_what_is_no_mount_of_ours(self):
        pathlib.Path(self.path("plain")).touch()
        self.refused("umount", "plain", text="'plain' is no file that gantry shows")
        self.refused("umount", "missing", text="missing: No such file or directory")
        self.refused("umount", status=2, text="name a file")
        self.refused("umount", "--lazy", "plain", status=2, text="unrecognised option|unrecognized option")

    def test_while_in_use(self):
        process = self.start(self.make_image("qcow2", SIZE), "file")
        fd = os.open(self.path("file"), os.O_RDONLY)
        self.refused("umount", "file", text="in use.*--force")
        self.gantry("umount", "--force", "file")
        self.assertEqual(os.pread(fd, 4, 0), bytes(4))
        os.close(fd)
        self.ended(process, self.path("file"))

    def test_of_a_killed_daemon(self):
        process = self.start(self.make_image("qcow2", SIZE), "file")
        process.kill()
        process.wait()
        done = self.gantry("umount", "file", status=None)
        # A daemon of another test that starts just now may have cleaned it away.
        self.assertTrue(done.returncode == 0 or "is no file that gantry shows" in done.stderr, done.stderr)
        self.assertEqual(fuse_guard.mounts(self.path("file")), [])
        self.assertEqual(os.stat(self.path("file")).st_size, 0)

    def test_of_a_daemon_that_hangs(self):
        process = self.start(self.make_image("qcow2", SIZE), "file")
        gt.freeze(process)
        waiting = subprocess.Popen(["head", "-c", "1", self.path("file")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(waiting.wait)
        self.addCleanup(waiting.kill)
        # It waits for the answer to open(2) or read(2); no file is in its table before.
        wait_for(lambda: b"request_wait_answer" in pathlib.Path(f"/proc/{waiting.pid}/wchan").read_bytes(), "the client to wait")
        self.gantry("umount", "--force", "file")
        self.assertEqual(fuse_guard.mounts(self.path("file")), [])
        if fuse_case.mount_fusectl():
            self.assertNotEqual(waiting.wait(gt.DEADLINE), 0)
        process.send_signal(signal.SIGCONT)
        self.ended(process, self.path("file"))

    def test_of_gantryd(self):
        at = self.mount("raw", SIZE)
        self.gantry("umount", at.path)
        at.qmp.event("BLOCK_EXPORT_DELETED", id="e")


class Served(Tool):
    def test_as_a_file_and_over_nbd(self):
        """gantry serve --file, as ./bootstrap run has it."""
        image = self.make_image("qcow2", SIZE)
        path, socket = self.path("file"), self.path("nbd.sock")
        self._guard_mount(path)
        process = subprocess.Popen([gt.GANTRY, "serve", *gt.gantryd_options(), "--write", "--file", "file", "--socket", socket, image],
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=self.environment, cwd=self.dir)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        text = ""
        while "Ctrl-C" not in text:
            line = process.stdout.readline()
            self.assertTrue(line, text)
            text += line
        self.assertIn("and as the file\n\n    file\n", text)
        with open(path, "r+b", buffering=0) as file:
            file.write(b"through the file")
        client = gt.libnbd().NBD()
        client.connect_uri(self.uri(socket))
        self.assertEqual(bytes(client.pread(16, 0)), b"through the file")
        client.shutdown()
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(gt.DEADLINE), 0)
        self.assertFalse(os.path.exists(path))
        self.check_image(image, "qcow2")
        self.refused("serve", "--file", "no/file", image, text="Could not create the mount point")


class Words(Tool):
    def test_wrong_ones(self):
        image = self.make_image("raw", 64 * KIB)
        self.refused("mount", status=2, text="name an image and the file")
        self.refused("mount", image, status=2, text="name an image and the file")
        self.refused("mount", image, "a", "b", status=2, text="'b' is too much")
        self.refused("mount", image, "file", "--", status=2, text="name a command")
        self.refused("mount", "-p", "x", image, "file", status=2, text="'x' is no number of a partition")
        self.refused("mount", "--nonsense", image, "file", status=2, text="nonsense")
        self.refused("mount", "-b", image, "file", "--", "true", status=2, text="exclude each other")
        self.refused("mount", "-p", "1", "--growable", image, "file", status=2, text="a partition cannot grow")
        self.refused("mount", "-w", image, "file", text="say --format raw")
        self.refused("mount", "missing", "file", text="Could not open 'missing': No such file")
        self.refused("mount", image, "no/file", text="Could not create the mount point 'no/file'")
        self.refused("mount", image, ".", text="is not a regular file")
        self.refused("mount", "--transport", "x", image, "file", text="x-transport")
        self.refused("mount", "--growable", image, "file", text="growable")
        self.assertFalse(os.path.exists(self.path("file")))
        self.assertIn("-- COMMAND", self.gantry("mount", "--help").stdout)
        self.assertIn("FILE...", self.gantry("umount", "--help").stdout)
        self.assertRegex(self.gantry("--help").stdout, "(?s)mount .*umount ")


if __name__ == "__main__":
    gt.main()
