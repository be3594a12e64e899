#!/usr/bin/env bash
# Every check, in order: set-up with the test packages and a browser, format, lint, then the unit, pipeline and
# browser tests. Arguments go to pytest (bash test.sh -k install). Screenshots are left in artifacts/.
set -eu

case $0 in
*/*) cd -- "${0%/*}" ;;
esac
root=$(pwd -P)
python=$root/.venv/bin/python
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

mkdir -p artifacts
phase "system packages" system_packages
phase "set-up" set_up
phase "format" "$python" -m ruff format --check .
phase "lint" "$python" -m ruff check .
phase "tests" "$python" -m pytest -m "$selection" --durations=15 "$@"
