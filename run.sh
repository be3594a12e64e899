#!/usr/bin/env bash
# Starts Z-Image Studio, setting it up first where that is needed: without arguments the page, with arguments
# the command line (bash run.sh generate "a red apple"). install.py does the work; this finds a Python to start it.
set -eu

case $0 in
*/*) root=$(CDPATH='' cd -- "${0%/*}" && pwd -P) ;;
*) root=$(pwd -P) ;;
esac

# The environment's own Python comes first because it starts at once, where a name on PATH may lead through a shim.
for python in "$root/.venv/bin/python" python3 python3.13 python3.12 python3.11 python ""; do
    # Any of them may be a stub or a broken link, so each is tried.
    "$python" -ISc 'import sys; sys.exit(sys.version_info < (3, 8))' >/dev/null 2>&1 && break
done
if [ -z "$python" ]; then
    echo "Z-Image Studio needs Python 3.11, 3.12 or 3.13, and no Python was found. Install one, then run this again." >&2
    exit 1
fi

# The folder stays the caller's, so that file names in the arguments mean what the caller means.
[ $# -gt 0 ] || set -- serve
exec "$python" -IS "$root/install.py" "$root/cli.py" "$@"
