#!/bin/sh
# Every C++ file is as clang-format-19 wants it.
command -v clang-format-19 >/dev/null || { echo "SKIP: clang-format-19 is not installed"; exit 77; }
git ls-files -co --exclude-standard '*.cc' '*.h' | xargs clang-format-19 --dry-run --Werror
