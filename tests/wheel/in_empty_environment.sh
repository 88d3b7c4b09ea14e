#!/bin/sh
# Test the wheel $1 in an environment that holds nothing but it and pytest, away from the sources.
set -eu
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
"$PYTHON" -m venv --without-pip "$room/venv"
"$PYTHON" -m pip --python "$room/venv/bin/python" install --quiet --group wheel-test "$1"
cp -r tests/wheel tests/samples tests/downstream "$room"
cd "$room"
venv/bin/python -m pytest wheel
