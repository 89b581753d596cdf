#!/bin/sh
# Each header compiles alone.
git ls-files -co --exclude-standard '*.h' | grep -v '^bench/' >"${TMPDIR:-/tmp}/gantry-headers.$$"
xargs -P 2 -n 12 sh -c '
    for header in "$@"; do
        echo "#include \"$header\"" |
            clang++-19 -std=c++23 -fsyntax-only -I. -Itests/support -DSPDLOG_COMPILED_LIB -DSPDLOG_FMT_EXTERNAL -x c++ - || {
            echo "$header does not compile alone"
            exit 255
        }
    done' sh <"${TMPDIR:-/tmp}/gantry-headers.$$"
status=$?
rm -f "${TMPDIR:-/tmp}/gantry-headers.$$"
exit $status
