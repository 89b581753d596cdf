"""Tests of gantry image: running it, making images for it."""

import gantry_test as gt

SECRET = ["--object", "secret,id=s,data=open sesame"]


class ToolCase(gt.Case):
    def setUp(self):
        super().setUp()
        gt.require("qemu-img", "qemu-io")
        gt.require_gantry("the tool is ours")

    def image(self, *words, status=0, **options):
        done = self.run_tool(gt.GANTRY, "image", *words, check=False, **options)
        self.assertEqual(status, done.returncode, f"gantry image {words}: {done.stdout}{done.stderr}")
        return done.stdout

    def refused(self, text, *words, status=1, **options):
        """One sentence on stderr, nothing else; the status is that of a failure."""
        done = self.run_tool(gt.GANTRY, "image", *words, check=False, **options)
        self.assertEqual((status, ""), (done.returncode, done.stdout), done.stderr)
        self.assertRegex(done.stderr, rf"\Agantry image {words[0]}: [^\n]*{text}[^\n]*\n\Z")
        self.assertNotRegex(done.stderr, r"(?i)assert|check failed|std::|\(null\)")

    def make(self, name, options="", size="4M", commands=()):
        path = self.path(name)
        words = ["-o", options.replace("DIR", self.dir)] if options else []
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", *(SECRET if "encrypt" in options else []), *words, path,
                      *([size] if "backing" not in options else []))
        if commands:
            self.run_tool("qemu-io", "-f", "qcow2", *[w for c in commands for w in ("-c", c)], path)
        return path
