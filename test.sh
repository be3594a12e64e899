#!/usr/bin/env bash
# Every check, in order: set-up with the test packages and a browser, format, lint, types, then the tests.
#
#   bash test.sh                 everything
#   bash test.sh fast            all of it that needs no browser and takes no long
#   bash test.sh format|lint|types   one check alone, without set-up
#   bash test.sh -k install      everything, with arguments for pytest
#
# Screenshots are left in artifacts/.
set -eu

case $0 in
*/*) cd -- "${0%/*}" ;;
esac
root=$(pwd -P)
python=$root/.venv/bin/python
[ "${OS:-}" != Windows_NT ] || python=$root/.venv/Scripts/python.exe
selection="not gpu"

# Runs the rest of its arguments under a heading, and says how long they took.
phase() {
    local name=$1 start=$SECONDS
    shift
    echo "== $name"
    "$@"
    echo "== $name: $((SECONDS - start)) s"
}

has_browser() {
    local name
    for name in chromium chromium-browser google-chrome; do
        command -v "$name" >/dev/null && return
    done
    return 1
}

# What the checks need from the system. Debian's and Ubuntu's package manager is asked; elsewhere the user is.
system_packages() {
    local missing="" as_root=""
    has_browser || missing="chromium fonts-dejavu-core"
    if command -v apt-get >/dev/null; then
        python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3 python3-venv"
        [ -n "$missing" ] || return 0
        [ "$(id -u)" -eq 0 ] || as_root="sudo -n"
        $as_root apt-get -q update
        # shellcheck disable=SC2086 # a list of names
        $as_root env DEBIAN_FRONTEND=noninteractive apt-get -qy install --no-install-recommends $missing
    elif [ -n "$missing" ]; then
        if [ -n "${CI:-}" ]; then
            echo "The browser tests need Chromium or Chrome on PATH (chromium, chromium-browser or google-chrome)." >&2
            return 1
        fi
        echo "No browser tests: install Chromium or Chrome (on PATH as chromium or google-chrome) to run them." >&2
        selection="not gpu and not browser"
    fi
}

set_up() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python ""; do
        "$name" -ISc 'import sys; sys.exit(sys.version_info < (3, 8))' >/dev/null 2>&1 && break
    done
    if [ -z "$name" ]; then
        echo "The checks need Python 3.11, 3.12 or 3.13, and no Python was found." >&2
        return 1
    fi
    "$name" -IS install.py --extra test
}

format() { "$python" -m ruff format --check .; }
lint() { "$python" -m ruff check .; }
types() { "$python" -m mypy; }

case ${1:-} in
format | lint | types)
    "$1"
    exit
    ;;
fast)
    shift
    selection="not gpu and not browser and not slow"
    ;;
*) phase "system packages" system_packages ;;
esac
mkdir -p artifacts
phase "set-up" set_up
phase "format" format
phase "lint" lint
phase "types" types
# As many tests at once as there are processors, up to four, each with one thread: most wait for a page or a process.
export OMP_NUM_THREADS=1
phase "tests" "$python" -m pytest -m "$selection" -n auto --maxprocesses 4 --dist worksteal --durations=15 "$@"
